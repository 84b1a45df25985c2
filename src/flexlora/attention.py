"""Attention over rows in which several sequences share a beginning, and in bfloat16 on a processor.

Each sequence of a shared row attends by itself, to the beginning and to its own tokens: one attention over the whole row
would multiply what the mask takes away. And torch's bfloat16 kernel is slow on its way back, where it multiplies tiny blocks
one by one: up to some length the float32 kernel is faster there, casts included (docs/log.md has the figures).

A row that is cut in two passes through the network in two threads: attention is where one half needs the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

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


class Between:
    """What the two halves of a row tell each other, attention by attention, while each passes in a thread of its own: the one that
    leads its keys and values, the one that follows their gradients.
    """

    def __init__(self) -> None:
        self._said: dict[tuple[str, int], Future[tuple[Tensor, ...]]] = {}
        self._ended: BaseException | None = None
        self._changing = threading.Lock()

    def _about(self, what: str, number: int) -> Future[tuple[Tensor, ...]]:
        said = self._said.get((what, number))
        if said is None:
            if self._ended:
                raise self._ended
            said = self._said[what, number] = Future()
        return said

    def tell(self, what: str, number: int, said: tuple[Tensor, ...]) -> None:
        with self._changing:
            self._about(what, number).set_result(said)

    def hear(self, what: str, number: int) -> tuple[Tensor, ...]:
        """What the other half told, once it has; raises what ended it before."""
        with self._changing:
            said = self._about(what, number)
        heard = said.result()
        with self._changing:
            del self._said[what, number]
        return heard

    def end(self, error: BaseException) -> None:
        """Nothing more will be told: who waits for it, or will, fails with `error`."""
        with self._changing:
            self._ended = self._ended or error
            for said in self._said.values():
                if not said.done():
                    said.set_exception(error)

    def forget(self) -> None:
        """Let go of what was told and of what ended it, whose traceback holds a whole pass."""
        self._said, self._ended = {}, None


class _Passing(threading.local):
    """How the row lies that this thread passes through a network."""

    shared: Shared | None = None
    mask: Tensor | None = None
    between: Between | None = None
    attentions = 0
    """That have attended as `shared` says."""


_passing = _Passing()


@contextmanager
def sharing(shared: Shared | None, mask: Tensor | None, between: Between | None = None) -> Iterator[None]:
    """Have passes of this thread attend as `shared` says where they are given its `mask`; other threads may be passing through
    the same network, the other half of this row, with which it goes `between`, among them.
    """
    _passing.shared, _passing.mask, _passing.between, _passing.attentions = shared, mask, between, 0
    try:
        yield
    finally:
        _passing.shared = _passing.mask = _passing.between = None


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention "sdpa"; query, key, value (batch, heads, length, head size) -> (batch, length, heads, head size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shared, between = _passing.shared, _passing.between
    # A layer that makes a mask of its own of the row's has more to say than who sees whom.
    as_asked = attention_mask is (None if shared is None else _passing.mask)
    short, dtype = _is_short(key) and torch.is_grad_enabled(), query.dtype
    if as_asked and (shared or short) and _plain(module, query, key, value, more):
        _passing.attentions += 1
        half = between and _Half(between, _passing.attentions)
        return _Attention.apply(query, key, value, shared, half, more.get("scaling")).transpose(1, 2), None
    if between:
        raise RuntimeError("half a row cannot attend by a mask: `halves_rows` of the network is not so")
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


class _Half(NamedTuple):
    """Which attention of half a row it is."""

    between: Between
    number: int


class _Attention(torch.autograd.Function):
    """Causal attention, (batch, heads, length, head size) as is what it takes; keys and values of as many heads as there are. With
    `shared` it is of a row, (1, heads, length, head size), that sequences share, or of `half` of it.

    Softmax over two sets of keys is the mean of the two, weighted by the sums of their exponentials: all sequences attend to
    the beginning in one go, and each to its own tokens. The way back of either part asks for the sum over both alone, so that
    nothing but the input, the output and these sums is kept, and no key is copied for a sequence.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared | None, half: _Half | None, scale: float | None
    ) -> Tensor:
        before: tuple[Tensor, ...] = ()
        if half and shared and shared.before:
            before = half.between.hear("keys", half.number)
        elif half:
            half.between.tell("keys", half.number, (k, v))
        if shared is None:
            y, logs = _forward(q, k, v, 0.0, True, scale=scale)
        else:
            y, logs = _in_parts(q, k, v, before, shared, scale)
        ctx.save_for_backward(q, k, v, y, logs, *before)
        ctx.shared, ctx.half, ctx.scale = shared, half, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, logs, *before = ctx.saved_tensors
        shared: Shared | None = ctx.shared
        half: _Half | None = ctx.half
        dtype = q.dtype
        if _is_short(k, shared and max(shared.before, shared.beginning, *shared.own)):
            grad, q, k, v, y, *before = (x.float() for x in (grad, q, k, v, y, *before))
        if shared is None:
            found = _backward(grad, q, k, v, y, logs, 0.0, True, scale=ctx.scale)
        else:
            *found, theirs = _parts_back(grad, q, k, v, y, logs, before, shared, ctx.scale)
            if half and theirs:
                half.between.tell("gradients", half.number, theirs)
            elif half:
                for total, x in zip(found[1:], half.between.hear("gradients", half.number), strict=True):
                    total += x
        return *(x.to(dtype) for x in found), None, None, None


