"""What is added to a layer besides the adapter that is trained: a frozen term of low rank, and SLoRA's sparse one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexlora.adapted import AdaptedLinear, Factors, Scattered, adapt

DRAW_SIZES = [(2, 5, 7), (3, 7), (3,), (4, 7), (3, 4), (2, 7), (3, 2), (2, 5, 3)]


@pytest.mark.parametrize("term", ["none", "factors", "empty", "sparse"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_term_adds_itself_to_values_and_gradients(term: str, bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, b, A, B, A_0, B_0, g = (torch.randn(*n, generator=draw, dtype=torch.float64) for n in DRAW_SIZES)
    layer = adapt(torch.nn.Linear(7, 3, bias=bias).double())
    with torch.no_grad():
        layer.weight.copy_(W)
        if bias:
            layer.bias.copy_(b)
    layer.extra = Factors(A_0, B_0, 0.3)
    D, index = torch.zeros(21, dtype=torch.float64), torch.tensor([1, 8, 20])
    values = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    whole = W + 0.3 * B_0 @ A_0
    x, A, B, values = (t.requires_grad_() for t in (x, A, B, values))
    truth = x @ whole.T + (b if bias else 0)
    leaves = [x]
    if term == "factors":
        layer.term, leaves = Factors(A, B, 1.7), [x, A, B]
        truth = truth + 1.7 * (x @ A.T @ B.T)
    elif term == "sparse":
        layer.term, leaves = Scattered(values, index), [x, values]
        truth = truth + x @ D.index_add(0, index, values).view(3, 7).T
    elif term == "empty":
        layer.term = Factors(A[:0], B[:, :0])
    y = layer(x)
    torch.testing.assert_close(y, truth)
    for ours, expected in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(truth, leaves, g), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("term", [None, Factors(torch.zeros(2, 7), torch.zeros(3, 2))])
def test_no_tokens_at_all(term: Factors | None) -> None:
    layer, x = adapt(torch.nn.Linear(7, 3)), torch.zeros(0, 7, requires_grad=True)
    layer.term = term
    (dx,) = torch.autograd.grad(layer(x).sum(), x)
    assert dx.shape == (0, 7)


def found(layer: AdaptedLinear, x: Tensor, added: Tensor) -> float:
    """How much of what is `added` a layer's output has, on average."""
    bare = x.double() @ layer.weight.double().T
    return float(((layer(x).detach().double() - bare) * added).sum() / added.square().sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("term", ["none", "factors", "sparse", "sparse beside"])
def test_half_precision_swallows_neither_a_frozen_term_nor_a_sparse_one(dtype: torch.dtype, term: str) -> None:
    """What is added is far below the last digit of most entries of W x; on average it is there all the same."""
    draw = torch.Generator().manual_seed(0)
    layer = adapt(torch.nn.Linear(64, 96, bias=False).to(dtype))
    x = torch.randn(3, 400, 64, generator=draw).to(dtype).requires_grad_()
    A, B = torch.randn(4, 64, generator=draw), torch.randn(96, 4, generator=draw)
    index = torch.randperm(96 * 64, generator=draw)[:600]
    D = torch.zeros(96 * 64).index_fill_(0, index, 1.0).view(96, 64) if "sparse" in term else B @ A
    added = x.detach().double() @ D.double().T
    size = float(layer(x).detach().double().abs().mean()) * torch.finfo(dtype).eps / 8 / float(added.abs().mean())
    if "sparse" in term:
        layer.term = Scattered(torch.full((600,), size).requires_grad_(), index)
        layer.extra = Factors(torch.zeros(2, 64), torch.zeros(96, 2)) if "beside" in term else None
    else:
        layer.extra = Factors(A, B * size)
        layer.term = None if term == "none" else Factors(torch.zeros(2, 64), torch.zeros(96, 2).requires_grad_())
    assert abs(found(layer, x, added * size) - 1) < 0.1
