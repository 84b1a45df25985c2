"""FlexLoRA (arXiv 2402.11505): sum full-size delta weights, one SVD, each client its best rank-r_i approximation.

W ← Σ_i p_i (α/r_i) B_i A_i, p_i = n_i / Σ n over the sampled clients (section 3.2). The published code never applies
the ranks; this module follows the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from flexlora import lowrank
from flexlora.cores import each
from flexlora.lowrank import Decomposed, Matrix, Spectrum
from flexlora.methods.base import register
from flexlora.types import ClientRule, ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    levels: Ranks
    """The largest rank that may occur, by module; a module without one is decomposed whole."""
    W: Mapping[str, LowRank | torch.Tensor]
    """The global delta weight, exact: factors, or dense where those would take more room."""
    norm: Mapping[str, float]
    """‖W‖_F"""
    spectrum: Mapping[str, Spectrum]
    """Leading directions of W up to the level: the one factorisation of the round."""


class Deltas(Mapping[str, LowRank]):
    """``delta(state)``: factor pairs made when asked for, since a dense W takes an identity to become one."""

    def __init__(self, state: State) -> None:
        self._state = state

    def __getitem__(self, module: str) -> LowRank:
        s = self._state
        return Decomposed.of(s.W[module], s.spectrum[module], s.norm[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.W)

    def __len__(self) -> int:
        return len(self._state.W)


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    largest = {m: max(ranks[m] for ranks in levels if m in ranks) for m in shapes if any(m in r for r in levels)}
    W = {m: lowrank.empty(*shape) for m, shape in shapes.items()}
    return State(0, seed, dict(shapes), largest, W, dict.fromkeys(W, 0.0), {m: lowrank.svd(x) for m, x in W.items()})


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    sums = {m: lowrank.Sum(*shape) for m, shape in state.shapes.items()}
    count = 0
    for update in updates:
        count += 1
        for module, x in update.adapter.items():
            assert isinstance(x, LowRank)
            sums[module].add(x, update.weight, wait=True)
        if any(s.full for s in sums.values()):
            # All modules at once, so that the cores have even work.
            each(lowrank.Sum.flush, sorted(sums.values(), key=lambda s: -s.d_out * s.d_in))
    if not count:
        raise ValueError("aggregate needs at least one client update")

    def finish(module: str) -> tuple[Matrix, float, Spectrum]:
        total = sums[module].total
        if not total:  # nobody with an example has this module: it stays
            return state.W[module], state.norm[module], state.spectrum[module]
        W = sums.pop(module).over(total)  # and the sum is freed
        spectrum, norm = lowrank.decompose(W, state.levels.get(module))
        return W, norm, spectrum

    # Large modules first, so that the cores finish together.
    order = sorted(state.shapes, key=lambda m: -math.prod(state.shapes[m]))
    found = dict(zip(order, each(finish, order), strict=True))
    done = {m: found[m] for m in state.shapes}
    return State(
        state.round + 1,
        state.seed,
        state.shapes,
        state.levels,
        W={m: x for m, (x, _, _) in done.items()},
        norm={m: x for m, (_, x, _) in done.items()},
        spectrum={m: x for m, (_, _, x) in done.items()},
    )


def distribute(state: State, ranks: Ranks, split: Literal["B", "balanced"] = "B") -> Download:
    def at(module: str) -> LowRank:
        r = ranks[module]
        spectrum = lowrank.extend(state.spectrum[module], state.W[module], r)
        return lowrank.at_rank(spectrum, r, seed=state.seed, module=module, round=state.round, split=split)

    return Download(dict(zip(ranks, each(at, ranks), strict=True)), {}, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return Deltas(state)


def flexlora(split: str = "B") -> Method:
    """`split`: the singular values go into "B" (A orthonormal), or "balanced" as their roots into both."""
    if split not in ("B", "balanced"):
        raise FlexLoraError(f"split={split!r} of method flexlora does not exist: choose B or balanced")
    return Method(init, aggregate, partial(distribute, split=split), delta)


register(
    "flexlora",
    flexlora,
    paper="2402.11505",
    summary="mean of full-size delta weights, one SVD, best rank-r factors for each client",
)
