"""The loss of a language model without its logits, which would be the largest tensor of local training.

`F.cross_entropy` keeps the logits, their log-softmax and its gradient at once: 3 · labels · vocabulary floats. Here the
frozen output layer belongs to the loss: it makes the logits of a few positions, these become their own gradient, and what
is kept is its product with the layer's weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flexlora.products import mm

PIECE = 128
"""Labels whose logits exist at once in float32; in half precision twice as many."""
ROWS = 32
"""Labels that are worked on together: their logits stay in a processor's cache."""


def negative_log_likelihood(
    x: Tensor, labels: Tensor, weights: Tensor | None = None, head: nn.Linear | None = None
) -> Tensor:
    """Negative log likelihood in nats, summed -> float32 scalar.

    Args:
        x: (n, d) states of which `head`, frozen, makes logits; without a head the (n, vocabulary) logits.
        labels: (n,) int64.
        weights: (n,) float32, how often each label counts; None: once.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Likelihood.apply(x, labels, weights, head)
    return token_nll(x, labels, head).float().dot(torch.ones_like(labels).float() if weights is None else weights)


def token_nll(x: Tensor, labels: Tensor, head: nn.Linear | None = None) -> Tensor:
    """Negative log likelihood (n,) in float64 of `labels` (n,), without gradients; x as in `negative_log_likelihood`."""
    found = []
    with torch.no_grad():
        for a, y in zip(x.split(PIECE), labels.split(PIECE), strict=True):
            for rows, label in zip(logits(a, head).split(ROWS), y.split(ROWS), strict=True):
                nll, _, _ = _exponentials(rows.to(torch.float32, copy=head is None), label[:, None])
                found.append(nll.double().squeeze(-1))
    return torch.cat(found)


def logits(x: Tensor, head: nn.Linear | None) -> Tensor:
    """x (n, d) through the output layer, without gradients; x itself where there is none."""
    if head is None:
        return x
    y = mm(x, head.weight.T)
    return y if head.bias is None else y.add_(head.bias)


class _Likelihood(torch.autograd.Function):
    """Σ w (log Σ exp z − z[label]) with z the logits of x; the gradient, of z w (softmax(z) − onehot), is made on the way forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, weights: Tensor | None, head: nn.Linear | None) -> Tensor:
        grad, loss = torch.empty_like(x), x.new_zeros((), dtype=torch.float32)
        size = PIECE * 4 // x.element_size()
        for a in range(0, len(x), size):
            piece = slice(a, a + size)
            grad[piece] = _piece(x[piece], labels[piece], None if weights is None else weights[piece], head, loss)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_output), None, None, None


def _piece(x: Tensor, labels: Tensor, weights: Tensor | None, head: nn.Linear | None, loss: Tensor) -> Tensor:
    """The gradient of a piece, whose loss is added to `loss`. Its logits end with the function, before there are others."""
    z = x.clone() if head is None else logits(x, head)
    for i in range(0, len(z), ROWS):
        rows = slice(i, i + ROWS)
        label = labels[rows, None]
        nll, part, total = _exponentials(z[rows].float(), label)
        weight = torch.ones_like(total) if weights is None else weights[rows, None]
        part.mul_(weight / total).scatter_add_(-1, label, -weight)
        if z.dtype != part.dtype:
            z[rows] = part
        loss += nll.mul_(weight).sum()
    return z if head is None else mm(z, head.weight)


def _exponentials(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log likelihood (n, 1) of labels (n, 1), exp(z − max z) in place of the logits z (n, vocabulary), its sums (n, 1); float32.

    Next to a likely word, torch's log-softmax in float32 loses those that are not (3 to 6 % of the loss where that is 7e-4, as
    measured); `sum`, which adds up pairwise, does not. In place, as new memory of this size costs as much as the exponentials.
    """
    chosen, top = z.gather(-1, labels), z.amax(-1, keepdim=True)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    return total.log().sub_(chosen.sub_(top)), z, total
