"""Linear algebra of factored delta weights.

Notation: ``x = LowRank(B, A)`` stands for the matrix ``B @ A``; B is (d_out, r), A is (r, d_in). Nothing here
changes its input. Results have the dtype and device of the input; decompositions work in float64 inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexlora.randomness import generator
from flexlora.types import LowRank

DEAD = 1e-7
"""A direction is dead where its singular value is at most this share of the largest."""


class Spectrum(NamedTuple):
    """The k leading directions of a matrix: ``U @ diag(S) @ Vt`` is its best rank-k approximation."""

    U: Tensor
    """(d_out, k), orthonormal columns; in each the entry of largest magnitude is positive."""
    S: Tensor
    """(k,), descending."""
    Vt: Tensor
    """(k, d_in), orthonormal rows."""


def delta(x: LowRank) -> Tensor:
    """The dense (d_out, d_in) matrix B @ A."""
    return x.B @ x.A


def stack(xs: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The exact weighted sum Σ w_i B_i A_i in factored form, rank Σ r_i; the weights go into B."""
    if not xs:
        raise ValueError("stack needs at least one factor pair")
    B = torch.cat([x.B * w for x, w in zip(xs, weights, strict=True)], dim=1)
    return LowRank(B, torch.cat([x.A for x in xs], dim=0))


class Sum:
    """A running weighted sum of delta weights of one module, consumed one update at a time."""

    def __init__(self, d_out: int, d_in: int) -> None:
        self.d_out, self.d_in = d_out, d_in
        self.total = 0.0
        """Sum of the weights so far."""
        self._terms: list[tuple[LowRank, float]] = []

    def add(self, x: LowRank, weight: float) -> None:
        self._terms.append((x, weight))
        self.total += weight

    def mean(self) -> LowRank:
        """Σ w_i B_i A_i / Σ w_i."""
        xs, weights = zip(*self._terms, strict=True)
        return stack(xs, [w / self.total for w in weights])


def svd(x: LowRank, rank: int | None = None) -> Spectrum:
    """The `rank` leading directions of B @ A (all of them where rank is None); at most min(d_out, d_in, r) exist."""
    Qb, Rb = torch.linalg.qr(x.B.double())
    Qa, Ra = torch.linalg.qr(x.A.double().T)
    U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    k = min(len(S), len(S) if rank is None else rank)
    U, S, Vt = Qb @ U[:, :k], S[:k], Vt[:k] @ Qa.T
    if k:
        signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
        U, Vt = U * signs, Vt * signs.T
    return Spectrum(U.to(x.B.dtype), S.to(x.B.dtype), Vt.to(x.A.dtype))


def singular_values(x: LowRank) -> Tensor:
    """(min(d_out, d_in, r),) singular values of B @ A, descending."""
    return svd(x).S


def truncate(x: LowRank, rank: int) -> LowRank:
    """argmin over X of ‖X − B A‖_F subject to rank X ≤ rank (Eckart–Young): B = U S, A = Vᵀ."""
    U, S, Vt = svd(x, rank)
    return LowRank(U * S, Vt)


def norm(x: LowRank) -> Tensor:
    """‖B A‖_F, a 0-d float64 tensor, from the Gram matrices of the factors: no dense matrix."""
    B, A = x.B.double(), x.A.double()
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()


FRESH_BLOCK = 64


def fresh_rows(rank: int, d_in: int, seed: int, module: str, round: int) -> Tensor:
    """(rank, d_in) float32 rows, uniform in ±1/sqrt(d_in) as PEFT starts lora_A; a smaller rank gets a prefix of a larger one's."""
    blocks = []
    for start in range(0, rank, FRESH_BLOCK):
        g = generator(seed, "fresh", module, round, start)
        blocks.append(torch.rand((FRESH_BLOCK, d_in), generator=g).mul_(2).sub_(1).mul_(d_in**-0.5))
    return torch.cat(blocks)[:rank] if blocks else torch.empty((0, d_in))


def at_rank(spectrum: Spectrum, rank: int, *, seed: int, module: str, round: int) -> LowRank:
    """The best rank-`rank` factors B = U S, A = Vᵀ for a client to train, without dead directions.

    Where σ_j ≤ 1e-7 σ_1 or where the matrix has fewer than `rank` directions, column j of B is zero and row j of A is
    fresh, so that the delta weight is unchanged and the direction still has a gradient.
    """
    U, S, Vt = spectrum
    live = int((S[:rank] > DEAD * S[0]).sum()) if len(S) else 0
    B = U.new_zeros((U.shape[0], rank))
    B[:, :live] = U[:, :live] * S[:live]
    A = Vt.new_empty((rank, Vt.shape[1]))
    A[:live] = Vt[:live]
    if live < rank:
        A[live:] = fresh_rows(rank, Vt.shape[1], seed, module, round)[live:].to(A)
    return LowRank(B, A)


def empty(d_out: int, d_in: int) -> LowRank:
    """The zero delta weight, rank 0."""
    return LowRank(torch.zeros((d_out, 0)), torch.zeros((0, d_in)))


def inner(xs: Iterable[LowRank], ys: Iterable[LowRank]) -> float:
    """Σ over modules of the Frobenius inner product ⟨B A, B' A'⟩ by the trace identity."""
    total = 0.0
    for x, y in zip(xs, ys, strict=True):
        total += float(((x.B.double().T @ y.B.double()) * (x.A.double() @ y.A.double().T)).sum())
    return total