def _in_parts(
    q: Tensor, k: Tensor, v: Tensor, before: Sequence[Tensor], shared: Shared, scale: float | None
) -> tuple[Tensor, Tensor]:
    """What each token attends to, and the logarithm of its sum of exponentials."""
    batch, heads, length, size = q.shape
    y = empty(batch, length, heads, size).transpose(1, 2) if q.dtype == torch.float32 else torch.empty_like(q)
    logs = torch.empty(q.shape[:3], dtype=torch.float32)
    own, others = _views(shared, before)
    for part in own:
        y[:, :, part], logs[:, :, part] = _forward(q[:, :, part], k[:, :, part], v[:, :, part], 0.0, True, scale=scale)
    for of, to, here in others:
        keys, values = (k, v) if here else before
        seen, log = _forward(q[:, :, of], keys[:, :, to], values[:, :, to], 0.0, False, scale=scale)
        total = torch.logaddexp(log, logs[:, :, of])
        y[:, :, of].lerp_(seen, log.sub_(total).exp_().unsqueeze(-1).to(y.dtype))
        logs[:, :, of] = total
    return y, logs


def _parts_back(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    logs: Tensor,
    before: Sequence[Tensor],
    shared: Shared,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Gradients of q, k and v, and of the keys and values `before`."""

    def back(of: slice, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        sides = grad[:, :, of], q[:, :, of], keys, values, y[:, :, of], logs[:, :, of]
        return _backward(*sides, 0.0, causal, scale=scale)

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    theirs = tuple(torch.zeros_like(x) for x in before)
    own, others = _views(shared, before)
    for part in own:
        found = back(part, k[:, :, part], v[:, :, part], True)
        dq[:, :, part], dk[:, :, part], dv[:, :, part] = found
    for of, to, here in others:
        keys, values = (k, v) if here else before
        found = back(of, keys[:, :, to], values[:, :, to], False)
        for total, x, place in zip((dq, *((dk, dv) if here else theirs)), found, (of, to, to), strict=True):
            total[:, :, place] += x
    return dq, dk, dv, theirs


def _views(shared: Shared, before: Sequence[Tensor]) -> tuple[list[slice], list[tuple[slice, slice, bool]]]:
    """The parts of a row that see what of themselves came first; and who sees what else, in this row or of what is `before` it."""
    head, rest, parts = slice(0, shared.beginning), slice(shared.beginning, None), shared.parts()
    others = [(rest, head, True)] if parts and shared.beginning else []
    if before:
        others.append((slice(None), slice(0, shared.before), False))
    if shared.cut_off:
        others.append((parts[0], slice(before[0].shape[2] - shared.cut_off, None), False))
    return [head, *parts] if shared.beginning else parts, others


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


def halves_rows(network: Any) -> bool:
    """Whether half a row may follow the other: every layer attends by torch's kernel as a row says. Passes four tokens to find out."""
    if not _KERNEL or not can_share(network):
        return False
    shared, device = Shared(2, (1, 1)), next(network.parameters()).device
    mask = shared.mask(device)
    ids = torch.zeros(1, 4, dtype=torch.long, device=device)
    with torch.inference_mode(), sharing(shared, mask):
        network(input_ids=ids, attention_mask=mask, position_ids=shared.positions(device), use_cache=False)
        return _passing.attentions == network.config.get_text_config().num_hidden_layers
