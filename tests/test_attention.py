"""Attention in rows that sequences share, and in bfloat16 on a processor, against dense float64 arithmetic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexlora import attention
from flexlora import rows as rows_module
from flexlora.decoding import has_slots
from flexlora.logits import said
from flexlora.modeling import load_model
from flexlora.rows import Rows, Shared, halves
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


def as_networks_have_them(
    draw: torch.Generator, length: int, heads: tuple[int, int, int], size: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Queries, keys and values (1, heads, length, size), which lie in memory token by token."""
    parts = [torch.randn(1, length, n, size, generator=draw).to(dtype) for n in heads]
    return [x.transpose(1, 2).requires_grad_() for x in parts]


def in_one_row(parts: list[Tensor], shared: Shared, **more: Any) -> Tensor:
    q, k, v = parts
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask = shared.mask()
    with attention.sharing(shared, mask):
        return attention.attend(module, q, k, v, mask, scaling=q.shape[3] ** -0.5, **more)[0]


def assert_shared_attention(parts: list[Tensor], shared: Shared, draw: torch.Generator, near: float) -> None:
    """Output and gradients are those of dense float64 arithmetic within `near` of their norms."""
    before = [x.detach().clone() for x in parts]
    y = in_one_row(parts, shared)
    truth_parts = [x.detach().double().requires_grad_() for x in parts]
    truth = dense(truth_parts[0], truth_parts[1], truth_parts[2], shared.mask()[0, 0])
    assert y.dtype == parts[0].dtype
    weights = torch.randn(truth.shape, generator=draw).to(y.dtype)
    found = [y, *torch.autograd.grad(y, parts, weights)]
    expected = [truth, *torch.autograd.grad(truth, truth_parts, weights.double())]
    for x, t in zip(found, expected, strict=True):
        assert float((x.detach().double() - t.detach()).norm()) <= near * float(t.detach().norm())
    assert all(torch.equal(x, b) for x, b in zip(parts, before, strict=True))


@given(
    beginning=st.integers(1, 40),
    own=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    size=st.sampled_from([4, 16]),
    seed=st.integers(0, 2**16),
)
def test_sequences_of_one_row_see_the_beginning_and_themselves(
    beginning: int, own: list[int], size: int, seed: int
) -> None:
    draw, shared = torch.Generator().manual_seed(seed), Shared(beginning, tuple(own))
    assert_shared_attention(as_networks_have_them(draw, beginning + sum(own), (4, 2, 2), size), shared, draw, 2e-6)


def assert_halves(parts: list[Tensor], shared: Shared, draw: torch.Generator, near: float) -> None:
    """Two halves of a row, the first one of which is through before the second begins, and the other way round on the way back:
    output and gradients are those of dense float64 arithmetic over the row.
    """
    length = parts[0].shape[2]
    row = Rows(torch.zeros(1, length, dtype=torch.long), torch.zeros(0).long(), torch.zeros(0).long(), shared)
    with patch.object(rows_module, "PAIR", 1):
        pair = halves(row)
    cut, between, outputs, inputs = pair[0].input_ids.shape[1], attention.Between(), [], []
    for half, place in zip(pair, (slice(0, cut), slice(cut, None)), strict=True):
        assert half.shared is not None
        q, k, v = mine = [x.detach()[:, :, place].requires_grad_() for x in parts]
        module, mask = SimpleNamespace(num_key_value_groups=2, is_causal=True), half.shared.mask()
        with attention.sharing(half.shared, mask, between):
            outputs.append(attention.attend(module, q, k, v, mask, scaling=q.shape[3] ** -0.5)[0])
        inputs.append(mine)
    truth_parts = [x.detach().double().requires_grad_() for x in parts]
    truth = dense(truth_parts[0], truth_parts[1], truth_parts[2], shared.mask()[0, 0])
    weights = torch.randn(truth.shape, generator=draw).to(parts[0].dtype)
    second = torch.autograd.grad(outputs[1], inputs[1], weights[:, cut:])
    first = torch.autograd.grad(outputs[0], inputs[0], weights[:, :cut])
    found = [torch.cat(outputs, 1), *(torch.cat(x, 2) for x in zip(first, second, strict=True))]
    expected = [truth, *torch.autograd.grad(truth, truth_parts, weights.double())]
    for x, t in zip(found, expected, strict=True):
        assert x.dtype == parts[0].dtype
        assert float((x.detach().double() - t.detach()).norm()) <= near * float(t.detach().norm())


