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
    extra: Factors | None = None
    """Fixed low-rank term on top of the base weight (flora, fedex, florist)."""

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

    def forward(self, input: Tensor) -> Tensor:
        term = self.term
        if isinstance(term, Scattered):
            return _SparseLinear.apply(input, self, term.values, term.index)
        if term is None or not len(term.A):
            return super().forward(input)
        p = term.dropout if self.training else 0.0
        A, B = term.A.to(input.dtype), term.B.to(input.dtype)
        drop = dropped(input, p) if p else None
        return _LowRankLinear.apply(input, drop, self, A, B, term.scaling / (1 - p), *remade(input))


class _FrozenLinear(torch.autograd.Function):
    """y = (W + Δ) x + b with Δ the frozen term, and a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return _through(x, layer, [layer.dense()], [], ctx.needs_input_grad[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layer: FrozenLinear = ctx.layer
        return _back(grad.flatten(0, -2), layer, [layer.dense()]).view(*grad.shape[:-1], layer.in_features), None


def _through(
    x: Tensor,
    layer: FrozenLinear,
    weights: list[Tensor],
    terms: list[tuple[Tensor, Tensor, float]],
    gradients: bool,
) -> Tensor:
    """(Σ W) x + b + Δ x + Σ s B h of `terms` (h, B, s), h (tokens, r).

    In half precision it is one product: W x, once rounded, would swallow every term below half its last digit, which is most
    of what an adapter adds in its first steps. Not so where few tokens are decoded, for which reading W is the work.
    """
    flat = x.flatten(0, -2)
    if layer.extra is not None:
        A, B = layer.extra.A.to(x.dtype), layer.extra.B.to(x.dtype)
        terms = [*terms, (mm(flat, A.T), B, layer.extra.scaling)]
    sides = [flat] * len(weights)
    if x.dtype in HALF and (gradients or len(flat) > FEW):
        sides, weights = sides + [h for h, _, _ in terms], weights + [B * s for _, B, s in terms]
        terms = []
    y = mm(_joined(sides, 1), _joined(weights, 1).T)
    for h, B, s in terms:
        y.addmm_(h, B.T, alpha=s)
    y = y.view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y.add_(layer.bias)


def _back(g: Tensor, layer: FrozenLinear, weights: list[Tensor]) -> Tensor:
    """(Σ W + Δ)ᵀ g, g (tokens, d_out)."""
    dx = mm(_joined([g] * len(weights), 1), _joined(weights, 0))
    if layer.extra is not None:
        A, B = layer.extra.A.to(g.dtype), layer.extra.B.to(g.dtype)
        dx.addmm_(mm(g, B), A, alpha=layer.extra.scaling)
    return dx


def _joined(parts: list[Tensor], side: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, side)


class _LowRankLinear(torch.autograd.Function):
    """y = (W + Δ) x + b + s B A z with z = x, or x without what was `dropped`: the low-rank term is added inside the products.

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
        y = _through(x, layer, [layer.dense()], [(h, B, s)], any(ctx.needs_input_grad))
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
            dx = _back(g, ctx.layer, [ctx.layer.dense()])
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


class _SparseLinear(torch.autograd.Function):
    """y = (W + Δ + D) x + b, with gradients for x and the values of D; W + D is built twice rather than kept.

    In half precision W and D are not added, where W would swallow D, but stand side by side in one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, index)
        ctx.layer = layer
        return _through(x, layer, _with_sparse(layer.dense(), values, index), [], any(ctx.needs_input_grad))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, values, index = ctx.saved_tensors
        g = grad.flatten(0, -2)  # (tokens, d_out)
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = _back(g, ctx.layer, _with_sparse(ctx.layer.dense(), values, index)).view(x.shape)
        if ctx.needs_input_grad[2]:
            dvalues = mm(g.T, x.flatten(0, -2)).flatten()[index].to(values.dtype)
        return dx, None, dvalues, None


def _with_sparse(weight: Tensor, values: Tensor, index: Tensor) -> list[Tensor]:
    """W + D, in half precision [W, D]."""
    half = weight.dtype in HALF
    D = (torch.zeros_like(weight) if half else weight.detach().clone()).view(-1)
    D = D.index_add_(0, index, values.detach().to(D.dtype)).view(weight.shape)
    return [weight, D] if half else [D]


@contextmanager
def dropout_from(source: torch.Generator, second: torch.Generator | None = None, length: int = 0) -> Iterator[None]:
    """Have `dropped` draw from `source` in this thread, on a processor, rather than from the global generator.

    With a `second` one, the latter half of a row of `length` tokens is drawn from that, as if it passed by itself.
    """
    _draws.source, _draws.second, _draws.length = source, second, length
    try:
        yield
    finally:
        _draws.source = _draws.second = None


def dropped(x: Tensor, p: float) -> Tensor:
    """Which entries of x are dropped, each by itself with probability p: their places in x.flatten(), or a mask.

    On a processor the gaps between them are drawn, which are geometric: n p numbers instead of n.
    """
    if x.device.type != "cpu":
        return torch.rand((x.shape[:-1].numel(), x.shape[-1]), device=x.device) < p
    n = x.numel()
    if type(x) is not Tensor:  # a fake one, by which memory is estimated: has no places, but room for them
        return torch.zeros(round(n * p), dtype=torch.long)
    source, second = getattr(_draws, "source", None), getattr(_draws, "second", None)
    if second is None or x.shape[:-1].numel() != _draws.length:  # experts see some of a row's tokens
        return _places(n, p, source)
    first = _draws.length // 2 * x.shape[-1]
    return torch.cat([_places(first, p, source), _places(n - first, p, second).add_(first)])


def _places(n: int, p: float, source: torch.Generator | None) -> Tensor:
    """Numbers below n, each with probability p, ascending."""
    expected = n * p
    few = int(expected + 6 * expected**0.5) + 8
    at = torch.full((1,), -1)
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
