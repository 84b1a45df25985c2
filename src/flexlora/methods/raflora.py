"""raFLoRA (arXiv 2602.13486): rank partitions, each averaged over the clients that hold it.

W = Σ_h Σ_{i: r_i ≥ r⁽ʰ⁾} (p_i / Σ_{k: r_k ≥ r⁽ʰ⁾} p_k) B_i[:, I_h] A_i[I_h, :], where r⁽¹⁾ < r⁽²⁾ < … are the
distinct ranks and I_h = (r⁽ʰ⁻¹⁾, r⁽ʰ⁾]. A rule on columns: they must arrive as trained. A partition that nobody holds
this round keeps its value; beyond the largest level it is dropped.

With levels the sums stream, one running sum per partition; without them a round's updates are held until all ranks
are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from flexlora import lowrank
from flexlora.lowrank import Decomposed, Matrix, Spectrum
from flexlora.methods.base import register
from flexlora.methods.factors import combine, received
from flexlora.types import ClientRule, ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    shapes: Shapes
    levels: Mapping[str, tuple[int, ...]]
    """Distinct ranks by module, ascending; empty where they are not known."""
    spectrum: Mapping[str, Spectrum]
    """W, up to the largest level."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    known = {m: tuple(sorted({ranks[m] for ranks in levels if m in ranks})) for m in shapes}
    return State(0, seed, dict(shapes), known, {m: lowrank.svd(lowrank.empty(*s)) for m, s in shapes.items()})


def check_level(state: State, module: str, rank: int) -> None:
    if state.levels[module] and rank not in state.levels[module]:
        known = ", ".join(map(str, state.levels[module]))
        raise FlexLoraError(
            f"method raflora averages by rank levels: rank {rank} of {module} is not one of {known}; "
            "use one of them or --method flexlora-carry"
        )


class Partitions:
    """The running sums of one module, one per partition of the ranks."""

    def __init__(self, shape: tuple[int, int], levels: Iterable[int]) -> None:
        self.edges = [0, *levels]
        self.sums = [lowrank.Sum(*shape) for _ in self.edges[1:]]

    def add(self, x: LowRank, weight: float) -> None:
        for low, high, total in zip(self.edges, self.edges[1:], self.sums, strict=False):
            if high <= x.A.shape[0]:
                total.add(LowRank(x.B[:, low:high], x.A[low:high]), weight)

    def mean(self, before: Spectrum) -> Matrix:
        """W: partitions that somebody holds are averaged, those beyond keep the directions they had `before`."""
        held = [total for total in self.sums if total.total]
        top = self.edges[len(held)]
        U, S, Vt = before
        kept = LowRank(U[:, top:] * S[top:], Vt[top:])
        return combine([(kept, 1.0), *((total.over(total.total), 1.0) for total in held)])


def aggregate(state: State, updates: Iterable[ClientUpdate]) -> State:
    partitions = {m: Partitions(state.shapes[m], levels) for m, levels in state.levels.items() if levels}
    held: dict[str, list[tuple[LowRank, float]]] = {m: [] for m, levels in state.levels.items() if not levels}
    brought: set[str] = set()
    for update, adapter in received(updates):
        for module, x in adapter.items():
            brought.add(module)
            if module in held:
                held[module].append((x, update.weight))
            else:
                check_level(state, module, x.A.shape[0])
                partitions[module].add(x, update.weight)
    for module, terms in held.items():
        partitions[module] = Partitions(state.shapes[module], sorted({x.A.shape[0] for x, _ in terms}))
        for x, weight in terms:
            partitions[module].add(x, weight)

    def finish(module: str) -> Spectrum:
        if module not in brought:
            return state.spectrum[module]
        return lowrank.svd(partitions.pop(module).mean(state.spectrum[module]), max(state.levels[module], default=None))

    spectrum = dict(zip(state.shapes, lowrank.each(finish, state.shapes), strict=True))
    return State(state.round + 1, state.seed, state.shapes, state.levels, spectrum)


def distribute(state: State, ranks: Ranks) -> Download:
    adapter: dict[str, LowRank] = {}
    for m, r in ranks.items():
        check_level(state, m, r)
        adapter[m] = lowrank.at_rank(state.spectrum[m], r, seed=state.seed, module=m, round=state.round)
    return Download(adapter, {}, ClientRule())


def delta(state: State) -> Mapping[str, LowRank]:
    return {
        m: Decomposed.of(LowRank(s.U * s.S, s.Vt), s, float(torch.linalg.vector_norm(s.S, dtype=torch.float64)))
        for m, s in state.spectrum.items()
    }


def raflora() -> Method:
    return Method(init, aggregate, distribute, delta)


register(
    "raflora",
    raflora,
    paper="2602.13486",
    summary="each partition of the ranks is averaged over the clients that hold it; then as flexlora",
)
