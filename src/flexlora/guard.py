"""Checks on what a client sent, before anything is made of it; and what bounds its increment.

The increment of a client is what it changed, trained minus sent: with B = B₀ + dB and A = A₀ + dA,
B A − B₀ A₀ = dB A + B₀ dA. An increment that is too large is rejected or clipped. Clipping goes back along the straight
line from what was trained to what was sent, (B₀ + t dB, A₀ + t dA), to the t at which the norm is the bound: ranks stay,
and every column stays in its place, so that it is right for every method. Where one factor is frozen this is the usual
scaling of the increment.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexlora import lowrank
from flexlora.types import ClientFailure, ClientRule, ClientUpdate, LowRank, Sparse, TrainTask

MEMORY = 256
"""Norms of accepted increments that are remembered, of each kind of round."""

ROWS = 128
"""Rows of all increments of a module that stand side by side in memory, dense, when their inner products are taken."""

BOTH_FACTORS = ClientRule()

MARGIN = 1e-6
"""Relative room below a bound, so that rounding carries nothing beyond it."""


@dataclass(frozen=True)
class Limits:
    """What the server lets a client do."""

    max_examples: int | None = None
    """A weight above it is cut to it."""
    max_norm: float | None = None
    """Bound of an increment's norm in every round, and the only one in the first."""
    factor: float | None = None
    """Bound of an increment's norm in multiples of the median of those accepted in earlier rounds."""
    action: str = "reject"
    """reject or clip: what happens to an increment beyond its bound."""

    def bound(self, norms: Sequence[float]) -> float:
        """The largest norm that is let through; inf where there is none. norms: those accepted before."""
        bounds = [] if self.max_norm is None else [self.max_norm]
        # A median of zero (rounds that changed nothing) says nothing about this one.
        if self.factor is not None and norms and statistics.median(norms) > 0:
            bounds.append(self.factor * statistics.median(norms))
        return min(bounds, default=math.inf)


def kind(rule: ClientRule) -> str:
    """Rounds whose increments can be compared: those that train the same parts."""
    return "+".join(rule.train)


# --- checks ------------------------------------------------------------------------------------------------------------


def examine(
    update: ClientUpdate, task: TrainTask, *, norms: Sequence[float] = (), limits: Limits = Limits()
) -> ClientUpdate | ClientFailure:
    """The update, with what was sent, its weight capped and its increment within bounds, or the reason of its rejection.

    Looks at tensors only after their shapes, and allocates nothing from what the client claims.
    """
    reason = next(objections(update, task), None)
    if reason is not None:
        return ClientFailure(task.client, f"rejected: {reason}")
    weight = update.weight if limits.max_examples is None else min(update.weight, float(limits.max_examples))
    metrics = {name: value for name, value in update.metrics.items() if math.isfinite(value)}
    update = replace(update, sent=task.download.adapter, weight=weight, metrics=metrics)
    bound = limits.bound(norms)
    norm = increment_norm(update, task.download.rule)
    if norm <= bound:
        return update
    if not math.isfinite(norm):
        return ClientFailure(task.client, "rejected: its increment is not finite")
    if limits.action == "reject":
        return ClientFailure(task.client, f"rejected: its increment has norm {norm:.3g}, at most {bound:.3g} is let in")
    return clipped(update, bound, task.download.rule)


def objections(update: ClientUpdate, task: TrainTask) -> Iterator[str]:
    """What is wrong with an update as it came in, one line each."""
    sent = task.download.adapter
    if update.round is not None and update.round != task.round:
        yield f"it was trained for round {update.round}, this is round {task.round}"
    if task.base and update.base is not None and update.base != task.base:
        yield "it was trained on another base model"
    if set(update.adapter) != set(sent):
        yield "other modules than it was sent"
        return
    for module, x in update.adapter.items():
        yield from _misfits(module, x, sent[module])
    if not 0 < update.weight < math.inf:
        yield f"weight {update.weight} is not a positive number"
    for name in ("examples", "bytes_up", "bytes_down"):
        if not 0 <= update.metrics.get(name, 0) < math.inf:
            yield f"{name} is {update.metrics[name]}"


