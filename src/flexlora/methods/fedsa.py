"""FedSA-LoRA (arXiv 2410.01463): A is averaged, B stays with its client; half the upload, a personal model each.

The paper has equal ranks. At unequal ones row j of A is averaged over the clients with r_i ≥ j (zero-padding would
shrink rows that the smaller clients do not have), and a row that nobody holds in a round keeps its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexlora.methods.base import register
from flexlora.methods.factors import HolderMean, first, received
from flexlora.types import ClientRule, ClientUpdate, Download, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    A: Mapping[str, Tensor]
    """(largest rank so far, d_in) by module."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, dict(shapes), {m: torch.zeros((0, d_in)) for m, (_, d_in) in shapes.items()})


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    means: dict[str, HolderMean] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            means.setdefault(module, HolderMean(0)).add(x.A, update.weight)
    A = {m: mean.over(state.A[m]) for m, mean in means.items()}
    return State(state.round + 1, state.seed, state.shapes, {**state.A, **A})


def distribute(state: State, ranks: Ranks) -> Download:
    """A of the round, and B zero: what a client of its first round starts from; later ones have their own B."""
    adapter: dict[str, LowRank] = {}
    for m, rank in ranks.items():
        A = state.A[m]
        x = LowRank(torch.zeros((state.shapes[m][0], A.shape[0]), dtype=A.dtype), A)
        adapter[m] = first(x, rank, seed=state.seed, module=m, round=0)
    return Download(adapter, {}, ClientRule(send=("A",), keep=("B",)))


def delta(state: State) -> Mapping[str, LowRank]:
    return {}


def fedsa() -> Method:
    return Method(init, aggregate, distribute, delta, personal=True)


register("fedsa", fedsa, paper="2410.01463", summary="A is averaged, B stays with its client: a personal model each")
