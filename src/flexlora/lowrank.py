"""Linear algebra of factored delta weights: exact, never denser than it must be.

Notation: ``x = LowRank(B, A)`` stands for the matrix ``B @ A``; B is (d_out, r), A is (r, d_in). A `Matrix` is such a
pair or, where its rank is too high for that to pay, the dense (d_out, d_in) tensor itself. Nothing here changes its
input. Results are float32, or float64 where the input is; decompositions work in float64 inside.

Which way a decomposition goes, and what was measured to decide it, stands in docs/linear-algebra.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from flexlora import leading
from flexlora.products import add_mm, gram, mm
from flexlora.randomness import generator
from flexlora.types import LowRank

DEAD = 1e-7
"""A direction is dead where its singular value is at most this share of the largest."""
BLOCK = 0.25
"""Columns that wait in a dense sum until one matrix product adds them all, as a share of `dense_rank`."""
ALONE = 128
"""Rank from which an update's product is large enough to be added by itself: copying it into a block saves nothing."""
CROSSOVER, CROSSOVER_LARGE = 0.75, 0.5
"""Share of min(d_out, d_in): a stack of higher rank is decomposed dense; sooner where a Krylov space is worth it there."""
DECAYED = 1e-4
"""Below this share of the largest, a singular value is not read off a Gram matrix of float64: its square is off by
some 1e-16 of the largest square, so that at this share it still has eight digits."""

NOISE = 1e-6
"""Below this share of the largest, a singular value of a dense float32 matrix is the rounding of the sum that made it:
it is set to zero, so that a matrix of low rank has one."""

Matrix: TypeAlias = LowRank | Tensor


class Spectrum(NamedTuple):
    """The k leading directions of a matrix: ``U @ diag(S) @ Vt`` is its best rank-k approximation."""

    U: Tensor
    """(d_out, k), orthonormal columns; in each the entry of largest magnitude is positive."""
    S: Tensor
    """(k,), descending."""
    Vt: Tensor
    """(k, d_in), orthonormal rows."""


class Decomposed(LowRank):
    """A `LowRank` that brings its leading directions and its norm along, so that nobody computes them again."""

    matrix: Matrix
    """What the factors stand for: they themselves, or the dense matrix."""
    spectrum: Spectrum
    norm: float

    @classmethod
    def of(cls, x: Matrix, spectrum: Spectrum, norm: float) -> Decomposed:
        self = cls(*factored(x))
        self.matrix, self.spectrum, self.norm = x, spectrum, norm
        return self


# --- what every method needs -----------------------------------------------------------------------------------------


def delta(x: Matrix) -> Tensor:
    """The dense (d_out, d_in) matrix B @ A."""
    if isinstance(x, Tensor):
        return x
    dtype = _working(x.B.dtype)
    return mm(x.B.to(dtype), x.A.to(dtype))


def factored(x: Matrix) -> LowRank:
    """The same matrix as a factor pair: a dense one gets an identity on its shorter side, rank min(d_out, d_in)."""
    if isinstance(x, LowRank):
        return x
    d_out, d_in = x.shape
    eye = torch.eye(min(d_out, d_in), dtype=x.dtype, device=x.device)
    return LowRank(eye, x) if d_out <= d_in else LowRank(x, eye)


