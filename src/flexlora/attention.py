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
from torch.autograd.function import once_differentiable

from flexlora.products import empty
from flexlora.rows import Shared

NAME = "flexlora"
_KERNEL = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
"""Whether torch has what `F.scaled_dot_product_attention` calls on a processor; where not, the row's mask does."""
if _KERNEL:
    _forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    _backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
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
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shared: Shared | None = getattr(_passing, "shared", None)
    longest = key.shape[2] if shared is None else shared.beginning + max(shared.own)
    on_cpu, dtype = query.device.type == "cpu", query.dtype
    if on_cpu and dtype == torch.bfloat16 and longest <= SHORT and torch.is_grad_enabled():
        query, key, value = query.float(), key.float(), value.float()
    if shared is not None and on_cpu and _KERNEL and _plain(query, value, more):
        y = _SharedAttention.apply(query, key, value, shared, more.get("scaling")).transpose(1, 2)
    else:
        y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    return y.to(dtype), None


def _plain(query: Tensor, value: Tensor, more: dict[str, Any]) -> bool:
    return (
        not more.get("dropout")
        and more.get("position_bias") is None
        and more.get("softcap") is None
        and query.shape[-1] == value.shape[-1]
    )


class _SharedAttention(torch.autograd.Function):
    """Attention in a row that sequences share, (1, heads, length, head size) as is what it takes; keys and values of as many heads
    as there are.

    Softmax over two sets of keys is the mean of the two, weighted by the sums of their exponentials: all sequences attend to
    the beginning in one go, and each to its own tokens. The way back of either part asks for the sum over both alone, so that
    nothing but the input, the output and these sums is kept, and no key is copied for a sequence.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared, scale: float | None) -> Tensor:
        batch, heads, length, size = q.shape
        y = empty(batch, length, heads, size).transpose(1, 2) if q.dtype == torch.float32 else torch.empty_like(q)
        logs = torch.empty(q.shape[:3], dtype=torch.float32)
        for part in (slice(0, shared.beginning), *shared.parts()):
            y[:, :, part], logs[:, :, part] = _forward(
                q[:, :, part], k[:, :, part], v[:, :, part], 0.0, True, scale=scale
            )
        head, rest = slice(0, shared.beginning), slice(shared.beginning, None)
        seen, log = _forward(q[:, :, rest], k[:, :, head], v[:, :, head], 0.0, False, scale=scale)
        total = torch.logaddexp(log, logs[:, :, rest])
        y[:, :, rest].lerp_(seen, log.sub_(total).exp_().unsqueeze(-1).to(y.dtype))
        logs[:, :, rest] = total
        ctx.save_for_backward(q, k, v, y, logs)
        ctx.shared, ctx.scale = shared, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, logs = ctx.saved_tensors
        shared: Shared = ctx.shared

        def back(of: slice, to: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            sides = grad[:, :, of], q[:, :, of], k[:, :, to], v[:, :, to], y[:, :, of], logs[:, :, of]
            return _backward(*sides, 0.0, causal, scale=ctx.scale)

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        head, rest = slice(0, shared.beginning), slice(shared.beginning, None)
        for part in (head, *shared.parts()):
            dq[:, :, part], dk[:, :, part], dv[:, :, part] = back(part, part, True)
        for total, x, of in zip((dq, dk, dv), back(rest, head, False), (rest, head, head), strict=True):
            total[:, :, of] += x
        return dq, dk, dv, None, None


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
