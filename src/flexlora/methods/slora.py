"""SLoRA (arXiv 2308.06522): some rounds of sparse fine-tuning, then LoRA starts from the SVD of what they learnt.

Stage 1: clients of rank r train k = min(r (d_out + d_in), d_out · d_in) entries of each target matrix's delta weight
under one fixed random mask, the server takes the mean Σ p_i δ_i of the sparse deltas. Masks are prefixes of one
permutation per (seed, module): the same in all rounds, a smaller budget's inside a larger one's. Stage 2: the base is
W_0 again, and the method named by `then` starts from the accumulated delta: clients get its best rank-r_i
approximation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexlora import lowrank
from flexlora.methods.base import get_method, register, started
from flexlora.methods.factors import add_padded
from flexlora.randomness import derive
from flexlora.types import (
    ClientRule,
    ClientUpdate,
    Download,
    FlexLoraError,
    Levels,
    LowRank,
    Method,
    Ranks,
    Shapes,
    Sparse,
)

SUCCESSORS = ("fedavg", "flexlora", "flexlora-carry", "raflora", "hetlora", "rbla")
"""Methods that can start from a given delta weight: each gives back the update of a single client as it is."""

FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    largest: Mapping[str, int]
    """The largest rank that may be asked for, by module; a module is missing where it is not known."""
    values: Mapping[str, Tensor]
    """Stage 1: the sparse delta along the permutation, at the largest budget of the last round; empty in stage 2."""
    start: Mapping[str, LowRank]
    """Stage 2: modules whose SVD still waits for its first update (fedavg takes the rank from there)."""
    inner: Any
    """The successor's state; in stage 1 its initial one."""


_prefixes: dict[tuple[int, str, int], Tensor] = {}


def mask(seed: int, module: str, shape: tuple[int, int], k: int) -> Tensor:
    """(k,) int64: the first k entries, row by row, of the permutation of d_out · d_in that (seed, module) name.

    A pure function that server and client compute for themselves, the same on every machine: no generator of a library
    takes part, only integer arithmetic. k distinct numbers in [0, d_out · d_in). The longest prefix of each module is
    remembered; callers must not change what they get.
    """
    name = (seed, module, shape[0] * shape[1])
    if name not in _prefixes or len(_prefixes[name]) < k:
        _prefixes[name] = _permutation(derive(seed, "mask", module), shape[0] * shape[1], k)
    return _prefixes[name][:k]


