"""The base model's linear weights in four bits (NF4 with double quantisation), as QLoRA has them (arXiv 2305.14314).

Only the frozen weights are packed; a layer unpacks its own while it multiplies, forward and backward, so that adapters
train in float32 over a base that takes a quarter of bfloat16's memory. Departure from the paper: no paged optimiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexlora.types import FlexLoraError

BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""A weight with its share of the scales: one of 8 bits for 64 weights, one of 32 for 256 of these (section 3)."""


def library() -> Any:
    """bitsandbytes' functions. Raises FlexLoraError where they are not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        raise FlexLoraError(
            "--precision nf4: needs bitsandbytes; `pip install '.[qlora]'` in flexlora's clone"
        ) from None
    return functional


def pack(weight: Tensor, device: torch.device) -> tuple[nn.Parameter, Any]:
    """The packed bytes of a weight on `device`, and what unpacks them to its shape and dtype."""
    data, state = library().quantize_4bit(weight.detach().to(device), quant_type="nf4", compress_statistics=True)
    return nn.Parameter(data, requires_grad=False), state


def unpack(data: Tensor, state: Any) -> Tensor:
    return library().dequantize_4bit(data.detach(), state)
