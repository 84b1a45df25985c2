"""All randomness is derived from the run's seed and a purpose, so that resume needs no stored generator state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2**63) for one purpose, e.g. ``derive(42, "train", round, client)``.

    Purposes of different words or numbers give independent seeds; the same ones give the same seed on every machine.
    """
    text = "\x1f".join([str(seed), *(f"{type(p).__name__}:{p}" for p in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded with `derive`; the global generators are left alone."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *purpose))