def _permutation(key: int, size: int, k: int) -> Tensor:
    """The first k values of a permutation of range(size): a Feistel network on 2·half bits, walked until inside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [derive(key, "feistel", i) & 0x3FFFFFFF for i in range(FEISTEL_ROUNDS)]

    def scramble(x: Tensor) -> Tensor:
        left, right = x >> half, x & low
        for word in keys:
            # 31-bit multipliers on numbers below 2^30: no product leaves int64.
            mixed = ((right ^ word) & 0x3FFFFFFF) * 0x45D9F3B & 0x3FFFFFFF
            mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0x3FFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 13)) & low)
        return left << half | right

    found = scramble(torch.arange(k))
    outside = (found >= size).nonzero().squeeze(1)
    while len(outside):
        found[outside] = scramble(found[outside])
        outside = outside[found[outside] >= size]
    return found


def budget(shape: tuple[int, int], rank: int) -> int:
    """Entries that a client of this rank trains in a module: as many as its factors would have."""
    return min(rank * (shape[0] + shape[1]), shape[0] * shape[1])


def dense(state: State, module: str) -> Tensor:
    """The accumulated delta weight (d_out, d_in) of stage 1."""
    shape, values = state.shapes[module], state.values[module]
    flat = values.new_zeros(shape[0] * shape[1])
    flat[mask(state.seed, module, shape, len(values))] = values
    return flat.reshape(shape)


def average(state: State, updates: Iterable[ClientUpdate]) -> State:
    """Stage 1: Σ p_i δ_i, by module over the clients that have it.

    Entries outside a client's mask count as zero: at unequal budgets those that few clients train shrink, as directions do in
    flexlora, and are gone after a round without their holders.
    """
    sums: dict[str, Tensor] = {}
    totals: dict[str, float] = {}
    came = False
    for update in updates:
        came = True
        if not update.weight:
            continue
        for module, x in update.adapter.items():
            if isinstance(x, LowRank):
                raise ValueError(f"client {update.client} sent factors for {module} in slora's sparse stage")
            sums[module] = add_padded(sums.get(module), x.values.float(), update.weight, 0)
            totals[module] = totals.get(module, 0.0) + update.weight
    if not came:
        raise ValueError("aggregate needs at least one client update")
    values = {m: x / totals[m] for m, x in sums.items()}
    return replace(state, round=state.round + 1, values={**state.values, **values})


def begin(state: State, then: str, successor: Method) -> State:
    """The switch to stage 2: the successor, called `then`, gets the accumulated delta as if one client had trained it."""
    start: dict[str, LowRank] = {}
    for module, values in state.values.items():
        if not values.any():
            continue
        # flexlora and carry keep W whole; the others keep directions, and take no more than can be asked for.
        if then in ("flexlora", "flexlora-carry"):
            start[module] = lowrank.factored(dense(state, module))
        else:
            start[module] = lowrank.truncate(dense(state, module), state.largest.get(module, min(state.shapes[module])))
    if then == "fedavg":
        return replace(state, values={}, start=start)
    return replace(state, values={}, inner=started(successor, state.inner, start) if start else state.inner)


def slora(then: str = "flexlora", sparse_rounds: int = 5, **options: Any) -> Method:
    """then: the method of stage 2, one of `SUCCESSORS`. sparse_rounds: rounds of stage 1. options: of `then`.

    Raises FlexLoraError for another successor, by name, and for options that it does not have.
    """
    if then not in SUCCESSORS:
        raise FlexLoraError(
            f"slora cannot be followed by {then!r}, which does not start from a given delta weight: "
            f"choose one of {', '.join(SUCCESSORS)}"
        )
    if sparse_rounds < 1:
        raise FlexLoraError(f"slora: sparse_rounds is {sparse_rounds}, it must be at least 1")
    successor = get_method(then, **options)

    def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
        largest = {m: max(r[m] for r in levels if m in r) for m in shapes if any(m in r for r in levels)}
        values = {m: torch.zeros(0) for m in shapes}
        return State(0, seed, dict(shapes), largest, values, {}, successor.init(shapes, seed, levels))

    def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
        if state.round < sparse_rounds:
            state = average(state, updates)
            return begin(state, then, successor) if state.round == sparse_rounds else state
        brought: set[str] = set()

        def noted() -> Iterable[ClientUpdate]:
            for update in updates:
                if update.weight:
                    brought.update(update.adapter)
                yield update

        inner = successor.aggregate(state.inner, noted())
        start = {m: x for m, x in state.start.items() if m not in brought}
        return replace(state, round=state.round + 1, start=start, inner=inner)

    def distribute(state: State, ranks: Ranks) -> Download:
        if state.round < sparse_rounds:
            adapter: dict[str, Sparse] = {}
            for m, rank in ranks.items():
                shape, values = state.shapes[m], state.values[m]
                k = budget(shape, rank)
                given = torch.cat([values[:k], values.new_zeros(max(0, k - len(values)))])
                adapter[m] = Sparse(given, mask(state.seed, m, shape, k), shape)
            return Download(adapter, {}, ClientRule(train=("values",), send=("values",)))
        download = successor.distribute(state.inner, ranks)
        waiting = {
            m: lowrank.at_rank(lowrank.svd(x), ranks[m], seed=state.seed, module=m, round=state.round)
            for m, x in state.start.items()
            if m in ranks
        }
        return replace(download, adapter={**download.adapter, **waiting})

    def delta(state: State) -> Mapping[str, LowRank]:
        if state.round < sparse_rounds:
            return {m: lowrank.factored(dense(state, m)) for m in state.shapes}
        found = successor.delta(state.inner)  # may make its modules one by one, as they are asked for
        return {**found, **state.start} if state.start else found

    def figures(state: State) -> Mapping[str, float]:
        return successor.figures(state.inner) if successor.figures and state.round > sparse_rounds else {}

    return replace(
        successor, init=init, aggregate=aggregate, distribute=distribute, delta=delta, start=None, figures=figures
    )


register(
    "slora",
    slora,
    paper="2308.06522",
    summary="a sparse stage under one fixed mask, whose SVD starts a second stage with another method (then)",
)
