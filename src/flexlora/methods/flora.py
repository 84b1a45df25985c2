"""FLoRA (arXiv 2409.05976): updates are stacked, B = [B_1 … B_K], A = [p_1 A_1; …], and merged into the base.

Exact: the base delta grows by Σ p_i ΔW_i, and each round starts with a fresh adapter. The download grows with Σ r_i;
past min(d_out, d_in) the base delta is compressed without loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from flexlora import lowrank
from flexlora.cores import each
from flexlora.methods.base import register
from flexlora.methods.factors import compress, received
from flexlora.types import ClientRule, ClientUpdate, Download, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    base: Mapping[str, LowRank]
    """The base delta since the original base."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, dict(shapes), {m: lowrank.empty(*shape) for m, shape in shapes.items()})


def mean_deltas(shapes: Shapes, updates: Iterable[ClientUpdate]) -> dict[str, lowrank.Sum]:
    """Running sums of the delta weights, for the modules that somebody brought."""
    sums: dict[str, lowrank.Sum] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            sums.setdefault(module, lowrank.Sum(*shapes[module])).add(x, update.weight)
    return sums


def grown(base: LowRank, step: LowRank) -> LowRank:
    """The base delta with one more step, at rank at most min(d_out, d_in)."""
    return compress(lowrank.stack([step, base], [1.0, 1.0]))


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    sums = mean_deltas(state.shapes, updates)
    modules = list(sums)
    bases = each(lambda m: grown(state.base[m], sums.pop(m).mean()), modules)
    base = {**state.base, **dict(zip(modules, bases, strict=True))}
    return State(state.round + 1, state.seed, state.shapes, base)


def fresh_adapter(shapes: Shapes, seed: int, round: int, ranks: Ranks) -> dict[str, LowRank]:
    """B zero and fresh rows of A: what a client starts from where the base carries all that was learnt."""
    return {
        m: LowRank(torch.zeros((shapes[m][0], r)), lowrank.fresh_rows(r, shapes[m][1], seed, m, round))
        for m, r in ranks.items()
    }


def distribute(state: State, ranks: Ranks) -> Download:
    """The base delta of all modules, also of those that the client does not adapt: it is the global model."""
    base = {m: x for m, x in state.base.items() if x.A.shape[0]}
    return Download(fresh_adapter(state.shapes, state.seed, state.round, ranks), base, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return state.base


def flora() -> Method:
    return Method(init, aggregate, distribute, delta)


register(
    "flora", flora, paper="2409.05976", summary="the stack of all updates goes into the base; fresh adapters each round"
)
