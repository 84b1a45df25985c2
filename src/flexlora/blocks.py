"""Parts of a decoder layer that keep less for the way back than their plain operations do."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexlora.adapted import remake
from flexlora.products import empty


def product(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) · u of two tensors of one shape, where no gradient is recorded."""
    return F.silu(g).mul_(u)


class Gate(torch.autograd.Function):
    """silu(g) · u of a gate g and what it gates, u; keeps these two, where plain operations keep silu(g) too."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return product(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * u, g), product(g, grad)


class Gated(nn.Module):
    """What a gated feed-forward block becomes: the same to the last bit, but its product is made twice rather than kept."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.gate_proj(x), self.up_proj(x)
        y = Gate.apply(g, u)
        remake(y, product, g, u)
        return self.down_proj(y)


COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


class RootMeanSquare(torch.autograd.Function):
    """w x / √(mean(x²) + ε) of x (..., d) and w (d,), the mean over d (RMSNorm, arXiv 1910.07467, equation 4), with a gradient for
    x alone; on a processor. What is in half precision is computed in float32, but for the product with w.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        h, y = _single(x), empty(*x.shape)
        scale = torch.mul(h, h, out=y).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return torch.mul(h, scale, out=y).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, weight = ctx.saved_tensors
        h, along = _single(x), empty(*x.shape)
        dx = torch.mul(_single(grad), weight, out=empty(*x.shape))
        share = torch.mul(dx, h, out=along).mean(-1, keepdim=True).mul_(scale**3)
        return dx.mul_(scale).sub_(torch.mul(h, share, out=along)).to(x.dtype), None, None


def _single(x: Tensor) -> Tensor:
    """x in float32, itself where it is."""
    return x if x.dtype == torch.float32 else empty(*x.shape).copy_(x)


class Normed(nn.Module):
    """What a norm of the LLaMA kind becomes: the same to the last bit, in memory that is used again (`products.empty`)."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Tensor and x.dtype == self.weight.dtype and x.device.type == "cpu" and x.dtype in COMPUTED:
            return RootMeanSquare.apply(x, self.weight, self.variance_epsilon)
        return super().forward(x)


def use(network: nn.Module) -> None:
    """Have feed-forward blocks of the LLaMA kind, by whatever name, be `Gated` and its norms `Normed`: those whose code is the
    same. What a norm makes, of the stream that is kept anyway, is made twice.
    """
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    classes: dict[type, type] = {}

    def become(module: nn.Module, new: type[nn.Module]) -> None:
        kind = type(module)
        module.__class__ = classes.setdefault(kind, type(kind.__name__, (new, kind), {}))

    for module in network.modules():
        if _same(module, LlamaMLP) and "silu" in type(module.act_fn).__name__.lower():
            become(module, Gated)
        elif _is_norm(module):
            if _same(module, LlamaRMSNorm):
                become(module, Normed)
            module.register_forward_hook(_normed, with_kwargs=True)


def _same(module: nn.Module, known: type[nn.Module]) -> bool:
    codes = [getattr(kind.forward, "__code__", None) for kind in (type(module), known)]
    ours, theirs = [code and (code.co_code, code.co_names, code.co_consts) for code in codes]
    return ours == theirs


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the last dimension, which does the same every time and is not trained."""
    weights = list(module.parameters())
    return (
        "norm" in type(module).__name__.lower()
        and not list(module.children())
        and not list(module.buffers())
        and all(x.ndim == 1 and not x.requires_grad for x in weights)
    )


def _normed(norm: nn.Module, args: tuple[Any, ...], more: dict[str, Any], y: Any) -> None:
    if len(args) == 1 and not more and isinstance(y, Tensor):
        remake(y, functools.partial(_norm, norm), *args)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return norm.forward(x)
