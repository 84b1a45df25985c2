"""HetLoRA (arXiv 2401.06432): zero-padded factors, averaged with weights by norm; truncation; self-pruning.

A = Σ w_i pad(A_i), B likewise, w_i = ‖ΔW_i‖_F / Σ ‖ΔW‖_F by module (section 3.3). Clients get the first r_i rows and
columns. Self-pruning happens at the client (`ClientRule.prune`): the penalty λ ‖B[:, ⌊γr⌋:]‖_F ‖A[⌊γr⌋:, :]‖_F joins
the loss, and where that product shrank r becomes max(r_min, ⌊γr⌋).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexlora import lowrank
from flexlora.methods.base import register
from flexlora.methods.factors import PaddedMean, first, received
from flexlora.types import ClientRule, ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    adapter: Mapping[str, LowRank]
    """Mean factors, at the largest rank of the last round's clients."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, dict(shapes), {m: lowrank.empty(*shape) for m, shape in shapes.items()})


def scaling(update: ClientUpdate, module: str) -> float:
    if module not in update.scaling:
        raise FlexLoraError(
            f"handle_alpha needs alpha/r of {module}, which client {update.client} did not say: set handle_alpha false"
        )
    return update.scaling[module]


def aggregate(state: State, updates: Iterable[ClientUpdate], *, handle_alpha: bool) -> State:
    by_norm: dict[str, PaddedMean] = {}
    by_examples: dict[str, PaddedMean] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            root = scaling(update, module) ** 0.5 if handle_alpha else 1.0
            weight = float(lowrank.norm(x))
            # Norms that are all zero say nothing: then the example counts are the weights.
            if weight:
                by_norm.setdefault(module, PaddedMean()).add(x, weight, root)
            elif module not in by_norm:
                by_examples.setdefault(module, PaddedMean()).add(x, update.weight, root)
    means = {m: mean.mean() for m, mean in {**by_examples, **by_norm}.items()}
    return State(state.round + 1, state.seed, state.shapes, {**state.adapter, **means})


def delta(state: State) -> Mapping[str, LowRank]:
    return state.adapter


def hetlora(
    handle_alpha: bool = False, prune_lambda: float = 1e-3, prune_gamma: float = 0.99, min_rank: int = 1
) -> Method:
    """handle_alpha: √(α/r) goes into both factors before averaging. prune_lambda: 0 turns self-pruning off.

    prune_gamma: share of a client's rank that stays when it prunes, in (0, 1]. min_rank: no client falls below it.
    Raises FlexLoraError for a value out of range.
    """
    if prune_lambda < 0:
        raise FlexLoraError(f"hetlora: prune_lambda is {prune_lambda}, it must be at least 0 (0: no pruning)")
    if not 0 < prune_gamma <= 1:
        raise FlexLoraError(f"hetlora: prune_gamma is {prune_gamma}, it must be above 0 and at most 1")
    if min_rank < 1:
        raise FlexLoraError(f"hetlora: min_rank is {min_rank}, it must be at least 1")
    rule = ClientRule(prune=(prune_lambda, prune_gamma, min_rank) if prune_lambda else None)

    def step(state: State, updates: Iterable[ClientUpdate]) -> State:
        return aggregate(state, updates, handle_alpha=handle_alpha)

    def distribute(state: State, ranks: Ranks) -> Download:
        adapter = {
            m: first(state.adapter[m], r, seed=state.seed, module=m, round=state.round) for m, r in ranks.items()
        }
        return Download(adapter, {}, rule)

    return Method(init, step, distribute, delta)


register(
    "hetlora",
    hetlora,
    paper="2401.06432",
    summary="zero-padded factors averaged with weights by norm, cut to each rank; clients prune their own ranks",
)