def stack(xs: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The exact weighted sum Σ w_i B_i A_i in factored form, rank Σ r_i; the weights go into B.

    Args:
        xs: B (d_out, r_i) and A (r_i, d_in) each.
        weights: one for each of xs, else ValueError, which is raised where `xs` is empty too.
    """
    if not xs:
        raise ValueError("stack needs at least one factor pair")
    first, rank = xs[0], sum(x.A.shape[0] for x in xs)
    new = {"dtype": _working(first.B.dtype), "device": first.B.device}
    B, A = torch.empty((first.B.shape[0], rank), **new), torch.empty((rank, first.A.shape[1]), **new)
    at = 0
    for x, w in zip(xs, weights, strict=True):
        to = at + x.A.shape[0]
        torch.mul(x.B.to(**new), w, out=B[:, at:to])
        A[at:to] = x.A
        at = to
    return LowRank(B, A)


def empty(d_out: int, d_in: int) -> LowRank:
    """The zero delta weight, rank 0."""
    return LowRank(torch.zeros((d_out, 0)), torch.zeros((0, d_in)))


class Sum:
    """A running weighted sum of delta weights of one module, consumed one update at a time.

    Factors are stacked while they take less room than the dense matrix; then they are added up densely, a block of
    columns by one matrix product. With R the stacked rank and s the rank at which it turns dense (`dense_rank`), at most
    min(R, s)(d_out + d_in) or, above, d_out · d_in floats are held, and one block of s/4 columns. While it turns and
    while a block is multiplied, twice that, which happens to one module a thread at a time. Updates are never changed;
    their factors are kept until they are multiplied.
    """

    def __init__(self, d_out: int, d_in: int) -> None:
        self.d_out, self.d_in = d_out, d_in
        self.total = 0.0
        """Sum of the weights so far."""
        self.rank = 0
        """Stacked rank so far, zero weights left out."""
        self._most = dense_rank(d_out, d_in)
        self._block = max(1, int(BLOCK * self._most))
        self._terms: list[tuple[LowRank, float]] = []
        self._waiting = 0
        self._dense: Tensor | None = None
        self._unit = 1.0  # the first weight: counted in it, one update or equal weights are summed without rounding
        self._given = False  # whether somebody has the dense sum: it is copied before anything is added

    def add(self, x: LowRank, weight: float, *, wait: bool = False) -> None:
        """Add weight · B A. The first update fixes device and dtype.

        With `wait` nothing is multiplied yet: the caller looks at `full` and calls `flush`, for many modules at once.
        """
        self.total += weight
        rank = x.A.shape[0]
        if weight == 0.0 or rank == 0:
            return
        if not self.rank:
            self._unit, self._dtype = weight, _working(x.B.dtype)
        self.rank += rank
        self._terms.append((LowRank(x.B.to(self._dtype), x.A.to(self._dtype)), weight))
        self._waiting += rank
        if self.full and not wait:
            self.flush()

    @property
    def full(self) -> bool:
        """Whether the sum is dense and a whole block waits to be multiplied."""
        return self.rank > self._most and self._waiting >= self._block

    def flush(self) -> None:
        """Multiply what waits into the dense sum; nothing where the sum is still a stack of factors."""
        if self.rank <= self._most or not self._terms:
            return
        if self._given and self._dense is not None:
            self._dense, self._given = self._dense.clone(), False
        small: list[tuple[LowRank, float]] = []
        waiting = 0
        while self._terms:
            x, w = self._terms.pop()
            rank, w = x.A.shape[0], w / self._unit
            if rank >= ALONE and self._dense is not None:
                add_mm(self._dense, x.B, x.A, w)
                continue
            small.append((x, w))
            waiting += rank
            if waiting >= self._block or not self._terms:
                self._multiply(small)
                small, waiting = [], 0
        if small:
            self._multiply(small)
        self._waiting = 0

    def _multiply(self, terms: Sequence[tuple[LowRank, float]]) -> None:
        """Add terms to the dense sum by one product of their stacks."""
        block = stack(*zip(*terms, strict=True))
        if self._dense is None:
            self._dense = mm(block.B, block.A)
        else:
            add_mm(self._dense, block.B, block.A)

    def over(self, divisor: float) -> Matrix:
        """Σ w_i B_i A_i / divisor, dense where the stacked rank made it so."""
        if self.rank > self._most:
            self.flush()
            assert self._dense is not None
            if self._given:
                return self._dense * (self._unit / divisor)
            self._given = True
            self._dense.mul_(self._unit / divisor)  # from now on it is counted in `divisor`
            self._unit = divisor
            return self._dense
        if not self._terms:
            return empty(self.d_out, self.d_in)
        xs, weights = zip(*self._terms, strict=True)
        return stack(xs, [w / divisor for w in weights])

    def mean(self) -> LowRank:
        """Σ w_i B_i A_i / Σ w_i as a factor pair (see `factored`); zero where all weights are."""
        return factored(self.over(self.total or 1.0))


def dense_rank(d_out: int, d_in: int) -> int:
    """The stacked rank up to which factors are kept: where they take no more room than the matrix, and less time."""
    least = min(d_out, d_in)
    share = CROSSOVER_LARGE if leading.pays(least, 1) else CROSSOVER
    return min(d_out * d_in // (d_out + d_in), int(share * least) or 1)


# --- decompositions ----------------------------------------------------------------------------------------------------


def svd(x: Matrix, rank: int | None = None) -> Spectrum:
    """The `rank` leading directions of B @ A (all of them where rank is None); at most min(d_out, d_in, r) exist.

    The error ‖B A − U S Vᵀ‖_F is within 1e-5 relative of the optimum, or within rounding of the dtype times ‖B A‖_F.
    """
    return extend(x.spectrum, x.matrix, rank) if isinstance(x, Decomposed) else decompose(x, rank)[0]


def decompose(x: Matrix, rank: int | None = None) -> tuple[Spectrum, float]:
    """``svd(x, rank)`` and ‖B A‖_F, which comes out of the same work."""
    d_out, d_in = _shape(x)
    k = _exist(x) if rank is None else min(rank, _exist(x))
    dtype, device = (x.dtype, x.device) if isinstance(x, Tensor) else (x.B.dtype, x.B.device)
    if k == 0:
        new = {"dtype": _working(dtype), "device": device}
        nothing = Spectrum(torch.zeros((d_out, 0), **new), torch.zeros(0, **new), torch.zeros((0, d_in), **new))
        return nothing, float(norm(x))
    single = dtype != torch.float64
    if isinstance(x, LowRank) and x.A.shape[0] <= dense_rank(d_out, d_in):
        found, whole = (_factored_gram(x, k) if single else None) or _factored_qr(x, k)
    else:
        W = delta(x)
        whole = float(norm(W))
        found = (_dense_gram(W, k, whole) if single else None) or _dense_svd(W, k)
        if single:
            found = found._replace(S=found.S.where(found.S[0] * NOISE < found.S, 0.0))
    return _signed(found, _working(dtype)), whole


def extend(spectrum: Spectrum, x: Matrix, rank: int | None = None) -> Spectrum:
    """``svd(x, rank)``, cut out of `spectrum`, leading directions of x known before, where it has that many."""
    U, S, Vt = spectrum
    if len(S) < _exist(x) and (rank is None or len(S) < rank):
        return svd(x, rank)
    return Spectrum(U[:, :rank], S[:rank], Vt[:rank])


def _factored_qr(x: LowRank, k: int) -> tuple[Spectrum, float]:
    Qb, Rb = torch.linalg.qr(x.B.double())
    Qa, Ra = torch.linalg.qr(x.A.double().T)
    U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Spectrum(mm(Qb, U[:, :k]), S[:k], mm(Vt[:k], Qa.T)), float(S.norm())


def _factored_gram(x: LowRank, k: int) -> tuple[Spectrum, float] | None:
    """With A = L Q, Q orthonormal rows: (B A)ᵀ(B A) = Qᵀ (Lᵀ BᵀB L) Q. None where float64 does not carry that."""
    B, A = x.B.double(), x.A.double()
    GA = gram(A)
    L, failed = torch.linalg.cholesky_ex(GA)
    if failed.item():
        return None
    if leading.pays(L.shape[0], k):
        whole = float(norm(x))
        found = _by_gram(mm(B, L).T, k, whole)
        if found is None:
            return None
        Z, S, U = found[0], found[1], found[2].T
    else:
        GB = gram(B.T)
        whole = (GA * GB).sum().clamp(min=0).sqrt()
        S2, Z = torch.linalg.eigh(mm(mm(L.T, GB), L))
        S2, Z = S2[-k:].flip(0), Z[:, -k:].flip(1)
        rounding = torch.finfo(S2.dtype).eps * GA.trace() * GB.trace()
        if S2[-1] <= max(DECAYED**2 * S2[0], 1e5 * rounding):
            return None
        S = S2.sqrt()
        U = mm(B, mm(L, Z)) / S
    # rows of Z' L^-1 A are orthonormal as far as A is well conditioned: looked at, not assumed
    Vt = mm(torch.linalg.solve_triangular(L.T, Z, upper=True).T, A)
    if (gram(Vt) - torch.eye(k, dtype=Vt.dtype, device=Vt.device)).abs().max() > 1e-9:
        return None
    return Spectrum(U, S, Vt), float(whole)


def _dense_gram(W: Tensor, k: int, whole: float) -> Spectrum | None:
    """By the Gram matrix of the shorter side. None where nearly all directions are asked for and some are small."""
    if W.shape[0] > W.shape[1]:
        found = _dense_gram(W.T, k, whole)
        return None if found is None else Spectrum(found.Vt.T, found.S, found.U.T)
    return _by_gram(W, k, whole)


def _dense_svd(W: Tensor, k: int) -> Spectrum:
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return Spectrum(U[:, :k], S[:k], Vt[:k])


def _by_gram(W: Tensor, k: int, whole: float) -> Spectrum | None:
    """The k leading directions of W of norm `whole`, shorter side first, from W Wᵀ: by a certified Krylov space where that pays, first
    in float32, then in float64, else by its whole eigen-decomposition in float64.

    Small singular values are read off the projection of W, nothing squared; None where that is no less work than the SVD.
    """
    if not whole:
        return None
    size = 1.0
    if not 1e-6 < whole < 1e6:  # squares shall neither overflow nor vanish
        size = 2.0 ** math.frexp(whole)[1]  # a power of two: dividing by it rounds nothing
        W, whole = W / size, whole / size
    krylov = leading.pays(W.shape[0], k)
    if krylov and (found := leading.leading(W.float(), gram(W.float()), k, whole)):
        return Spectrum(found[0], found[1] * size, found[2])
    W = W.double()
    G = gram(W)
    if krylov and (found := leading.leading(W, G, k, whole)):
        return Spectrum(found[0], found[1] * size, found[2])
    S2, U = torch.linalg.eigh(G)
    S2, U = S2[-k:].flip(0), U[:, -k:].flip(1)
    if S2[-1] > DECAYED**2 * S2[0]:
        S = S2.sqrt()
        return Spectrum(U, S * size, mm(U.T, W) / S[:, None])
    if 2 * k > W.shape[0]:
        return None
    Q, R = torch.linalg.qr(mm(U.T, W).T)
    Uk, S, Vt = torch.linalg.svd(R.T)
    return Spectrum(mm(U, Uk), S * size, mm(Vt, Q.T))


def _signed(found: Spectrum, dtype: torch.dtype) -> Spectrum:
    U, S, Vt = found
    signs = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return Spectrum((U * signs).to(dtype), S.to(dtype), (Vt * signs.T).to(dtype))


def singular_values(x: Matrix) -> Tensor:
    """(min(d_out, d_in, r),) singular values of B @ A, descending."""
    return svd(x).S


def truncate(x: Matrix, rank: int) -> LowRank:
    """argmin over X of ‖X − B A‖_F subject to rank X ≤ rank (Eckart–Young): B = U S (d_out, k), A = Vᵀ (k, d_in).

    k = min(rank, d_out, d_in), of factors at most their own rank too: `at_rank` gives directions to train beyond it.
    """
    U, S, Vt = svd(x, rank)
    return LowRank(U * S, Vt)


def norm(x: Matrix) -> Tensor:
    """‖B A‖_F, a 0-d float64 tensor, from the Gram matrices of the factors: no dense matrix."""
    if isinstance(x, Tensor):
        # piece by piece: the cast of all of it would not stay in the cache
        pieces = (piece.double().flatten() for piece in x.split(max(1, 2**18 // max(1, x.shape[1]))))
        return sum((torch.dot(y, y) for y in pieces), torch.zeros((), dtype=torch.float64, device=x.device)).sqrt()
    if isinstance(x, Decomposed):
        return torch.tensor(x.norm, dtype=torch.float64)
    return (gram(x.B.double().T) * gram(x.A.double())).sum().clamp(min=0).sqrt()


def energy_beyond(x: Matrix, ranks: Sequence[int]) -> list[float]:
    """Share of ‖B A‖²_F beyond each rank, in [0, 1]: Σ_{j > r} σ_j² / Σ_j σ_j²; 0 for the zero matrix.

    Free where x is `Decomposed` at the largest of the ranks, else one decomposition.
    """
    whole = float(norm(x)) ** 2
    if not ranks or not whole:
        return [0.0] * len(ranks)
    squares = svd(x, max(ranks)).S.double() ** 2
    tail = max(0.0, whole - float(squares.sum())) if len(squares) < _exist(x) else 0.0
    return [min(1.0, (float(squares[r:].sum()) + tail) / whole) for r in ranks]


def truncation_error(x: Matrix, rank: int) -> float:
    """‖B A − truncate(x, rank)‖_F, the least error of any matrix of that rank."""
    return float(norm(x)) * energy_beyond(x, [rank])[0] ** 0.5


def _exist(x: Matrix) -> int:
    return min(_shape(x)) if isinstance(x, Tensor) else min(*_shape(x), x.A.shape[0])


def _shape(x: Matrix) -> tuple[int, int]:
    return (x.shape[0], x.shape[1]) if isinstance(x, Tensor) else (x.B.shape[0], x.A.shape[1])


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- what a client gets ------------------------------------------------------------------------------------------------

FRESH_BLOCK = 64


def fresh_rows(rank: int, d_in: int, seed: int, module: str, round: int) -> Tensor:
    """(rank, d_in) float32 rows, uniform in ±1/sqrt(d_in) as PEFT starts lora_A; a smaller rank gets a prefix of a larger one's."""
    blocks = []
    for start in range(0, rank, FRESH_BLOCK):
        g = generator(seed, "fresh", module, round, start)
        blocks.append(torch.rand((FRESH_BLOCK, d_in), generator=g).mul_(2).sub_(1).mul_(d_in**-0.5))
    return torch.cat(blocks)[:rank] if blocks else torch.empty((0, d_in))


def at_rank(spectrum: Spectrum, rank: int, *, seed: int, module: str, round: int, split: str = "B") -> LowRank:
    """The best rank-`rank` factors for a client to train, without dead directions.

    `split` "B": B = U S, A = Vᵀ (the release of FlexLoRA); "balanced": B = U √S, A = √S Vᵀ. Where σ_j ≤ 1e-7 σ_1 or
    where the matrix has fewer than `rank` directions, column j of B is zero and row j of A is fresh, so that the delta
    weight is unchanged and the direction still has a gradient.
    """
    U, S, Vt = spectrum
    live = int((S[:rank] > DEAD * S[0]).sum()) if len(S) else 0
    left, right = (S[:live].sqrt(),) * 2 if split == "balanced" else (S[:live], torch.ones_like(S[:live]))
    B = U.new_zeros((U.shape[0], rank))
    B[:, :live] = U[:, :live] * left
    A = Vt.new_empty((rank, Vt.shape[1]))
    A[:live] = Vt[:live] * right[:, None]
    if live < rank:
        A[live:] = fresh_rows(rank, Vt.shape[1], seed, module, round)[live:].to(A)
    return LowRank(B, A)
