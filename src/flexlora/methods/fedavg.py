"""FedAvg of LoRA factors, as in FedIT (arXiv 2305.05644): A = Σ p_i A_i, B = Σ p_i B_i, equal ranks only.

Inexact by design: the mean of products is not the product of means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from flexlora import lowrank
from flexlora.methods.base import register
from flexlora.methods.factors import received
from flexlora.types import ClientRule, ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    adapter: Mapping[str, LowRank]
    """Mean factors; a module is missing until the first update brings it."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, dict(shapes), {})


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    means: dict[str, LowRank] = {}
    totals: dict[str, float] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            if module not in means:
                means[module] = LowRank(x.B.clone(), x.A.clone())
                totals[module] = update.weight
                continue
            mean = means[module]
            if mean.A.shape != x.A.shape:
                raise FlexLoraError(
                    f"method fedavg needs equal ranks: client {update.client} has rank {x.A.shape[0]} in {module}, "
                    f"others {mean.A.shape[0]}; use --method flexlora"
                )
            # The running mean: exact for clients that agree, and no sum to overflow.
            totals[module] += update.weight
            share = update.weight / totals[module]
            mean.B.lerp_(x.B.to(mean.B), share)
            mean.A.lerp_(x.A.to(mean.A), share)
    return State(state.round + 1, state.seed, state.shapes, {**state.adapter, **means})


def distribute(state: State, ranks: Ranks) -> Download:
    adapter: dict[str, LowRank] = {}
    for module, rank in ranks.items():
        d_out, d_in = state.shapes[module]
        if module not in state.adapter:
            A = lowrank.fresh_rows(rank, d_in, state.seed, module, 0)
            adapter[module] = LowRank(torch.zeros((d_out, rank)), A)
        elif state.adapter[module].A.shape[0] == rank:
            adapter[module] = state.adapter[module]
        else:
            raise FlexLoraError(
                f"method fedavg needs equal ranks: {module} is at rank {state.adapter[module].A.shape[0]}, "
                f"rank {rank} is asked for; use --method flexlora"
            )
    return Download(adapter, {}, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return {m: state.adapter[m] if m in state.adapter else lowrank.empty(*s) for m, s in state.shapes.items()}


def fedavg() -> Method:
    return Method(init, aggregate, distribute, delta, equal_ranks=True)


register("fedavg", fedavg, paper="2305.05644", summary="mean of A and mean of B (FedIT); equal ranks only")
