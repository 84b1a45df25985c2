"""FlexLoRA (arXiv 2402.11505): sum full-size delta weights, one SVD, each client its best rank-r_i approximation.

W ← Σ_i p_i (α/r_i) B_i A_i, p_i = n_i / Σ n over the sampled clients (section 3.2). The published code never applies
the ranks; this module follows the paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora import lowrank
from flexlora.lowrank import Spectrum
from flexlora.methods.base import register
from flexlora.types import ClientRule, ClientUpdate, Download, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    W: Mapping[str, LowRank]
    """The global delta weight, exact."""
    spectrum: Mapping[str, Spectrum]
    """Leading directions of W up to the largest level."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    W = {m: lowrank.empty(*shape) for m, shape in shapes.items()}
    return State(0, seed, dict(shapes), W, {m: lowrank.svd(x) for m, x in W.items()})


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    sums = {m: lowrank.Sum(*shape) for m, shape in state.shapes.items()}
    count = 0
    for update in updates:
        count += 1
        for module, x in update.adapter.items():
            assert isinstance(x, LowRank)
            sums[module].add(x, update.weight)
    if not count:
        raise ValueError("aggregate needs at least one client update")
    W = {m: s.mean() if s.total else state.W[m] for m, s in sums.items()}
    return State(state.round + 1, state.seed, state.shapes, W, {m: lowrank.svd(x) for m, x in W.items()})


def distribute(state: State, ranks: Ranks) -> Download:
    adapter = {
        m: lowrank.at_rank(state.spectrum[m], r, seed=state.seed, module=m, round=state.round)
        for m, r in ranks.items()
    }
    return Download(adapter, {}, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return state.W


def flexlora() -> Method:
    return Method(init, aggregate, distribute, delta)


register("flexlora", flexlora, paper="2402.11505", summary="mean of full-size delta weights, one SVD, best rank-r factors for each client")
