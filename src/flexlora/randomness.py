"""All randomness is derived from the run's seed and a purpose, so that resume needs no stored generator state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 2**20
"""Normals that are made at once; even."""


def key(seed: int, *purpose: str | int) -> bytes:
    """32 bytes for one purpose: SHA-256 of the whole seed and the purpose's words and numbers."""
    text = "\x1f".join([str(seed), *(f"{type(p).__name__}:{p}" for p in purpose)])
    return hashlib.sha256(text.encode()).digest()


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2**63) for one purpose, e.g. ``derive(42, "train", round, client)``.

    Purposes of different words or numbers give independent seeds; the same ones give the same seed on every machine.
    """
    return int.from_bytes(key(seed, *purpose)[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive`; the global generators are left alone."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))


def secret_normals(key: bytes, count: int) -> torch.Tensor:
    """(count,) independent standard normals, float64, that nobody can tell from others without `key`.

    A torch generator would not do: of a seed it takes 32 bits, which can be tried one by one. Here SHAKE-256 stretches the
    key to uniform numbers of 53 bits, in blocks of its own each, and the transform of Box and Muller makes normals of them.
    """
    import numpy as np
    import torch

    parts = []
    for start in range(0, count, BLOCK):
        pairs = (min(BLOCK, count - start) + 1) // 2
        stream = hashlib.shake_256(key + start.to_bytes(8, "big")).digest(16 * pairs)
        u, v = ((np.frombuffer(stream, "<u8") >> 11) + 1).reshape(2, pairs) * 2.0**-53  # in (0, 1]: no log of zero
        radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
        parts += [radius * np.cos(angle), radius * np.sin(angle)]
    # A block of odd length has one number too many, at its end; only the last one can.
    return torch.from_numpy(np.concatenate([*parts, np.empty(0)])[:count])
