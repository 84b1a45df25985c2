"""FlexLoRA with carry-over (ours): W ← W + η Σ_i p_i ((α/r_i) B_i A_i − P_{r_i}(W)).

A client changes only what it was sent, so that only its increment over what it was sent counts. Without training W
stays W, where FlexLoRA (arXiv 2402.11505) loses direction j by the factor q_j = Σ p_i over clients of rank ≥ j; with
η = 1 and full ranks the two are the same. Server momentum: M ← μ M + increment, W ← W + η M.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flexlora import lowrank
from flexlora.cores import each
from flexlora.lowrank import Matrix, Spectrum
from flexlora.methods import flexlora
from flexlora.methods.base import register
from flexlora.methods.factors import add_padded, combine, received, single
from flexlora.types import ClientUpdate, Download, FlexLoraError, Levels, LowRank, Method, Ranks, Shapes


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    whole: flexlora.State
    """W, its norm and its leading directions, as flexlora keeps them; here W's rank grows."""
    momentum: Mapping[str, LowRank | Tensor]
    """M by module; empty without server momentum."""
    dropped: Mapping[str, float]
    """Share of ‖W‖² that keep_rank dropped in the last round, by module; empty without keep_rank."""


def init(shapes: Shapes, seed: int, levels: Levels = ()) -> State:
    return State(0, seed, flexlora.init(shapes, seed, levels), {}, {})


class SentMean:
    """Σ p_i sent_i of one module. What was sent is nearly always a prefix of one factor pair: that costs one term."""

    def __init__(self) -> None:
        self.longest: LowRank | None = None
        self.holders: Tensor | None = None
        self.others: list[tuple[LowRank, float]] = []

    def add(self, x: LowRank, weight: float) -> None:
        longer = self.longest is None or x.A.shape[0] > self.longest.A.shape[0]
        long, short = (x, self.longest) if longer else (self.longest, x)
        assert long is not None
        r = 0 if short is None else short.A.shape[0]
        if short is None or (torch.equal(long.A[:r], short.A) and torch.equal(long.B[:, :r], short.B)):
            self.longest = long
            self.holders = add_padded(self.holders, x.A.new_ones(x.A.shape[0], dtype=torch.float64), weight, 0)
        else:
            self.others.append((x, weight))

    def terms(self, total: float) -> list[LowRank]:
        """Factor pairs whose sum is Σ p_i sent_i."""
        assert self.longest is not None
        assert self.holders is not None
        q = (self.holders / (total or 1.0)).to(self.longest.B)
        return [
            LowRank(self.longest.B * q, self.longest.A),
            *(LowRank(x.B * (w / (total or 1.0)), x.A) for x, w in self.others),
        ]


def settle(x: Matrix, largest: int | None, keep_rank: int | None) -> tuple[Matrix, Spectrum, float]:
    """W, its leading directions, and the share of ‖W‖² that keep_rank dropped."""
    if keep_rank is not None:
        spectrum = lowrank.svd(x, keep_rank)
        return LowRank(spectrum.U * spectrum.S, spectrum.Vt), spectrum, lowrank.energy_beyond(x, [keep_rank])[0]
    if isinstance(x, Tensor):
        return x, lowrank.svd(x, largest), 0.0
    U, S, Vt = lowrank.svd(x)
    # Dead directions go: otherwise the rank would grow in rounds that bring nothing new.
    live = int((lowrank.DEAD * S[0] < S).sum()) if len(S) else 0
    k = live if largest is None else min(live, largest)
    return LowRank(U[:, :live] * S[:live], Vt[:live]), Spectrum(U[:, :k], S[:k], Vt[:k]), 0.0


def aggregate(
    state: State, updates: Iterable[ClientUpdate], *, eta: float, momentum: float, keep_rank: int | None
) -> State:
    before = state.whole
    sums: dict[str, lowrank.Sum] = {}
    sents: dict[str, SentMean] = {}
    for update, adapter in received(updates):
        sent = update.sent
        if sent is None:
            sent = distribute(state, {m: x.A.shape[0] for m, x in adapter.items()}).adapter
        for module, x in adapter.items():
            if module not in sums:
                sums[module], sents[module] = lowrank.Sum(*before.shapes[module]), SentMean()
            origin = sent[module]
            assert isinstance(origin, LowRank)
            sums[module].add(x, update.weight)
            sents[module].add(single(origin), update.weight)

    def finish(module: str) -> tuple[Matrix, Spectrum, float, Matrix | None]:
        total = sums.pop(module)
        step: list[tuple[Matrix, float]] = [(total.over(total.total), 1.0)]
        step += [(x, -1.0) for x in sents.pop(module).terms(total.total)]
        M = None
        if momentum:
            if module in state.momentum:
                step.append((state.momentum[module], momentum))
            M = combine(step)
            step = [(M, 1.0)]
        moved = combine([(before.W[module], 1.0), *((x, eta * w) for x, w in step)])
        kept = None if M is None else settle(M, None, keep_rank)[0]
        return *settle(moved, before.levels.get(module), keep_rank), kept

    modules = list(sums)
    done = dict(zip(modules, each(finish, modules), strict=True))
    W = {m: x for m, (x, _, _, _) in done.items()}
    whole = replace(
        before,
        round=before.round + 1,
        W={**before.W, **W},
        norm={**before.norm, **{m: float(lowrank.norm(x)) for m, x in W.items()}},
        spectrum={**before.spectrum, **{m: x for m, (_, x, _, _) in done.items()}},
    )
    M = {m: x for m, (_, _, _, x) in done.items() if x is not None}
    dropped = {m: x for m, (_, _, x, _) in done.items()} if keep_rank is not None else {}
    return State(state.round + 1, state.seed, whole, {**state.momentum, **M}, dropped)


def distribute(state: State, ranks: Ranks) -> Download:
    return flexlora.distribute(state.whole, ranks)


def delta(state: State) -> Mapping[str, LowRank]:
    return flexlora.delta(state.whole)


def figures(state: State) -> Mapping[str, float]:
    return {"dropped": sum(state.dropped.values()) / len(state.dropped)} if state.dropped else {}


def flexlora_carry(eta: float = 1.0, momentum: float = 0.0, keep_rank: int | None = None) -> Method:
    """eta: server step. momentum: μ in [0, 1). keep_rank: W is cut to this rank each round, and M before it is kept; what W
    lost stands in `State.dropped`, and its mean over the modules in metrics.jsonl.

    Raises FlexLoraError for a value out of range.
    """
    if eta <= 0:
        raise FlexLoraError(f"flexlora-carry: eta is {eta}, it must be above 0")
    if not 0 <= momentum < 1:
        raise FlexLoraError(f"flexlora-carry: momentum is {momentum}, it must be at least 0 and below 1")
    if keep_rank is not None and keep_rank < 1:
        raise FlexLoraError(f"flexlora-carry: keep_rank is {keep_rank}, it must be at least 1")

    def step(state: State, updates: Iterable[ClientUpdate]) -> State:
        return aggregate(state, updates, eta=eta, momentum=momentum, keep_rank=keep_rank)

    # What a run starts from is no increment: it counts in full, and leaves no momentum.
    start = partial(aggregate, eta=1.0, momentum=0.0, keep_rank=keep_rank)
    return Method(init, step, distribute, delta, start=start, figures=figures)


register(
    "flexlora-carry",
    flexlora_carry,
    paper="ours",
    summary="add each client's increment over what it was sent: no rank collapse; eta, server momentum, keep_rank",
)
