"""Checks on what a client sent, before anything is made of it; and what bounds its increment.

The increment of a client is what it changed, trained minus sent: with B = B₀ + dB and A = A₀ + dA it has the three pieces
dB A₀, B₀ dA and dB dA, whose sum is B A − B₀ A₀. Its norm is that of the pieces side by side, not of their sum: a client
that sends (−B₀, −A₀), or (B₀ / k, k A₀), changes no product, and yet would ruin every method that averages factors.
Where one factor is frozen only one piece is left and the norm is ‖B A − B₀ A₀‖.

An increment that is too large is rejected or clipped. Clipping goes back along the straight line from what was trained to
what was sent, (B₀ + t dB, A₀ + t dA), to the t at which the norm is the bound: ranks stay, and every column stays in its
place, so that it is right for every method. Where one factor is frozen this is the usual scaling of the increment.
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

LARGEST = 1e6
"""The largest entry of a factor: no training comes near, and sums of products of such numbers are finite in float32."""

MOST_EXAMPLES = 2.0**53
"""A weight is a number of examples: at least 1, and small enough to be counted."""

CANCELLED = 1e-3
"""Below this share of its products' norms, the norm of a sum is not read off Gram matrices of its factors."""

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
    """Bound of an increment's norm in multiples of the median of those accepted in earlier rounds, and of the change of A
    in multiples of the A that was sent: where B is still zero, nothing else would show how large A became."""
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
    metrics = {name: value for name, value in update.metrics.items() if abs(value) < MOST_EXAMPLES}
    update = replace(update, sent=task.download.adapter, weight=weight, metrics=metrics)
    rule = task.download.rule
    bound, norm = limits.bound(norms), increment_norm(update, rule)
    bound_A, norm_A = math.inf, A_norm(update)
    if limits.factor is not None:
        bound_A = limits.factor * math.sqrt(sum(float(o.A.double().square().sum()) for _, _, o in pairs(update)))
    if norm <= bound and norm_A <= bound_A:
        return update
    if limits.action == "clip":
        return clipped(update, bound, rule, bound_A)
    what, size, most = ("increment has", norm, bound) if norm > bound else ("A has a change of", norm_A, bound_A)
    return ClientFailure(task.client, f"rejected: its {what} norm {size:.3g}, at most {most:.3g} is let in")


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
        yield from _misfits(module, x, sent[module], task.download.rule)
    if not 1 <= update.weight < MOST_EXAMPLES:
        yield f"weight {update.weight} is no number of examples"
    for name in ("examples", "bytes_up", "bytes_down"):
        if not 0 <= update.metrics.get(name, 0) < math.inf:
            yield f"{name} is {update.metrics[name]}"


def _misfits(module: str, x: LowRank | Sparse, origin: LowRank | Sparse, rule: ClientRule) -> Iterator[str]:
    if isinstance(x, LowRank) and isinstance(origin, LowRank):
        rank, assigned = x.A.shape[0] if x.A.dim() == 2 else -1, origin.A.shape[0]
        fits = (
            # Only who was asked to prune may send fewer directions.
            (rank == assigned or (rule.prune is not None and min(rule.prune[2], assigned) <= rank < assigned))
            and x.A.shape == (rank, origin.A.shape[1])
            and x.B.shape == (origin.B.shape[0], rank)
        )
        if not fits:
            yield f"{module} has shapes {tuple(x.B.shape)} and {tuple(x.A.shape)}, not those of its assignment"
        tensors: tuple[tuple[Tensor, Tensor], ...] = ((x.B, origin.B), (x.A, origin.A))
        for part, (tensor, like) in zip(("B", "A"), tensors, strict=True):
            if (
                part not in rule.send
                and fits
                and not torch.equal(tensor, like[:, :rank] if part == "B" else like[:rank])
            ):
                yield f"{module} has another {part} than it was sent, which it was not asked for"
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
        elif tensor.numel():
            low, high = (float(x) for x in tensor.aminmax())  # NaN wherever there is one
            if not (math.isfinite(low) and math.isfinite(high)):
                yield f"{module} has values that are not finite"
            elif (largest := max(-low, high)) > LARGEST:
                yield f"{module} has values up to {largest:.3g}, at most {LARGEST:g} is let in"


# --- increments --------------------------------------------------------------------------------------------------------


def change(x: LowRank, origin: LowRank) -> tuple[Tensor, Tensor]:
    """(dB, dA) in float64 at the rank of what was sent: a direction that the client dropped became zero."""
    return _moved(x.B.T, origin.B.T).T, _moved(x.A, origin.A)


def _moved(x: Tensor, origin: Tensor) -> Tensor:
    """x − origin in float64, with zeros for the rows that x does not have."""
    d = -origin.double()
    d[: len(x)] += x
    return d


