"""The loss over logits, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flexlora.adapted import freeze
from flexlora.likelihood import ROWS, negative_log_likelihood


@given(
    n=st.integers(1, 3 * ROWS),
    words=st.integers(1, 50),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 9),
)
def test_loss_and_gradient_are_those_of_cross_entropy(n: int, words: int, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, words, generator=draw) * scale
    labels = torch.randint(words, (n,), generator=draw)
    exact = x.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="sum")
    (expected / 7).backward()
    ours = x.clone().requires_grad_()
    loss = negative_log_likelihood(ours, labels)
    (loss / 7).backward()
    assert exact.grad is not None
    assert ours.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5 * n)
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(ours.detach(), x), "a leaf is nobody's to overwrite"
    torch.testing.assert_close(negative_log_likelihood(x, labels), loss.detach())


@pytest.mark.parametrize("cap", [False, True])
def test_logits_are_overwritten_only_where_nothing_needs_them(cap: bool) -> None:
    head = freeze(nn.Linear(6, 40, bias=False))
    hidden = torch.randn(1, 5, 6, requires_grad=True)
    labels = torch.tensor([3, 0, 39, 3, 7])
    found = []
    for loss_of in (negative_log_likelihood, lambda x, y: F.cross_entropy(x, y, reduction="sum")):
        hidden.grad = None
        logits = head(hidden)[0]
        logits = torch.tanh(logits / 5) * 5 if cap else logits
        before = logits.detach().clone()
        loss = loss_of(logits, labels)
        overwritten = not torch.equal(logits.detach(), before)
        loss.backward()
        assert hidden.grad is not None
        found.append((loss.detach(), hidden.grad.clone(), overwritten))
    torch.testing.assert_close(found[0][:2], found[1][:2])
    assert (found[0][2], found[1][2]) == (not cap, False)


def test_half_precision_keeps_its_type() -> None:
    x = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.tensor([0, 8, 2, 2])
    loss = negative_log_likelihood(x, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, F.cross_entropy(x.float(), labels, reduction="sum"))