def _misfits(module: str, x: LowRank | Sparse, origin: LowRank | Sparse) -> Iterator[str]:
    if isinstance(x, LowRank) and isinstance(origin, LowRank):
        rank = x.A.shape[0] if x.A.dim() == 2 else -1
        fits = (
            0 <= rank <= origin.A.shape[0]
            and x.A.shape == (rank, origin.A.shape[1])
            and x.B.shape == (origin.B.shape[0], rank)
        )
        if not fits:
            yield f"{module} has shapes {tuple(x.B.shape)} and {tuple(x.A.shape)}, not those of its assignment"
        tensors: tuple[tuple[Tensor, Tensor], ...] = ((x.B, origin.B), (x.A, origin.A))
    elif isinstance(x, Sparse) and isinstance(origin, Sparse):
        if x.values.shape != origin.values.shape or not torch.equal(x.index, origin.index):
            yield f"{module} has other places than it was sent, or another number of them"
        tensors = ((x.values, origin.values),)
    else:
        yield f"{module} has another form than it was sent"
        return
    for tensor, like in tensors:
        if tensor.dtype != like.dtype:
            yield f"{module} has numbers of type {tensor.dtype}, not {like.dtype}"
        elif not bool(torch.isfinite(tensor).all()):
            yield f"{module} has values that are not finite"


# --- increments --------------------------------------------------------------------------------------------------------


def change(x: LowRank, origin: LowRank) -> tuple[Tensor, Tensor]:
    """(dB, dA) in float64 at the rank of what was sent: a direction that the client dropped became zero."""
    dB, dA = -origin.B.double(), -origin.A.double()
    rank = x.A.shape[0]
    dB[:, :rank] += x.B.double()
    dA[:rank] += x.A.double()
    return dB, dA


def pairs(update: ClientUpdate) -> Iterator[tuple[str, LowRank, LowRank]]:
    """(module, trained, sent) of every module that is low-rank."""
    assert update.sent is not None
    for module, x in update.adapter.items():
        origin = update.sent[module]
        if isinstance(x, LowRank) and isinstance(origin, LowRank):
            yield module, x, origin


def increment(update: ClientUpdate, t: float = 1.0) -> dict[str, LowRank]:
    """What the client changed, module by module, exact in factored form: t dB (A₀ + t dA) + B₀ t dA, float32.

    t below 1: the increment of the update that `clipped` makes.
    """
    changed = {}
    for module, x, origin in pairs(update):
        dB, dA = change(x, origin)
        B0, A0 = origin.B.double(), origin.A.double()
        B, A = torch.cat([t * dB, B0], 1), torch.cat([A0 + t * dA, t * dA])
        changed[module] = LowRank(B.float(), A.float())
    return changed


def part_squares(update: ClientUpdate, part: str) -> float:
    """Σ over modules of ‖dA‖² or ‖dB‖², of one factor alone."""
    place = 0 if part == "B" else 1
    return sum(float(change(x, origin)[place].square().sum()) for _, x, origin in pairs(update))


def measured(x: LowRank | Sparse, origin: LowRank | Sparse, rule: ClientRule = BOTH_FACTORS) -> LowRank:
    """One module's increment as a float64 matrix in factors, whose Frobenius norm and inner products are what counts.

    B A − B₀ A₀; where one factor stays at the client (fedsa) the change of the other, since the server knows no product;
    of a sparse module the change of its values, as a row.
    """
    if isinstance(x, Sparse) or isinstance(origin, Sparse):
        assert isinstance(x, Sparse)
        assert isinstance(origin, Sparse)
        values = (x.values.double() - origin.values.double())[None]
        return LowRank(torch.ones((1, 1), dtype=values.dtype), values)
    dB, dA = change(x, origin)
    if rule.keep:
        part = dB.T if rule.send == ("B",) else dA
        return LowRank(torch.eye(len(part), dtype=part.dtype), part)
    return LowRank(torch.cat([dB, origin.B.double()], 1), torch.cat([origin.A.double() + dA, dA]))


def increment_norm(update: ClientUpdate, rule: ClientRule = BOTH_FACTORS) -> float:
    """Frobenius norm of the increment over all modules, as `measured`."""
    assert update.sent is not None
    squares = [float(lowrank.norm(measured(x, update.sent[m], rule))) ** 2 for m, x in update.adapter.items()]
    return math.sqrt(sum(squares))


