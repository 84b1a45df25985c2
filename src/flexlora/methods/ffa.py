"""FFA-LoRA (arXiv 2403.12313): A is frozen and shared, B = Σ p_i B_i; exact, and half the upload.

At unequal ranks clients hold the first r_i rows of the shared A. The zero-padded sum of B is still the exact mean of
the delta weights, but column j shrinks each round by the share of clients without it; with `increments` the changes
B_i − B_sent are averaged instead, which loses nothing and is the same at equal ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flexlora import lowrank
from flexlora.methods.base import register
from flexlora.methods.factors import add_padded, first, received, single
from flexlora.types import ClientRule, ClientUpdate, Download, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    adapter: Mapping[str, LowRank]
    """The global factors, at the largest rank that any client had so far."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, dict(shapes), {m: lowrank.empty(*shape) for m, shape in shapes.items()})


class OneFactor:
    """The mean of the trained factor of one module, and the frozen one as the clients held it."""

    def __init__(self, dim: int) -> None:
        """dim: place of the rank in the trained factor, 0 in A and 1 in B."""
        self.dim = dim
        self.trained: Tensor | None = None
        self.frozen: Tensor | None = None
        self.weight = 0.0

    def add(self, trained: Tensor, frozen: Tensor, weight: float) -> None:
        self.trained = add_padded(self.trained, trained, weight, self.dim)
        # All clients froze rows of one and the same factor: the longest is what the product is exact for,
        # also where a cast on the way changed it.
        if self.frozen is None or frozen.shape[1 - self.dim] > self.frozen.shape[1 - self.dim]:
            self.frozen = frozen
        self.weight += weight

    def mean(self) -> Tensor:
        assert self.trained is not None
        return self.trained / self.weight


def pad(x: Tensor, rank: int, dim: int) -> Tensor:
    """x with zeros along `dim` up to `rank`."""
    shape = list(x.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def aggregate_one(
    state: State, updates: Iterable[ClientUpdate], part: Literal["A", "B"], *, increments: bool, fresh: int
) -> State:
    """One round in which only `part` was trained. fresh: the round that names the fresh rows of A."""
    dim = 0 if part == "A" else 1
    parts: dict[str, OneFactor] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            trained = getattr(x, part)
            if increments:
                sent = update.sent[module] if update.sent is not None else at_rank(state, module, x.A.shape[0], fresh)
                assert isinstance(sent, LowRank)
                trained = trained - getattr(single(sent), part)
            frozen = x.B if part == "A" else x.A
            parts.setdefault(module, OneFactor(dim)).add(trained, frozen, update.weight)
    new: dict[str, LowRank] = {}
    for module, one in parts.items():
        assert one.frozen is not None
        came = one.frozen.shape[1 - dim]
        rank = max(came, state.adapter[module].A.shape[0])
        before = at_rank(state, module, rank, fresh)
        trained = pad(one.mean(), rank, dim)
        if increments:
            trained = trained + getattr(before, part)
        kept = (before.B if part == "A" else before.A).narrow(1 - dim, came, rank - came)
        frozen = torch.cat([one.frozen, kept], 1 - dim)
        new[module] = LowRank(frozen, trained) if part == "A" else LowRank(trained, frozen)
    return State(state.round + 1, state.seed, state.shapes, {**state.adapter, **new})


def at_rank(state: State, module: str, rank: int, fresh: int) -> LowRank:
    return first(state.adapter[module], rank, seed=state.seed, module=module, round=fresh)


def distribute(state: State, ranks: Ranks) -> Download:
    adapter = {m: at_rank(state, m, r, 0) for m, r in ranks.items()}
    return Download(adapter, {}, ClientRule(train=("B",), send=("B",)))


def delta(state: State) -> Mapping[str, LowRank]:
    return state.adapter


def ffa(increments: bool = False) -> Method:
    """increments: average B_i − B_sent instead of B_i: at unequal ranks no direction collapses."""
    return Method(init, partial(aggregate_one, part="B", increments=increments, fresh=0), distribute, delta)


register("ffa", ffa, paper="2403.12313", summary="A frozen and shared, mean of B: exact, half the upload")