@given(
    beginning=st.integers(1, 40),
    own=st.lists(st.integers(1, 40), max_size=5),
    size=st.sampled_from([4, 16]),
    seed=st.integers(0, 2**16),
)
def test_halves_of_a_row_attend_as_the_row_does(beginning: int, own: list[int], size: int, seed: int) -> None:
    draw, shared = torch.Generator().manual_seed(seed), Shared(beginning + (not own), tuple(own))
    length = shared.beginning + sum(own)
    assert_halves(as_networks_have_them(draw, length, (4, 2, 2), size), shared, draw, 2e-6)


@pytest.mark.parametrize("own", [(), (3, 1, 4), (attention.SHORT, 9), (attention.SHORT * 2, 9)])
def test_halves_of_a_row_in_bfloat16(own: tuple[int, ...]) -> None:
    draw, shared = torch.Generator().manual_seed(0), Shared(5, own)
    assert_halves(as_networks_have_them(draw, 5 + sum(own), (4, 2, 2), 16, torch.bfloat16), shared, draw, 0.01)


def test_a_half_that_waits_for_one_that_failed_fails() -> None:
    between, failed = attention.Between(), ValueError("out of luck")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(between.hear, "keys", 1)
        between.end(failed)
        assert waiting.exception(timeout=10) is failed
    told = attention.Between()
    told.tell("keys", 1, ())
    told.end(failed)
    assert told.hear("keys", 1) == ()  # what was told before counts
    with pytest.raises(ValueError, match="out of luck"):
        between.tell("keys", 2, ())


def test_half_a_row_does_not_attend_by_a_mask() -> None:
    q, k, v = as_networks_have_them(torch.Generator().manual_seed(0), 4, (4, 2, 2), 16)
    module, shared = SimpleNamespace(num_key_value_groups=2, is_causal=True), Shared(4, (), before=3)
    mask = shared.mask()
    with attention.sharing(shared, mask, attention.Between()), pytest.raises(RuntimeError, match="half a row"):
        attention.attend(module, q, k, v, mask, scaling=0.25, dropout=0.5)


def test_rows_are_not_cut_for_a_network_with_masks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_model(str(tiny_model(tmp_path))).network
    assert attention.halves_rows(network)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_KERNEL", False)
        assert not attention.halves_rows(network)
    first = network.model.layers[0].self_attn
    forward = first.forward

    def masking(*given: Any, attention_mask: Any, **more: Any) -> Any:
        return forward(*given, attention_mask=attention_mask.clone(), **more)

    monkeypatch.setattr(first, "forward", masking)
    assert attention.can_share(network)
    assert not attention.halves_rows(network)


