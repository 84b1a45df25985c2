"""RBLA (arXiv 2408.08699): row j of A and column j of B averaged over the clients with r_i ≥ j only.

No dilution by zeros: a direction that nobody holds in a round keeps its value. Clients get the first r_i rows and
columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora import lowrank
from flexlora.methods.base import register
from flexlora.methods.factors import HolderMean, first, received
from flexlora.types import ClientRule, ClientUpdate, Download, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    adapter: Mapping[str, LowRank]
    """Mean factors, at the largest rank that any client had so far."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, dict(shapes), {m: lowrank.empty(*shape) for m, shape in shapes.items()})


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    means: dict[str, tuple[HolderMean, HolderMean]] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            B, A = means.setdefault(module, (HolderMean(1), HolderMean(0)))
            B.add(x.B, update.weight)
            A.add(x.A, update.weight)
    new = {m: LowRank(B.over(state.adapter[m].B), A.over(state.adapter[m].A)) for m, (B, A) in means.items()}
    return State(state.round + 1, state.seed, state.shapes, {**state.adapter, **new})


def distribute(state: State, ranks: Ranks) -> Download:
    adapter = {m: first(state.adapter[m], r, seed=state.seed, module=m, round=state.round) for m, r in ranks.items()}
    return Download(adapter, {}, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return state.adapter


def rbla() -> Method:
    return Method(init, aggregate, distribute, delta)


register(
    "rbla", rbla, paper="2408.08699", summary="each row of A and column of B averaged over the clients that hold it"
)
