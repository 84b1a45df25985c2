"""What several methods do with factors: receive them, zero-pad, extend, combine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from flexlora import lowrank
from flexlora.lowrank import Matrix
from flexlora.types import ClientUpdate, LowRank, Sparse


def single(x: LowRank) -> LowRank:
    """Factors in at least single precision: a bfloat16 wire must not make the server's sums bfloat16."""
    return LowRank(*(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in x))


def received(updates: Iterable[ClientUpdate]) -> Iterator[tuple[ClientUpdate, dict[str, LowRank]]]:
    """One pass over the updates of weight above 0, each with its factors in at least single precision.

    Raises ValueError where there was none, and for an update of `Sparse` values.
    """
    came = False
    for update in updates:
        came = True
        if not update.weight:
            continue
        adapter: dict[str, LowRank] = {}
        for module, x in update.adapter.items():
            if isinstance(x, Sparse):
                raise ValueError(f"client {update.client} sent sparse values for {module} where factors are due")
            adapter[module] = single(x)
        yield update, adapter
    if not came:
        raise ValueError("aggregate needs at least one client update")


def add_padded(total: Tensor | None, x: Tensor, weight: float, dim: int) -> Tensor:
    """total + weight · x, the shorter one zero-padded along `dim`. The caller owns `total`: it may change in place."""
    if total is None:
        return x * weight
    missing = x.shape[dim] - total.shape[dim]
    if missing > 0:
        shape = list(total.shape)
        shape[dim] = missing
        total = torch.cat([total, total.new_zeros(shape)], dim)
    total.narrow(dim, 0, x.shape[dim]).add_(x, alpha=weight)
    return total


class PaddedMean:
    """Σ w_i pad(A_i) and Σ w_i pad(B_i) of one module, added up one client at a time."""

    def __init__(self) -> None:
        self.B: Tensor | None = None
        self.A: Tensor | None = None
        self.root = 0.0
        self.total = 0.0

    def add(self, x: LowRank, weight: float, root: float) -> None:
        """root: √(α/r) of the client; the factors are averaged with it in both (1.0: the fold as it is)."""
        self.B = add_padded(self.B, x.B, weight / root, 1)
        self.A = add_padded(self.A, x.A, weight * root, 0)
        self.root += weight * root
        self.total += weight

    def mean(self) -> LowRank:
        assert self.B is not None
        assert self.A is not None
        # The mean root goes back from A to B. The product is the same; without this A would grow by √(α/r) each round.
        root = self.root / self.total
        return LowRank(self.B * (root / self.total), self.A / (root * self.total))


class HolderMean:
    """Mean of one factor along its rank, each direction over its holders."""

    def __init__(self, dim: int) -> None:
        """dim: the rank's place, 0 in A and 1 in B."""
        self.dim = dim
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, x: Tensor, weight: float) -> None:
        self.total = add_padded(self.total, x, weight, self.dim)
        self.weight = add_padded(self.weight, x.new_ones(x.shape[self.dim]), weight, 0)

    def over(self, before: Tensor) -> Tensor:
        """The mean; directions that nobody holds are taken from `before`."""
        assert self.total is not None
        assert self.weight is not None
        mean = self.total / (self.weight[:, None] if self.dim == 0 else self.weight)
        rank = mean.shape[self.dim]
        return torch.cat([mean, before[rank:] if self.dim == 0 else before[:, rank:]], self.dim)


def first(x: LowRank, rank: int, *, seed: int, module: str, round: int) -> LowRank:
    """The first `rank` directions of x for a client to train; B @ A is that of the first columns and rows.

    A direction that is missing, or whose row of A is zero, would stay without gradient while A is frozen or B is zero:
    it gets a zero column of B and a fresh row of A, nested in rank and the same for all clients of the round.
    """
    B, A = x.B[:, :rank], x.A[:rank]
    have = A.shape[0]
    alive = A.any(dim=1)
    if have == rank and bool(alive.all()):
        return LowRank(B, A)
    fresh = lowrank.fresh_rows(rank, A.shape[1], seed, module, round).to(A)
    fresh[:have][alive] = A[alive]
    full = B.new_zeros((B.shape[0], rank))
    full[:, :have] = B * alive
    return LowRank(full, fresh)


def compress(x: LowRank) -> LowRank:
    """The same delta weight at rank at most min(d_out, d_in): past it, the dense matrix beside an identity."""
    if x.A.shape[0] <= min(x.B.shape[0], x.A.shape[1]):
        return x
    return lowrank.factored((x.B.double() @ x.A.double()).to(x.B.dtype))


def combine(terms: Sequence[tuple[Matrix, float]]) -> Matrix:
    """The exact weighted sum of matrices; dense where one of them is, or where the stacked rank is too high to pay."""
    dtype = reduce(torch.promote_types, [(x if isinstance(x, Tensor) else x.B).dtype for x, _ in terms])
    pairs = [(LowRank(x.B.to(dtype), x.A.to(dtype)), w) for x, w in terms if isinstance(x, LowRank)]
    dense = [(x, w) for x, w in terms if isinstance(x, Tensor)]
    stacked = lowrank.stack(*zip(*pairs, strict=True)) if pairs else None
    if not dense:
        assert stacked is not None
        few = stacked.A.shape[0] <= lowrank.dense_rank(stacked.B.shape[0], stacked.A.shape[1])
        return stacked if few else lowrank.delta(stacked)
    total = dense[0][0].to(dtype) * dense[0][1]
    for x, w in dense[1:]:
        total.add_(x, alpha=w)
    return total if stacked is None else total.addmm_(stacked.B, stacked.A)
