"""RoLoRA (arXiv 2409.02346): odd rounds train and average B with A frozen, even rounds the reverse; exact each round.

At unequal ranks as ffa: the zero-padded sum is exact but collapses, with `increments` the changes are averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from flexlora.methods.base import register
from flexlora.methods.ffa import State, aggregate_one, at_rank, init
from flexlora.types import ClientRule, ClientUpdate, Download, LowRank, Method, Ranks


def trained_part(state: State) -> Literal["A", "B"]:
    """The factor that the coming round trains: B in the first, third, … round."""
    return "B" if state.round % 2 == 0 else "A"


def distribute(state: State, ranks: Ranks) -> Download:
    part = trained_part(state)
    adapter = {m: at_rank(state, m, r, state.round) for m, r in ranks.items()}
    return Download(adapter, {}, ClientRule(train=(part,), send=(part,)))


def delta(state: State) -> Mapping[str, LowRank]:
    return state.adapter


def rolora(increments: bool = False) -> Method:
    """increments: average what changed in the trained factor: at unequal ranks no direction collapses."""

    def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
        return aggregate_one(state, updates, trained_part(state), increments=increments, fresh=state.round)

    def start(state: State, updates: Iterable[ClientUpdate]) -> State:
        return replace(aggregate(state, updates), round=0)  # the first round trains B all the same

    return Method(init, aggregate, distribute, delta, start=start)


register(
    "rolora", rolora, paper="2409.02346", summary="odd rounds train and average B, even rounds A: exact each round"
)
