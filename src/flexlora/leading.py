"""The leading directions of a large dense matrix, with a proof that they are the leading ones.

A full eigen-decomposition of the Gram matrix G = W Wᵀ costs some 9 n³; 200 directions of 2,048 do not need it. A block
Krylov space of G from a random start (Golub & Underwood 1977; Musco & Musco 2015, arXiv 1504.05477) holds them after
a few hundred columns. Such a method can miss a direction, so its answer is only taken with a certificate:

- With U the p ≥ k Ritz vectors, E = Uᵀ G U and R = G U − U E, G has the blocks [E, Rᵀ; R, C]. If the Cholesky
  factorisation of s I − G + U diag(E) Uᵀ exists, then C ≺ s I: no direction above s was missed (Sylvester).
- For μ > s and g = μ − s, G − μ I ≼ [E + RᵀR/g − μ I, 0; 0, 0], and so (Ky Fan)
  Σ_{i ≤ k} λ_i(G) ≤ k μ + Σ_i (λ_i(E + RᵀR/g) − μ)_+.
  That bounds the energy that any rank-k matrix can hold, hence the optimum from below.

Rounding enters by its usual size √n u, not by its worst case n u; in float32 the certificate then holds for spectra
that decay little, σ_k some hundredth of σ_1, and float64 covers the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexlora.products import gram, mm
from flexlora.randomness import generator

STRIP = 32
"""Columns of one Krylov block: fewer converge with a smaller space, more multiply faster."""
SPARE = 64
"""Ritz vectors beyond k, so that the certificate finds a gap below the k-th."""
TOLERANCE = 1e-5
"""Error accepted beyond the optimum, relative, of ‖W − U Uᵀ W‖_F."""


def pays(n: int, k: int) -> bool:
    """Whether `leading` is worth trying for k of n directions, as measured."""
    return n >= 768 and 4 * k + 4 * STRIP <= n // 2


def leading(W: Tensor, G: Tensor, k: int, norm: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """U (n, k), S (k,), Vt (k, m), in float64, of W (n, m), n ≤ m, or None where the certificate fails.

    G = W Wᵀ, in W's dtype, in which it works; `norm` is ‖W‖_F, so near 1 that squares neither overflow nor vanish.
    """
    found = _krylov(G, k)
    if found is None:
        return None
    theta, U = found
    # U is orthonormal to its dtype; one Cholesky step makes it so to float64
    T = mm(U.T, W).double()
    U64 = U.double()
    L, failed = torch.linalg.cholesky_ex(gram(U64.T))
    if failed.item():
        return None
    T = torch.linalg.solve_triangular(L, T, upper=False)
    U64 = torch.linalg.solve_triangular(L, U64.T, upper=False).T
    E = gram(T)
    S2, Y = torch.linalg.eigh(E)
    S2, Y = S2[-k:].flip(0), Y[:, -k:].flip(1)
    whole = norm**2
    bound = _most(G, U, theta, E, k)
    if bound is None or whole - float(S2.sum()) > (1 + TOLERANCE) ** 2 * (whole - bound):
        return None
    S = S2.sqrt()
    return mm(U64, Y), S, mm(Y.T, T) / S[:, None]


def _krylov(G: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Ritz values (p,), descending, and vectors (n, p) of G, p = k + SPARE; None where the space grows too large.

    Block Lanczos: each new block is freed of the last two and then of all, and the space is looked at every four.
    """
    n, b, p = G.shape[0], STRIP, k + SPARE
    eps = torch.finfo(G.dtype).eps
    most = n // 2 // b * b
    Q = G.new_empty((most, n))
    H = G.new_zeros((most, most))
    start = torch.randn((n, b), generator=generator(0, "krylov"), dtype=G.dtype).to(G.device)
    X = torch.linalg.qr(start)[0]
    whole = float(G.diagonal().double().sum())
    look = -(-max(3 * k, p + 4 * b) // b) * b
    j = 0
    while j < most:
        Q[j : j + b] = X.T
        Y = mm(G, X)
        near = Q[max(0, j - b) : j + b]
        h = mm(near, Y)
        Y -= mm(near.T, h)
        done = Q[: j + b]
        correction = mm(done, Y)
        Y -= mm(done.T, correction)
        H[: j + b, j : j + b] = correction
        H[max(0, j - b) : j + b, j : j + b] += h
        j += b
        X, beta = torch.linalg.qr(Y)
        ended = bool(beta.diagonal().abs().min() <= 100 * eps * H[0, 0].abs())
        if j < look and not ended:
            continue
        if j < p:
            return None
        look = j + 4 * b
        theta, Z = torch.linalg.eigh(H[:j, :j], UPLO="U")
        theta, Z = theta[-p:].flip(0), Z[:, -p:].flip(1)
        held = float(theta[:k].double().sum())
        mu, g = _gap(theta, k)
        coupling = ((beta @ Z[-b:]) ** 2).sum(0).double()
        reach = k * mu + float((theta.double() + 1.1 * coupling / max(g, eps * mu) - mu).clamp(min=0).sum())
        if ended or reach - held <= 1.5 * TOLERANCE * (whole - held):  # of squares: 2 would be all
            return theta, mm(done.T, Z)
    return None


def _gap(theta: Tensor, k: int) -> tuple[float, float]:
    """μ, the k-th Ritz value, and g: s = μ − g keeps a quarter of the way to the p-th for what is not in the space."""
    mu = float(theta[k - 1])
    return mu, 0.75 * (mu - float(theta[-1]))


def _most(G: Tensor, U: Tensor, theta: Tensor, E: Tensor, k: int) -> float | None:
    """An upper bound on the sum of the k largest eigenvalues, or None where none was found."""
    n, p = U.shape
    noise = n**0.5 * torch.finfo(G.dtype).eps / 2 * float(theta[0])
    mu, g = _gap(theta, k)
    s = mu - g
    M = mm(U * theta, U.T).sub_(G)
    M.diagonal().add_(s)
    if not _positive(M):
        return None
    g -= noise
    if g <= 0:
        return None
    R = (mm(G, U) - U * theta).double()
    grown = E + (1.1 * gram(R.T) + 11 * noise**2 * torch.eye(p, dtype=E.dtype, device=E.device)) / g
    return k * mu + float((torch.linalg.eigvalsh(grown) - mu).clamp(min=0).sum())


def _positive(M: Tensor) -> bool:
    """Whether a symmetric M (n, n), which is lost, has a Cholesky factor: in blocks, of which the factor is not kept."""
    n, block = M.shape[0], 256
    for i in range(0, n, block):
        to = i + block
        L, failed = torch.linalg.cholesky_ex(M[i:to, i:to])
        if failed.item():
            return False
        if to < n:
            rows = torch.linalg.solve_triangular(L, M[i:to, to:], upper=False)
            for j in range(0, n - to, 2 * block):  # the upper triangle is enough
                part = slice(to + j, to + j + 2 * block)
                M[to : part.stop, part].addmm_(rows[:, : j + 2 * block].T, rows[:, j : j + 2 * block], alpha=-1)
    return True
