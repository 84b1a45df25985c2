"""Clients that add seeded noise to what they were sent, for tests of what happens to their updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexlora.types import Adapter, ClientUpdate, LowRank, Sparse


def noisy_update(
    client: int,
    sent: Adapter,
    *,
    seed: int,
    scale: float = 1.0,
    parts: Sequence[str] = ("A", "B"),
    weight: float = 1.0,
) -> ClientUpdate:
    """What the client was sent, plus `scale` times standard normal noise in the named parts."""
    g = torch.Generator().manual_seed(seed)

    def moved(part: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + scale * torch.randn(tensor.shape, generator=g) if part in parts else tensor

    adapter = {
        m: x._replace(values=moved("values", x.values)) if isinstance(x, Sparse) else LowRank(moved("B", x.B), moved("A", x.A))
        for m, x in sent.items()
    }  # fmt: skip
    return ClientUpdate(client, weight, adapter, sent=sent)
