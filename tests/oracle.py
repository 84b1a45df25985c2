"""Dense float64 truth, by the definitions and with loops: slow, obvious, and free of anything from the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def product(B: Tensor, A: Tensor) -> Tensor:
    """(B A)[i, j] = Σ_l B[i, l] A[l, j], one rank-one term after the other, in float64."""
    B, A = B.double(), A.double()
    W = torch.zeros((B.shape[0], A.shape[1]), dtype=torch.float64)
    for j in range(B.shape[1]):
        W += torch.outer(B[:, j], A[j])
    return W


def weighted_sum(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Tensor:
    """Σ w_i B_i A_i"""
    W = torch.zeros((pairs[0][0].shape[0], pairs[0][1].shape[1]), dtype=torch.float64)
    for (B, A), w in zip(pairs, weights, strict=True):
        W += w * product(B, A)
    return W


def mean(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Tensor:
    """Σ p_i B_i A_i, p_i = w_i / Σ w"""
    total = sum(weights)
    return weighted_sum(pairs, [w / total for w in weights])


def module_means(
    updates: Sequence[tuple[Mapping[str, tuple[Tensor, Tensor]], float]], modules: Sequence[str]
) -> dict[str, Tensor]:
    """The mean of each module over the clients that have it; a module that none has is missing."""
    means = {}
    for module in modules:
        holders = [(adapter[module], w) for adapter, w in updates if module in adapter]
        if holders:
            means[module] = mean([pair for pair, _ in holders], [w for _, w in holders])
    return means


def best(W: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` approximation by a dense SVD (Eckart–Young)."""
    U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    X = torch.zeros_like(W, dtype=torch.float64)
    for j in range(min(rank, len(S))):
        X += S[j] * torch.outer(U[:, j], Vt[j])
    return X


def least_error(W: Tensor, rank: int) -> float:
    """√(Σ_{j > rank} σ_j²)"""
    return sum(float(s) ** 2 for s in torch.linalg.svdvals(W.double())[rank:]) ** 0.5


def energy_beyond(W: Tensor, rank: int) -> float:
    """Σ_{j > rank} σ_j² / Σ σ_j²; 0 for the zero matrix."""
    whole = float((W.double() ** 2).sum())
    return least_error(W, rank) ** 2 / whole if whole else 0.0


def distance(X: Tensor, Y: Tensor) -> float:
    """‖X − Y‖_F"""
    return float(torch.linalg.vector_norm(X.double() - Y.double()))
