"""Attention in bfloat16 on a processor, against dense float64 arithmetic."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexlora import attention
from flexlora.decoding import has_slots
from flexlora.modeling import load_model
from flexlora.rows import Shared
from tiny import tiny_model


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, head by head, a key head for every two query heads; (batch, length, heads, head size)."""
    heads = []
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // 2].transpose(1, 2) / q.shape[3] ** 0.5
        heads.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, h // 2])
    return torch.stack(heads, 2)


@pytest.mark.parametrize(("length", "before"), [(7, 0), (5, 4), (attention.SHORT + 1, 0)])
def test_bfloat16_attention_and_its_gradients_are_those_of_float64(length: int, before: int) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 16), (2, 2, before + length, 16), (2, 2, before + length, 16)]
    parts = q, k, v = [torch.randn(s, generator=draw).bfloat16().requires_grad_() for s in shapes]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    seen = torch.ones(length, before + length, dtype=torch.bool).tril(before)
    mask = seen[None, None].expand(2, 1, -1, -1) if before else None
    y, _ = attention.attend(module, q, k, v, mask, scaling=0.25)
    truth_parts = [x.detach().double().requires_grad_() for x in parts]
    truth = dense(truth_parts[0], truth_parts[1], truth_parts[2], seen)
    assert y.dtype == torch.bfloat16
    weights = torch.randn(truth.shape, generator=draw).bfloat16()
    y.backward(weights)
    truth.backward(weights.double())
    torch.testing.assert_close(y.double(), truth, atol=0.02, rtol=0.02)
    for x, t in zip(parts, truth_parts, strict=True):
        assert x.grad is not None
        assert t.grad is not None
        assert float((x.grad.double() - t.grad).norm() / t.grad.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_of_one_row_see_the_beginning_and_themselves(dtype: torch.dtype) -> None:
    draw, shared = torch.Generator().manual_seed(0), Shared(5, (3, 1, 4))
    shapes = [(1, 4, 13, 16), (1, 2, 13, 16), (1, 2, 13, 16)]
    q, k, v = [torch.randn(s, generator=draw).to(dtype) for s in shapes]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    with attention.sharing(shared):
        y, _ = attention.attend(module, q, k, v, shared.mask(), scaling=0.25)
    truth = dense(q.double(), k.double(), v.double(), shared.mask()[0, 0])
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.double(), truth, atol=tolerance, rtol=tolerance)
    alone, _ = attention.attend(module, q[:, :, :8], k[:, :, :8], v[:, :, :8], None, scaling=0.25)
    assert torch.equal(alone, y[:, :8]), "the first of them is one sequence, and nothing stays shared"


def test_a_model_attends_that_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(tiny_model(tmp_path)), precision="bfloat16")
    calls: list[torch.dtype] = []

    def noted(module: Any, query: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, None]:
        calls.append(query.dtype)
        return sdpa(module, query, *rest, **more)

    from transformers.integrations import sdpa_attention

    sdpa = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", noted)
    ids = torch.arange(6)[None]
    model.network(ids)
    with torch.no_grad():
        model.network(ids)
    layers = model.network.config.num_hidden_layers
    assert calls == [torch.float32] * layers + [torch.bfloat16] * layers


def test_prompts_are_still_decoded_side_by_side(tmp_path: Path) -> None:
    assert has_slots(load_model(str(tiny_model(tmp_path))).network)
