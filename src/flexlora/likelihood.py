"""The loss of a language model in one pass over its logits, which are the largest tensor of local training.

`F.cross_entropy` keeps the logits, their log-softmax and its gradient at once: 3 · labels · vocabulary floats. Here the
gradient takes the place of the logits where nobody else needs them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64
"""Labels that are worked on together: their logits stay in a processor's cache."""


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood in nats, summed: logits (n, vocabulary), labels (n,) int64 -> float32 scalar.

    Float32 logits that come straight from a matrix product are overwritten.
    """
    if logits.requires_grad and torch.is_grad_enabled():
        return _Likelihood.apply(logits, labels, _unshared(logits))
    pieces = zip(logits.split(ROWS), labels.split(ROWS), strict=True)
    parts = [F.cross_entropy(x.float(), y, reduction="sum") for x, y in pieces]
    return torch.stack(parts).sum()


def _unshared(logits: Tensor) -> bool:
    """Whether what made the logits has no need of them to send gradients back."""
    made: Any = logits.grad_fn
    while made is not None and made.name() in ("SelectBackward0", "ViewBackward0", "UnsafeViewBackward0"):
        made = made.next_functions[0][0]
    return made is not None and made.name() in ("_FrozenLinearBackward", "MmBackward0")


class _Likelihood(torch.autograd.Function):
    """Σ log Σ exp x − x[label]; its gradient, softmax(x) − onehot, is made on the way forward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, unshared: bool) -> Tensor:
        source = logits.detach()
        grad = source if unshared and source.dtype == torch.float32 else source.to(torch.float32, copy=True)
        loss = grad.new_zeros(())
        for x, y in zip(grad.split(ROWS), labels.split(ROWS), strict=True):
            x.sub_(x.amax(-1, keepdim=True))  # before the logarithm: large logits keep their last digits
            total, chosen = x.logsumexp(-1, keepdim=True), y[:, None]
            loss += (total - x.gather(-1, chosen)).sum()
            x.sub_(total).exp_().scatter_add_(-1, chosen, x.new_full((len(y), 1), -1.0))
        ctx.save_for_backward(grad)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_output).to(ctx.dtype), None, None
