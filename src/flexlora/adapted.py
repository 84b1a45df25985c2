"""A linear layer that carries one adapter at a time.

`AdaptedLinear` is an nn.Linear whose class is exchanged in place: the module object, its base weight and the names in
the state dict stay as they are. What it adds is PEFT's forward pass, ``y = W x + scaling · B A dropout(x)``, or
SLoRA's ``y = (W + D) x`` with a sparse D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class AdaptedLinear(nn.Linear):
    """x (..., d_in) -> (..., d_out) through the frozen weight (d_out, d_in), an adapter, and a frozen low-rank term."""

    term: Factors | Scattered | None
    """What this client trains or scores; None: the bare base layer."""
    extra: Factors | None
    """Fixed low-rank term on top of the base weight (flora, fedex, florist)."""

    def forward(self, input: Tensor) -> Tensor:
        term = self.term
        if isinstance(term, Scattered):
            y = _SparseLinear.apply(input, self.weight, self.bias, term.values, term.index)
        else:
            y = super().forward(input)
            if term is not None and len(term.A):
                x = F.dropout(input, term.dropout, self.training) if term.dropout else input
                y = y + low_rank(x, term)
        if self.extra is not None:
            y = y + low_rank(input, self.extra)
        return y


def low_rank(x: Tensor, term: Factors) -> Tensor:
    """scaling · B A x for x (..., d_in), in the dtype of x."""
    return F.linear(F.linear(x, term.A.to(x.dtype)), term.B.to(x.dtype)) * term.scaling


class _SparseLinear(torch.autograd.Function):
    """y = (W + D) x, with gradients for x and the values of D; W + D is built twice rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, values, index)
        return F.linear(x, _scatter(weight, values, index), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        x, weight, values, index = ctx.saved_tensors
        g = grads[0]
        dx = g @ _scatter(weight, values, index) if ctx.needs_input_grad[0] else None
        dvalues = None
        if ctx.needs_input_grad[3]:
            dense = g.flatten(0, -2).T @ x.flatten(0, -2)  # (d_out, d_in)
            dvalues = dense.flatten()[index].to(values.dtype)
        return dx, None, None, dvalues, None


def _scatter(weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    flat = weight.detach().clone().view(-1)
    return flat.index_add_(0, index, values.detach().to(flat.dtype)).view(weight.shape)


def adapt(module: nn.Linear) -> AdaptedLinear:
    """Make a plain nn.Linear an AdaptedLinear, in place; its weight and bias are frozen."""
    module.__class__ = AdaptedLinear
    assert isinstance(module, AdaptedLinear)
    module.requires_grad_(False)
    module.term = None
    module.extra = None
    return module