def pairs(update: ClientUpdate) -> Iterator[tuple[str, LowRank, LowRank]]:
    """(module, trained, sent) of every module that is low-rank."""
    assert update.sent is not None
    for module, x in update.adapter.items():
        origin = update.sent[module]
        if isinstance(x, LowRank) and isinstance(origin, LowRank):
            yield module, x, origin


def increment(x: LowRank, origin: LowRank) -> LowRank | Tensor:
    """B A − B₀ A₀ in float64, exact to one part in 10⁹ whatever the client sent.

    Factored as [dB B₀] [A; dA]; dense where these products cancel so far that a norm read off the factors would be
    rounding.
    """
    dB, dA = change(x, origin)
    pair = LowRank(torch.cat([dB, origin.B.double()], 1), torch.cat([origin.A.double() + dA, dA]))
    # Both products are off by some 10⁻¹⁶ of this, their squares by as much of its square.
    whole = float(dB.norm() * (origin.A.double() + dA).norm() + origin.B.double().norm() * dA.norm())
    return pair if float(lowrank.norm(pair)) > CANCELLED * whole else lowrank.delta(pair)


def A_norm(update: ClientUpdate) -> float:
    """‖dA‖ over all modules that are low-rank."""
    return math.sqrt(part_squares(update, "A"))


def part_squares(update: ClientUpdate, part: str) -> float:
    """Σ over modules of ‖dA‖² or ‖dB‖², of one factor alone."""
    both = ((x.B.T, origin.B.T) if part == "B" else (x.A, origin.A) for _, x, origin in pairs(update))
    return sum(float(_moved(*pair).square_().sum()) for pair in both)


def pieces(x: LowRank | Sparse, origin: LowRank | Sparse, rule: ClientRule = BOTH_FACTORS) -> list[LowRank]:
    """One module's increment in parts that cannot cancel, float64 matrices in factors: dB A₀, B₀ dA, dB dA.

    Where one factor stays at the client (fedsa) the change of the other, since the server knows no product; of a sparse
    module the change of its values, as a row.
    """
    if isinstance(x, Sparse) or isinstance(origin, Sparse):
        assert isinstance(x, Sparse)
        assert isinstance(origin, Sparse)
        values = (x.values.double() - origin.values.double())[None]
        return [LowRank(torch.ones((1, 1), dtype=values.dtype), values)]
    dB, dA = change(x, origin)
    if rule.keep:
        part = dB.T if rule.send == ("B",) else dA
        return [LowRank(torch.eye(len(part), dtype=part.dtype), part)]
    return [LowRank(dB, origin.A.double()), LowRank(origin.B.double(), dA), LowRank(dB, dA)]


def measured(x: LowRank | Sparse, origin: LowRank | Sparse, rule: ClientRule = BOTH_FACTORS) -> LowRank:
    """The pieces of one module's increment below one another, as one matrix."""
    found = pieces(x, origin, rule)
    return LowRank(torch.block_diag(*(piece.B for piece in found)), torch.cat([piece.A for piece in found]))


def squares(update: ClientUpdate, rule: ClientRule = BOTH_FACTORS) -> tuple[float, float]:
    """(a, b): along the line from what was sent to what was trained the square of the norm is a t² + b t⁴."""
    assert update.sent is not None
    a, b = 0.0, 0.0
    for module, x in update.adapter.items():
        found = [float(lowrank.norm(piece)) ** 2 for piece in pieces(x, update.sent[module], rule)]
        a, b = a + sum(found[:2]), b + sum(found[2:])
    return a, b


def increment_norm(update: ClientUpdate, rule: ClientRule = BOTH_FACTORS) -> float:
    """Frobenius norm of the pieces of the increment, over all modules."""
    return math.sqrt(sum(squares(update, rule)))


def clipped(
    update: ClientUpdate, bound: float, rule: ClientRule = BOTH_FACTORS, bound_A: float = math.inf
) -> ClientUpdate:
    """The update, moved back towards what was sent until its increment has norm `bound` and its dA `bound_A` at most.

    As it is where both hold.
    """
    a, b = squares(update, rule)
    norm_A = A_norm(update)
    if math.sqrt(a + b) <= bound and norm_A <= bound_A:
        return update
    # a t² + b t⁴ = bound², solved for t² without a difference of near numbers.
    t = math.sqrt(2 * bound**2 / (a + math.sqrt(a * a + 4 * b * bound**2))) if a + b > bound**2 else 1.0
    t = min(t, bound_A / norm_A if norm_A > bound_A else 1.0) * (1 - MARGIN)
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
    # One clipping may follow another: what is said is the share that is left of what came.
    share = update.metrics.get("clipped", 1.0) * t
    return replace(update, adapter=adapter, metrics={**update.metrics, "clipped": share})


# --- what one client can do ---------------------------------------------------------------------------------------------


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