@pytest.mark.parametrize("own", [(3, 1, 4), (attention.SHORT, 9)])
def test_a_shared_row_in_bfloat16(own: tuple[int, ...]) -> None:
    draw, shared = torch.Generator().manual_seed(0), Shared(5, own)
    parts = as_networks_have_them(draw, 5 + sum(own), (4, 2, 2), 16, torch.bfloat16)
    assert_shared_attention(parts, shared, draw, 0.01)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_where_torch_has_no_such_kernel_or_attention_drops_the_mask_does_it(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, shared = torch.Generator().manual_seed(0), Shared(5, (3, 1, 4))
    parts = as_networks_have_them(draw, 13, (4, 2, 2), 16)
    ours, dropping = in_one_row(parts, shared), in_one_row(parts, shared, dropout=dropout)
    monkeypatch.setattr(attention, "_KERNEL", False)
    torch.testing.assert_close(in_one_row(parts, shared), ours, atol=1e-5, rtol=1e-5)
    assert torch.allclose(dropping, ours, atol=1e-5) == (not dropout)


def test_a_shared_row_keeps_no_copy_for_a_sequence() -> None:
    shared = Shared(6, (3, 1, 4, 2))
    parts = as_networks_have_them(torch.Generator().manual_seed(0), 16, (4, 2, 2), 8)
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = in_one_row(parts, shared)
    own = {x.untyped_storage().data_ptr() for x in (*parts, y)}
    assert own <= set(kept), "nothing but what comes in, what goes out and a number for each head and token"
    assert [x.numel() for key, x in kept.items() if key not in own] == [4 * 16]
    assert y.is_contiguous()


def test_a_mask_that_a_layer_makes_of_the_rows_counts() -> None:
    draw, shared = torch.Generator().manual_seed(0), Shared(5, (3, 1, 4))
    q, k, v = as_networks_have_them(draw, 13, (4, 2, 2), 16)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    mask, bias = shared.mask(), torch.randn(1, 4, 13, 13, generator=draw)
    with attention.sharing(shared, mask):
        y, _ = attention.attend(module, q, k, v, bias.masked_fill(~mask, -torch.inf), scaling=0.25)
    for h in range(4):
        scores = q[0, h].double() @ k[0, h // 2].double().T / 4 + bias[0, h].double()
        truth = scores.masked_fill(~mask[0, 0], -torch.inf).softmax(-1) @ v[0, h // 2].double()
        torch.testing.assert_close(y[0, :, h].double(), truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["attention_mask", "position_bias"])
def test_what_is_added_to_scores_in_bfloat16(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 6, 16, generator=draw).bfloat16().requires_grad_() for n in (4, 2, 2))
    bias = torch.randn(1, 4, 6, 6, generator=draw).bfloat16()
    module = SimpleNamespace(num_key_value_groups=2, is_causal=False)
    given: dict[str, Any] = {"attention_mask": None} | {name: bias}
    y, _ = attention.attend(module, q, k, v, scaling=0.25, **given)
    for h in range(4):
        scores = q[0, h].double() @ k[0, h // 2].double().T / 4 + bias[0, h].double()
        truth = scores.softmax(-1) @ v[0, h // 2].double()
        torch.testing.assert_close(y[0, :, h].double(), truth, atol=0.02, rtol=0.02)


def test_nothing_stays_shared() -> None:
    draw, shared = torch.Generator().manual_seed(0), Shared(5, (3, 1, 4))
    q, k, v = parts = as_networks_have_them(draw, 13, (4, 2, 2), 16)
    in_one_row(parts, shared)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    y, _ = attention.attend(module, q, k, v, None, scaling=0.25)
    seen = torch.ones(13, 13, dtype=torch.bool).tril()
    truth = dense(q.double(), k.double(), v.double(), seen)
    torch.testing.assert_close(y.double(), truth, atol=1e-5, rtol=1e-5)


def test_a_model_attends_that_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared row always; otherwise in bfloat16 while gradients are recorded."""
    calls: list[int] = []
    apply = attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *given: calls.append(1) or apply(*given))
    shared, ids = Shared(5, (3, 1, 4)), torch.arange(13)[None]
    tiny_model(tmp_path)
    for precision, expected in (("float32", [1, 1, 0, 0]), ("bfloat16", [1, 1, 1, 0])):
        model, counts = load_model(str(tmp_path), precision=precision), []
        for grad, rows in ((True, shared), (False, shared), (True, None), (False, None)):
            calls.clear()
            with torch.set_grad_enabled(grad):
                said(model.network, Rows(ids, torch.arange(5, 13), ids[0, :8], rows))
            counts.append(len(calls))
        assert counts == [x * model.network.config.num_hidden_layers for x in expected]


def test_prompts_are_still_decoded_side_by_side(tmp_path: Path) -> None:
    assert has_slots(load_model(str(tiny_model(tmp_path))).network)
