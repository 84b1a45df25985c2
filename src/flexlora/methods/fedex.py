"""FedEx-LoRA (arXiv 2410.09432): mean factors, and what they miss goes into the base; exact, equal ranks only.

B̄ = Σ p_i B_i, Ā = Σ p_i A_i, and the residual Σ p_i B_i A_i − B̄ Ā joins the base delta, cumulative since the
original base. The means are weighted as everything else is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora import lowrank
from flexlora.cores import each
from flexlora.methods.base import register
from flexlora.methods.factors import PaddedMean, compress, first, received
from flexlora.types import ClientRule, ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    adapter: Mapping[str, LowRank]
    """Mean factors; of rank 0 until the first update brings some."""
    base: Mapping[str, LowRank]
    """The base delta: the residuals of all rounds."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    zero = {m: lowrank.empty(*shape) for m, shape in shapes.items()}
    return State(0, seed, dict(shapes), zero, zero)


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    sums: dict[str, lowrank.Sum] = {}
    means: dict[str, PaddedMean] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            if module not in means:
                sums[module], means[module] = lowrank.Sum(*state.shapes[module]), PaddedMean()
            mean, rank = means[module], x.A.shape[0]
            if mean.A is not None and mean.A.shape[0] != rank:
                raise FlexLoraError(
                    f"method fedex needs equal ranks: client {update.client} has rank {rank} in {module}, "
                    f"others {mean.A.shape[0]}; use --method flexlora"
                )
            mean.add(x, update.weight, 1.0)
            sums[module].add(x, update.weight)
    new = {m: mean.mean() for m, mean in means.items()}

    def residual(module: str) -> LowRank:
        terms = [sums.pop(module).mean(), new[module], state.base[module]]
        return compress(lowrank.stack(terms, [1.0, -1.0, 1.0]))

    base = dict(zip(new, each(residual, new), strict=True))
    return State(state.round + 1, state.seed, state.shapes, {**state.adapter, **new}, {**state.base, **base})


def distribute(state: State, ranks: Ranks) -> Download:
    """Mean factors, and the base delta of all modules, also of those that the client does not adapt."""
    adapter: dict[str, LowRank] = {}
    for m, rank in ranks.items():
        x = state.adapter[m]
        if x.A.shape[0] not in (0, rank):
            raise FlexLoraError(
                f"method fedex needs equal ranks: {m} is at rank {x.A.shape[0]}, rank {rank} is asked for; "
                "use --method flexlora"
            )
        adapter[m] = x if x.A.shape[0] else first(x, rank, seed=state.seed, module=m, round=0)
    return Download(adapter, {m: x for m, x in state.base.items() if x.A.shape[0]}, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return {m: compress(lowrank.stack([x, state.base[m]], [1.0, 1.0])) for m, x in state.adapter.items()}


def fedex() -> Method:
    return Method(init, aggregate, distribute, delta, equal_ranks=True)


register(
    "fedex",
    fedex,
    paper="2410.09432",
    summary="mean factors, and what they miss of the mean delta weight goes into the base; equal ranks only",
)