def share_within(update: ClientUpdate, bound: float, rule: ClientRule = BOTH_FACTORS) -> float:
    """A t in [0, 1] at which the line from what was sent to what was trained reaches `bound`.

    ‖t P + t² Q‖² with P = dB A₀ + B₀ dA and Q = dB dA is a quartic in t, solved by bisection.
    """
    norm = increment_norm(update, rule)
    if norm <= bound:
        return 1.0
    low_rank = list(pairs(update))
    if rule.keep or not low_rank:  # the change is linear in t
        return bound / norm * (1 - MARGIN)
    a, b, c = 0.0, 0.0, 0.0
    for _, x, origin in low_rank:
        dB, dA = change(x, origin)
        P = LowRank(torch.cat([dB, origin.B.double()], 1), torch.cat([origin.A.double(), dA]))
        Q = LowRank(dB, dA)
        a += lowrank.inner([P], [P])
        b += 2 * lowrank.inner([P], [Q])
        c += lowrank.inner([Q], [Q])
    low, high = 0.0, 1.0  # the norm at low is within the bound, at high beyond it
    for _ in range(60):
        t = (low + high) / 2
        inside = t * t * (a + t * (b + t * c)) <= (bound * (1 - MARGIN)) ** 2
        low, high = (t, high) if inside else (low, t)
    return low


def clipped(update: ClientUpdate, bound: float, rule: ClientRule = BOTH_FACTORS) -> ClientUpdate:
    """The update, moved back towards what was sent until its increment has norm `bound` at most; as it is where it has."""
    t = share_within(update, bound, rule)
    if t == 1.0:
        return update
    assert update.sent is not None
    adapter: dict[str, LowRank | Sparse] = dict(update.adapter)
    for module, x, origin in pairs(update):
        dB, dA = change(x, origin)
        B, A = (origin.B.double() + t * dB).to(x.B.dtype), (origin.A.double() + t * dA).to(x.A.dtype)
        # A part that was not trained stays the very same tensor.
        adapter[module] = LowRank(B if bool(dB.any()) else origin.B, A if bool(dA.any()) else origin.A)
    for module, x in update.adapter.items():
        origin = update.sent[module]
        if isinstance(x, Sparse) and isinstance(origin, Sparse):
            adapter[module] = x._replace(values=torch.lerp(origin.values, x.values, t))
    return replace(update, adapter=adapter, metrics={**update.metrics, "clipped": t})


# --- what one client can do ---------------------------------------------------------------------------------------------


def moderate(norms: Mapping[int, float], weights: Mapping[int, float]) -> tuple[float, float]:
    """(bound of the increments' norms, cap of the weights) of a round with `robust`: the medians over its clients.

    While fewer than half of the clients lie, both stand between the smallest and the largest honest value.
    """
    return statistics.median(norms.values()), statistics.median(weights.values())


def gram(xs: Sequence[LowRank]) -> Tensor:
    """(n, n) Frobenius inner products of n matrices B_i A_i, smaller ones zero-padded; a block of rows at a time."""
    rows, columns = max(len(x.B) for x in xs), max(x.A.shape[1] for x in xs)
    total = torch.zeros((len(xs), len(xs)), dtype=torch.float64)
    for start in range(0, rows, ROWS):
        block = torch.zeros((len(xs), ROWS, columns), dtype=torch.float64)
        for i, x in enumerate(xs):
            part = x.B[start : start + ROWS].double()
            block[i, : len(part), : x.A.shape[1]] = part @ x.A.double()
        flat = block.flatten(1)
        total += flat @ flat.T
    return total


def geometric_median(gram: Tensor, weights: Sequence[float], steps: int = 50) -> list[float]:
    """Weights, summing to 1, whose weighted mean of n points is their geometric median; gram: (n, n) inner products.

    Smoothed Weiszfeld iteration of RFA (arXiv 1912.13445, algorithm 2): β_i ∝ α_i / max(ν, ‖x_i − z‖), z = Σ β_i x_i,
    where ‖x_i − z‖² = G_ii − 2 (G β)_i + βᵀ G β needs inner products alone.
    """
    alpha = torch.tensor(weights, dtype=torch.float64)
    alpha /= alpha.sum()
    beta = alpha
    smallest = 1e-6 * float(gram.diagonal().median().sqrt())  # ν
    for _ in range(steps):
        squares = gram.diagonal() - 2 * gram @ beta + beta @ gram @ beta
        beta = alpha / squares.clamp(min=0).sqrt().clamp(min=max(smallest, 1e-300))
        beta = beta / beta.sum()
    return beta.tolist()


def remembered(norms: Mapping[str, Sequence[float]], kind: str, new: Iterable[float]) -> dict[str, tuple[float, ...]]:
    """The norms of earlier rounds with those of this one, by kind of round."""
    return {**{k: tuple(v) for k, v in norms.items()}, kind: (*norms.get(kind, ()), *new)[-MEMORY:]}
