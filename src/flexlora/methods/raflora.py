"""raFLoRA (arXiv 2602.13486): rank partitions, each averaged over the clients that hold it.

W = Σ_h Σ_{i: r_i ≥ r⁽ʰ⁾} (p_i / Σ_{k: r_k ≥ r⁽ʰ⁾} p_k) B_i[:, I_h] A_i[I_h, :], where r⁽¹⁾ < r⁽²⁾ < … are the
distinct ranks and I_h = (r⁽ʰ⁻¹⁾, r⁽ʰ⁾]. A rule on columns: they must arrive as trained. A partition that nobody holds
this round keeps its value; what W holds beyond the largest level is dropped with the next round.

With levels the sums stream, one running sum per partition; without them a round's updates are held until all ranks
are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flexlora import lowrank
from flexlora.cores import each
from flexlora.lowrank import Matrix, Spectrum
from flexlora.methods import flexlora
from flexlora.methods.base import register
from flexlora.methods.factors import combine, received
from flexlora.types import ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    levels: Mapping[str, tuple[int, ...]]
    """Distinct ranks by module, ascending; empty where they are not known."""
    whole: flexlora.State
    """W, its norm and its leading directions, as flexlora keeps them."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    known = {m: tuple(sorted({ranks[m] for ranks in levels if m in ranks})) for m in shapes}
    return State(0, seed, known, flexlora.init(shapes, seed, levels))


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
    before = state.whole
    partitions = {m: Partitions(before.shapes[m], levels) for m, levels in state.levels.items() if levels}
    held: dict[str, list[tuple[LowRank, float]]] = {m: [] for m, levels in state.levels.items() if not levels}
    brought: dict[str, None] = {}
    for update, adapter in received(updates):
        for module, x in adapter.items():
            brought[module] = None
            if module in held:
                held[module].append((x, update.weight))
            else:
                check_level(state, module, x.A.shape[0])
                partitions[module].add(x, update.weight)
    for module, terms in held.items():
        partitions[module] = Partitions(before.shapes[module], sorted({x.A.shape[0] for x, _ in terms}))
        for x, weight in terms:
            partitions[module].add(x, weight)

    def finish(module: str) -> tuple[Matrix, float, Spectrum]:
        W = partitions.pop(module).mean(before.spectrum[module])
        return W, float(lowrank.norm(W)), lowrank.svd(W, before.levels.get(module))

    done = dict(zip(brought, each(finish, brought), strict=True))
    whole = replace(
        before,
        round=before.round + 1,
        W={**before.W, **{m: x for m, (x, _, _) in done.items()}},
        norm={**before.norm, **{m: x for m, (_, x, _) in done.items()}},
        spectrum={**before.spectrum, **{m: x for m, (_, _, x) in done.items()}},
    )
    return State(state.round + 1, state.seed, state.levels, whole)


def distribute(state: State, ranks: Ranks) -> Download:
    for module, rank in ranks.items():
        check_level(state, module, rank)
    return flexlora.distribute(state.whole, ranks)


def delta(state: State) -> Mapping[str, LowRank]:
    return flexlora.delta(state.whole)


def raflora() -> Method:
    return Method(init, aggregate, distribute, delta, fixed_ranks=True)


register(
    "raflora",
    raflora,
    paper="2602.13486",
    summary="each partition of the ranks is averaged over the clients that hold it; then as flexlora",
)
