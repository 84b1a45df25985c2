"""Attention over rows in which several sequences share a beginning, and in bfloat16 on a processor.

Each sequence of a shared row attends by itself, to the beginning and to its own tokens: one attention over the whole row
would multiply what the mask takes away. And torch's bfloat16 kernel is slow on its way back, where it multiplies tiny blocks
one by one: up to some length the float32 kernel is faster there, casts included (docs/log.md has the figures).
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
SHORT = 384
"""Tokens a sequence from which the bfloat16 kernel is as fast on its way back."""
_passing = threading.local()


@contextmanager
def sharing(shared: Shared | None, mask: Tensor | None) -> Iterator[None]:
    """Have passes of this thread attend as `shared` says where they are given its `mask`; other threads may be passing through
    the same network.
    """
    _passing.shared, _passing.mask = shared, mask
    try:
        yield
    finally:
        _passing.shared = _passing.mask = None


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention "sdpa"; query, key, value (batch, heads, length, head size) -> (batch, length, heads, head size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shared: Shared | None = getattr(_passing, "shared", None)
    # A layer that makes a mask of its own of the row's has more to say than who sees whom.
    as_asked = attention_mask is (None if shared is None else _passing.mask)
    short, dtype = _is_short(key) and torch.is_grad_enabled(), query.dtype
    if as_asked and (shared or short) and _plain(module, query, key, value, more):
        return _Attention.apply(query, key, value, shared, more.get("scaling")).transpose(1, 2), None
    if short:
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if more.get("position_bias") is not None:
            more["position_bias"] = more["position_bias"].float()
    y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    return y.to(dtype), None


def _is_short(key: Tensor, length: int | None = None) -> bool:
    """Whether the way back of attention to `key` (batch, heads, length, head size) is faster in float32."""
    return key.dtype == torch.bfloat16 and key.device.type == "cpu" and (length or key.shape[2]) <= SHORT


def _plain(module: Any, query: Tensor, key: Tensor, value: Tensor, more: dict[str, Any]) -> bool:
    """Whether it is causal attention that torch's kernel for a processor computes."""
    causal = more.get("is_causal")
    return (
        _KERNEL
        and query.device.type == "cpu"
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape[2] == key.shape[2]
        and not more.get("dropout")
        and more.get("position_bias") is None
        and more.get("softcap") is None
        and query.shape[-1] == value.shape[-1]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )


class _Attention(torch.autograd.Function):
    """Causal attention, (batch, heads, length, head size) as is what it takes; keys and values of as many heads as there are. With
    `shared` it is of a row, (1, heads, length, head size), that sequences share.

    Softmax over two sets of keys is the mean of the two, weighted by the sums of their exponentials: all sequences attend to
    the beginning in one go, and each to its own tokens. The way back of either part asks for the sum over both alone, so that
    nothing but the input, the output and these sums is kept, and no key is copied for a sequence.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared | None, scale: float | None) -> Tensor:
        if shared is None:
            y, logs = _forward(q, k, v, 0.0, True, scale=scale)
        else:
            y, logs = _in_parts(q, k, v, shared, scale)
        ctx.save_for_backward(q, k, v, y, logs)
        ctx.shared, ctx.scale = shared, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, logs = ctx.saved_tensors
        shared: Shared | None = ctx.shared
        dtype = q.dtype
        if _is_short(k, shared and max(shared.beginning, *shared.own)):
            grad, q, k, v, y = (x.float() for x in (grad, q, k, v, y))
        if shared is None:
            found = _backward(grad, q, k, v, y, logs, 0.0, True, scale=ctx.scale)
        else:
            found = _parts_back(grad, q, k, v, y, logs, shared, ctx.scale)
        return *(x.to(dtype) for x in found), None, None


def _in_parts(q: Tensor, k: Tensor, v: Tensor, shared: Shared, scale: float | None) -> tuple[Tensor, Tensor]:
    """What each token attends to, and the logarithm of its sum of exponentials."""
    batch, heads, length, size = q.shape
    y = empty(batch, length, heads, size).transpose(1, 2) if q.dtype == torch.float32 else torch.empty_like(q)
    logs = torch.empty(q.shape[:3], dtype=torch.float32)
    head, rest = slice(0, shared.beginning), slice(shared.beginning, None)
    for part in (head, *shared.parts()):
        y[:, :, part], logs[:, :, part] = _forward(q[:, :, part], k[:, :, part], v[:, :, part], 0.0, True, scale=scale)
    seen, log = _forward(q[:, :, rest], k[:, :, head], v[:, :, head], 0.0, False, scale=scale)
    total = torch.logaddexp(log, logs[:, :, rest])
    y[:, :, rest].lerp_(seen, log.sub_(total).exp_().unsqueeze(-1).to(y.dtype))
    logs[:, :, rest] = total
    return y, logs


def _parts_back(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, logs: Tensor, shared: Shared, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    def back(of: slice, to: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        sides = grad[:, :, of], q[:, :, of], k[:, :, to], v[:, :, to], y[:, :, of], logs[:, :, of]
        return _backward(*sides, 0.0, causal, scale=scale)

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    head, rest = slice(0, shared.beginning), slice(shared.beginning, None)
    for part in (head, *shared.parts()):
        dq[:, :, part], dk[:, :, part], dv[:, :, part] = back(part, part, True)
    for total, x, of in zip((dq, dk, dv), back(rest, head, False), (rest, head, head), strict=True):
        total[:, :, of] += x
    return dq, dk, dv


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
