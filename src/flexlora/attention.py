"""Attention while training on a processor in bfloat16: short sequences go through torch's float32 kernel.

Its bfloat16 kernel multiplies tiny blocks one by one: the backward pass of 8 sequences of 128 tokens takes three times
as long as in float32, casts included (docs/log.md has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "flexlora"
SHORT = 192
"""Tokens a sequence from which the bfloat16 kernel is as fast."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention "sdpa", in float32 where that is faster; query (batch, heads, length, head size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= SHORT
    if short and torch.is_grad_enabled():
        query, key, value = query.float(), key.float(), value.float()
        y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return y.bfloat16(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **more)


def use(network: Any) -> None:
    """Have a network of "sdpa" attention attend by `attend`; one of another kind keeps its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(NAME)
