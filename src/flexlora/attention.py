"""Attention over rows in which several sequences share a beginning, and in bfloat16 on a processor.

Each sequence of a shared row attends to the beginning and to its own tokens, block by block (`blockwise`): one attention over
the whole row would multiply what the mask takes away. Where a mask says who sees whom torch's kernel attends, whose way back in
bfloat16 is slower than casts and float32 up to some length (docs/log.md has the figures).

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

from flexlora import blockwise
from flexlora.blockwise import blocks
from flexlora.rows import Shared

NAME = "flexlora"
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
    training, dtype = torch.is_grad_enabled(), query.dtype
    if as_asked and (shared or training) and _plain(module, query, key, more):
        _passing.attentions += 1
        half = between and _Half(between, _passing.attentions)
        lie = shared or Shared(query.shape[2], ())
        return _Attention.apply(query, key, value, lie, half, more.get("scaling")).transpose(1, 2), None
    if between:
        raise RuntimeError("half a row cannot attend by a mask: `halves_rows` of the network is not so")
    if training and _is_short(key):
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        if more.get("position_bias") is not None:
            more["position_bias"] = more["position_bias"].float()
    y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    return y.to(dtype), None


def _is_short(key: Tensor) -> bool:
    """Whether the way back of torch's attention to `key` (batch, heads, length, head size) is faster in float32."""
    return key.dtype == torch.bfloat16 and key.device.type == "cpu" and key.shape[2] <= SHORT


def _plain(module: Any, query: Tensor, key: Tensor, more: dict[str, Any]) -> bool:
    """Whether it is causal attention on a processor, of all tokens and with nothing else to it."""
    causal = more.get("is_causal")
    return (
        query.device.type == "cpu"
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape[2] == key.shape[2]
        and not more.get("dropout")
        and more.get("position_bias") is None
        and more.get("softcap") is None
    )


class _Half(NamedTuple):
    """Which attention of half a row it is."""

    between: Between
    number: int


class _Attention(torch.autograd.Function):
    """Causal attention, (batch, heads, length, head size) as is what it takes, of rows that lie as `shared` says, or of `half` of one."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, shared: Shared, half: _Half | None, scale: float | None
    ) -> Tensor:
        before: tuple[Tensor, ...] = ()
        if half and shared.before:
            before = half.between.hear("keys", half.number)
        elif half:
            half.between.tell("keys", half.number, (k, v))
        ctx.shared, ctx.half, ctx.scale = shared, half, q.shape[-1] ** -0.5 if scale is None else scale
        # A fake tensor, by which memory is estimated, keeps what a real one keeps, and attends to nothing.
        ctx.plan = blocks(shared, q.shape[1], q.shape[1] // k.shape[1]) if type(q) is Tensor else []
        y = blockwise.attention(q, *_with_front(k, v, before, shared), ctx.plan, ctx.scale)
        ctx.save_for_backward(q, k, v, y, *before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, y, *before = ctx.saved_tensors
        shared: Shared = ctx.shared
        half: _Half | None = ctx.half
        keys, values = _with_front(k, v, before, shared)
        dq, *found = blockwise.gradients(grad, q, keys, values, y, ctx.plan, ctx.scale)
        front = shared.before + shared.cut_off
        dk, dv = (x[:, :, front:] for x in found)
        if half and before:
            theirs = tuple(torch.zeros(x.shape, dtype=dk.dtype) for x in before)
            for total, x in zip(theirs, found, strict=True):
                total[:, :, : shared.before] += x[:, :, : shared.before]
                total[:, :, total.shape[2] - shared.cut_off :] += x[:, :, shared.before : front]
            half.between.tell("gradients", half.number, theirs)
        elif half:
            for total, x in zip((dk, dv), half.between.hear("gradients", half.number), strict=True):
                total += x
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _with_front(k: Tensor, v: Tensor, before: Sequence[Tensor], shared: Shared) -> list[Tensor]:
    """Keys and values of a row, behind those of the half `before` it that any of its tokens sees."""
    if not before:
        return [k, v]
    cut = before[0].shape[2] - shared.cut_off
    return [torch.cat([x[:, :, : shared.before], x[:, :, cut:], y], 2) for x, y in zip(before, (k, v), strict=True)]


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
    if not can_share(network):
        return False
    shared, device = Shared(2, (1, 1)), next(network.parameters()).device
    mask = shared.mask(device)
    ids = torch.zeros(1, 4, dtype=torch.long, device=device)
    with torch.inference_mode(), sharing(shared, mask):
        network(input_ids=ids, attention_mask=mask, position_ids=shared.positions(device), use_cache=False)
        return _passing.attentions == network.config.get_text_config().num_hidden_layers
