"""A linear layer that carries one adapter at a time.

`AdaptedLinear` is an nn.Linear whose class is exchanged in place: the module object, its base weight and the names in
the state dict stay as they are. What it adds is PEFT's forward pass, ``y = W x + scaling · B A dropout(x)``, or
SLoRA's ``y = (W + D) x`` with a sparse D.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexlora import nf4
from flexlora.products import FEW, mm

HALF = (torch.bfloat16, torch.float16)
_draws = threading.local()


@dataclass
class Factors:
    """One low-rank term inside a layer, in PEFT's terms: ``scaling * B @ A``."""

    A: Tensor
    """(r, d_in)"""
    B: Tensor
    """(d_out, r): without the scaling."""
    scaling: float = 1.0
    dropout: float = 0.0
    """Probability that an input of A is dropped while training."""


@dataclass
class Scattered:
    """One sparse term inside a layer: ``D.flatten()[index] = values``."""

    values: Tensor
    """(k,)"""
    index: Tensor
    """(k,) int64"""


class Remade:
    """How the input of adapted layers is made again on the way back rather than kept, of tensors that are kept anyway.

    Layers that have it in common make it once: it is held until the last of them has had it.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self.make = make
        self.users = 0
        self._held: Tensor | None = None

    def again(self, *of: Tensor) -> Tensor:
        """What `make` gives of `of`, on the way back, once for each layer that has it."""
        x = self.make(*of) if self._held is None else self._held
        self.users -= 1
        self._held = x if self.users > 0 else None
        return x


def remake(x: Tensor, make: Callable[..., Tensor], *of: Tensor) -> None:
    """Have adapted layers whose input is x keep `of` instead, where gradients are recorded; `make`, of the same, gives x to the
    last bit without them.
    """
    if torch.is_grad_enabled():
        marked: Any = x
        marked.remade = x._version, (Remade(make), *(y.detach() for y in of))


def remade(x: Tensor) -> tuple[Remade | None, *tuple[Tensor, ...]]:
    """What `remake` said of x, which has not been changed since."""
    version, made = getattr(x, "remade", (None, (None,)))
    return made if version is not None and version == x._version else (None,)


class FrozenLinear(nn.Linear):
    """x (..., d_in) -> (..., d_out) through a weight (d_out, d_in) that nothing trains."""

    packed: Any = None
    """What unpacks `weight` where it is in four bits."""

    def dense(self) -> Tensor:
        """The weight (d_out, d_in), unpacked if it has to be."""
        return self.weight if self.packed is None else nf4.unpack(self.weight, self.packed)

    def pack(self, device: torch.device) -> None:
        """Hold the weight in four bits, on `device`."""
        self.weight, self.packed = nf4.pack(self.weight, device)

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self)


class AdaptedLinear(FrozenLinear):
    """x (..., d_in) -> (..., d_out) through the frozen weight (d_out, d_in), an adapter, and a frozen low-rank term."""

    term: Factors | Scattered | None
    """What this client trains or scores; None: the bare base layer."""
    extra: Factors | None
    """Fixed low-rank term on top of the base weight (flora, fedex, florist)."""

    def forward(self, input: Tensor) -> Tensor:
        term = self.term
        if isinstance(term, Scattered):
            y = _SparseLinear.apply(input, self, term.values, term.index)
        elif term is None or not len(term.A):
            y = super().forward(input)
        else:
            p = term.dropout if self.training else 0.0
            A, B = term.A.to(input.dtype), term.B.to(input.dtype)
            drop = dropped(input, p) if p else None
            y = _LowRankLinear.apply(input, drop, self, A, B, term.scaling / (1 - p), *remade(input))
        if self.extra is not None:
            A, B = self.extra.A.to(input.dtype), self.extra.B.to(input.dtype)
            y = y + F.linear(F.linear(input, A), B) * self.extra.scaling
        return y


class _FrozenLinear(torch.autograd.Function):
    """y = W x + b, with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return _through(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer: FrozenLinear = ctx.layer
        return mm(grad.flatten(0, -2), layer.dense()).view(*grad.shape[:-1], layer.in_features), None


def _through(x: Tensor, layer: FrozenLinear) -> Tensor:
    y = mm(x.flatten(0, -2), layer.dense().T).view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y.add_(layer.bias)


class _LowRankLinear(torch.autograd.Function):
    """y = W x + b + s B A z with z = x, or x without what was `dropped`: the low-rank term is added inside the products.

    Against the same in plain operations it saves three passes over (tokens, d_out) and (tokens, d_in), and the memory
    of the products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drop: Tensor | None,
        layer: FrozenLinear,
        A: Tensor,
        B: Tensor,
        s: float,
        made: Remade | None,
        *of: Tensor,
    ) -> Tensor:
        h = mm(_kept(x, drop), A.T)  # (tokens, r)
        if x.dtype in HALF and (any(ctx.needs_input_grad) or len(h) > FEW):
            y = _rounded_once(x, h, layer, B * s)
        else:
            y = _through(x, layer)
            y.view(-1, y.shape[-1]).addmm_(h, B.T, alpha=s)
        # not z: several layers have their x in common
        ctx.save_for_backward(drop, A, B, h, *(of if made else (x,)))
        ctx.layer, ctx.s, ctx.made = layer, s, made
        if made and ctx.needs_input_grad[3]:
            made.users += 1
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        drop, A, B, h, *of = ctx.saved_tensors
        need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        g = grad.flatten(0, -2)  # (tokens, d_out)
        dh = mm(g, B)
        dx = dA = dB = None
        if need_x:
            dx = mm(g, ctx.layer.dense())
            if drop is None:
                dx.addmm_(dh, A, alpha=ctx.s)
            else:
                dx.add_(_without(mm(dh, A), drop), alpha=ctx.s)
            dx = dx.view(*grad.shape[:-1], A.shape[1])
        if need_A:
            x = ctx.made.again(*of) if ctx.made else of[0]
            dA = mm(dh.T, _kept(x, drop)).mul_(ctx.s)
        if need_B:
            dB = mm(g.T, h).mul_(ctx.s)
        return dx, None, None, dA, dB, None, None, *(None for _ in of)


def _rounded_once(x: Tensor, h: Tensor, layer: FrozenLinear, B: Tensor) -> Tensor:
    """W x + b + B h as one product. In half precision W x, once rounded, would swallow every term below half its last
    digit, which is most of what an adapter adds in its first steps.
    """
    joined, weights = torch.cat([x.flatten(0, -2), h], 1), torch.cat([layer.dense(), B], 1)
    y = mm(joined, weights.T).view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y.add_(layer.bias)


@contextmanager
def dropout_from(source: torch.Generator) -> Iterator[None]:
    """Have `dropped` draw from `source` in this thread, on a processor, rather than from the global generator."""
    _draws.source = source
    try:
        yield
    finally:
        _draws.source = None


def dropped(x: Tensor, p: float) -> Tensor:
    """Which entries of x are dropped, each by itself with probability p: their places in x.flatten(), or a mask.

    On a processor the gaps between them are drawn, which are geometric: n p numbers instead of n.
    """
    if x.device.type != "cpu":
        return torch.rand((x.shape[:-1].numel(), x.shape[-1]), device=x.device) < p
    n, expected = x.numel(), x.numel() * p
    if type(x) is not Tensor:  # a fake one, by which memory is estimated: has no places, but room for them
        return torch.zeros(round(expected), dtype=torch.long)
    few = int(expected + 6 * expected**0.5) + 8
    at, source = torch.full((1,), -1), getattr(_draws, "source", None)
    while int(at[-1]) < n - 1:  # once is enough but once in a billion times
        gaps = torch.rand(few, generator=source).neg_().log1p_().div_(math.log1p(-p)).long().add_(1)
        at = torch.cat([at, gaps.cumsum_(0).add_(at[-1])])
    return at[1 : int(torch.searchsorted(at, n))]


def _kept(x: Tensor, drop: Tensor | None) -> Tensor:
    """x as (tokens, d_in), in a copy of its own where something is dropped."""
    flat = x.flatten(0, -2)
    return flat if drop is None else _without(flat.clone(memory_format=torch.contiguous_format), drop)


def _without(x: Tensor, drop: Tensor) -> Tensor:
    """x (tokens, d), contiguous, with zeros where something is dropped; in place."""
    if drop.dtype == torch.bool:
        return x.masked_fill_(drop, 0)
    x.view(-1).index_fill_(0, drop, 0)
    return x


class _SparseLinear(torch.autograd.Function):
    """y = (W + D) x, with gradients for x and the values of D; W + D is built twice rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.layer = layer
        return F.linear(x, _scatter(layer.dense(), values, index), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        x, values, index = ctx.saved_tensors
        g = grads[0]
        dx = g @ _scatter(ctx.layer.dense(), values, index) if ctx.needs_input_grad[0] else None
        dvalues = None
        if ctx.needs_input_grad[2]:
            dense = g.flatten(0, -2).T @ x.flatten(0, -2)  # (d_out, d_in)
            dvalues = dense.flatten()[index].to(values.dtype)
        return dx, None, dvalues, None


def _scatter(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    flat = weight.detach().clone().view(-1)
    return flat.index_add_(0, index, values.detach().to(flat.dtype)).view(weight.shape)


def freeze(module: nn.Linear) -> FrozenLinear:
    """Make a plain nn.Linear a FrozenLinear, in place."""
    module.__class__ = FrozenLinear
    assert isinstance(module, FrozenLinear)
    module.requires_grad_(False)
    return module


def adapt(module: nn.Linear) -> AdaptedLinear:
    """Make a plain nn.Linear an AdaptedLinear, in place; its weight and bias are frozen."""
    module.__class__ = AdaptedLinear
    assert isinstance(module, AdaptedLinear)
    module.requires_grad_(False)
    module.term = None
    module.extra = None
    return module
