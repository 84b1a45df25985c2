"""Parts of a decoder layer that keep less for the way back than their plain operations do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexlora.adapted import AdaptedLinear


class Gate(torch.autograd.Function):
    """silu(g) · u of a gate g and what it gates, u; keeps these two, where plain operations keep silu(g) too."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * u, g), F.silu(g).mul_(grad)


class Gated(nn.Module):
    """What a gated feed-forward block becomes: the same to the last bit, but its product is made twice rather than kept."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.gate_proj(x), self.up_proj(x)
        y = Gate.apply(g, u)
        return self.down_proj(y, (g, u)) if isinstance(self.down_proj, AdaptedLinear) else self.down_proj(y)


def use(network: nn.Module) -> None:
    """Have blocks of the LLaMA kind, by whatever name, be `Gated`: those whose code and activation are the same."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    known = LlamaMLP.forward.__code__
    classes: dict[type, type] = {}
    for module in network.modules():
        kind = type(module)
        code = getattr(kind.forward, "__code__", None)
        same = code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)
        if same and "silu" in type(module.act_fn).__name__.lower():
            module.__class__ = classes.setdefault(kind, type(kind.__name__, (Gated, kind), {}))
