"""Attention over rows in which several sequences share a beginning, and in bfloat16 on a processor.

Each sequence of a shared row attends by itself, to the beginning and to its own tokens: one attention over the whole row
would multiply what the mask takes away. And torch's bfloat16 kernel multiplies tiny blocks one by one: while training, 8
sequences of 128 tokens take three times as long as in float32, casts included (docs/log.md has the figures), so that
short sequences go through the float32 kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flexlora.rows import Shared

NAME = "flexlora"
SHORT = 192
"""Tokens a sequence from which the bfloat16 kernel is as fast."""
_passing = threading.local()


@contextmanager
def sharing(shared: Shared | None) -> Iterator[None]:
    """Have passes of this thread attend as `shared` says; other threads may be passing through the same network."""
    _passing.shared = shared
    try:
        yield
    finally:
        _passing.shared = None


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention "sdpa"; query, key, value (batch, heads, length, head size) -> (batch, length, heads, head size)."""
    shared: Shared | None = getattr(_passing, "shared", None)
    if shared is None:
        return _attend(module, query, key, value, attention_mask, **more), None
    n, first, rest = shared.beginning, shared.own[0], shared.own[1:]
    queries = query.split([n + first, *rest], 2)
    (keys, *own_keys), (values, *own_values) = key.split([n, first, *rest], 2), value.split([n, first, *rest], 2)
    outputs: list[Tensor] = []
    for q, k, v in zip(queries, own_keys, own_values, strict=True):
        mask = None
        if outputs:  # the first sequence is the beginning and its own tokens, as if it were alone
            mask = torch.ones(q.shape[2], n + q.shape[2], dtype=torch.bool, device=q.device).tril_(n)[None, None]
        outputs.append(_attend(module, q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask, **more))
    return torch.cat(outputs, 1), None


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= SHORT
    if short and torch.is_grad_enabled():
        y, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **more)
        return y.bfloat16()
    return sdpa_attention_forward(module, query, key, value, mask, **more)[0]


def use(network: Any) -> None:
    """Have a network of "sdpa" attention attend by `attend`; one of another kind keeps its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(NAME)


def can_share(network: Any) -> bool:
    """Whether sequences may share a row: every layer attends by `attend` to all that came before, and nothing else lasts
    from token to token (no sliding window, no recurrent state).
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if network.config._attn_implementation != NAME or not getattr(network, "_supports_attention_backend", False):
        return False
    layers = DynamicCache(config=network.config).layers
    return len(layers) == network.config.get_text_config().num_hidden_layers and all(
        type(x) is DynamicLayer for x in layers
    )
