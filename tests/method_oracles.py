"""Each method's formula in dense float64 numpy, with loops over clients and directions; nothing from the package.

A client is (lora_B, lora_A, scaling, weight): its delta weight is scaling · lora_B @ lora_A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Matrix = np.ndarray


class Client(NamedTuple):
    lora_B: Matrix  # noqa: N815
    lora_A: Matrix  # noqa: N815
    scaling: float
    weight: float

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def delta(self) -> Matrix:
        return self.scaling * self.lora_B @ self.lora_A

    @property
    def B(self) -> Matrix:
        """With the scaling folded in, as it travels."""
        return self.scaling * self.lora_B


def shares(clients: Sequence[Client]) -> list[float]:
    total = sum(c.weight for c in clients)
    return [c.weight / total for c in clients]


def best(W: Matrix, rank: int) -> Matrix:
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return sum((S[j] * np.outer(U[:, j], Vt[j]) for j in range(min(rank, len(S)))), np.zeros_like(W))


def flexlora(clients: Sequence[Client]) -> Matrix:
    return sum((p * c.delta for p, c in zip(shares(clients), clients, strict=True)), np.zeros_like(clients[0].delta))


def carry(W: Matrix, clients: Sequence[Client], sent: Sequence[Matrix], eta: float) -> Matrix:
    """sent: what each client was sent, dense."""
    out = W.copy()
    for p, c, s in zip(shares(clients), clients, sent, strict=True):
        out = out + eta * p * (c.delta - s)
    return out


def raflora(W: Matrix, clients: Sequence[Client], levels: Sequence[int]) -> Matrix:
    """W: the global delta weight before. Direction by direction: the partition formula has one share in each I_h."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    out = np.zeros_like(W)
    for low, high in zip([0, *levels], levels, strict=False):
        holders = [c for c in clients if c.rank >= high]
        total = sum(c.weight for c in holders)
        for c in holders:
            for j in range(low, high):
                out = out + c.weight / total * np.outer(c.B[:, j], c.lora_A[j])
        if not holders:
            for j in range(low, min(high, len(S))):
                out = out + S[j] * np.outer(U[:, j], Vt[j])
    return out


def pad_rows(A: Matrix, rank: int) -> Matrix:
    out = np.zeros((rank, A.shape[1]))
    out[: A.shape[0]] = A
    return out


def padded_mean(Bs: Sequence[Matrix], As: Sequence[Matrix], weights: Sequence[float]) -> tuple[Matrix, Matrix]:
    rank = max(A.shape[0] for A in As)
    B = sum((w * pad_rows(x.T, rank).T for w, x in zip(weights, Bs, strict=True)), np.zeros((Bs[0].shape[0], rank)))
    A = sum((w * pad_rows(x, rank) for w, x in zip(weights, As, strict=True)), np.zeros((rank, As[0].shape[1])))
    return B, A


def fedavg(clients: Sequence[Client]) -> tuple[Matrix, Matrix]:
    return padded_mean([c.B for c in clients], [c.lora_A for c in clients], shares(clients))


def hetlora(clients: Sequence[Client], handle_alpha: bool) -> tuple[Matrix, Matrix]:
    """(B, A) before any change of balance between the two; their product is the global delta weight."""
    norms = [float(np.linalg.norm(c.delta)) for c in clients]
    weights = [x / sum(norms) for x in norms] if sum(norms) else shares(clients)
    if not handle_alpha:
        return padded_mean([c.B for c in clients], [c.lora_A for c in clients], weights)
    roots = [c.scaling**0.5 for c in clients]
    Bs = [r * c.lora_B for r, c in zip(roots, clients, strict=True)]
    As = [r * c.lora_A for r, c in zip(roots, clients, strict=True)]
    return padded_mean(Bs, As, weights)


def rbla(before: tuple[Matrix, Matrix], clients: Sequence[Client]) -> tuple[Matrix, Matrix]:
    """before: the factors before; a direction that nobody holds is taken from there."""
    rank = max([before[1].shape[0], *(c.rank for c in clients)])
    B, A = np.zeros((clients[0].B.shape[0], rank)), np.zeros((rank, clients[0].lora_A.shape[1]))
    for j in range(rank):
        holders = [c for c in clients if c.rank > j]
        if holders:
            total = sum(c.weight for c in holders)
            B[:, j] = sum(c.weight / total * c.B[:, j] for c in holders)
            A[j] = sum(c.weight / total * c.lora_A[j] for c in holders)
        else:
            B[:, j], A[j] = before[0][:, j], before[1][j]
    return B, A


def florist(clients: Sequence[Client], threshold: float) -> Matrix:
    W = flexlora(clients)
    S = np.linalg.svd(W, compute_uv=False)
    p = 1
    while (S[:p] ** 2).sum() < threshold * (S**2).sum():
        p += 1
    return best(W, p)


def sparse_mean(shape: tuple[int, int], index: Matrix, values: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Σ p_i δ_i, δ_i zero outside the client's mask, which is a prefix of `index`."""
    out = np.zeros(shape[0] * shape[1])
    for v, w in zip(values, weights, strict=True):
        for place, value in zip(index, v, strict=False):
            out[place] += w / sum(weights) * value
    return out.reshape(shape)
