"""Blocks that keep less for the way back, against transformers' own to the last bit."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from flexlora import blocks
from flexlora.adapted import Factors, adapt

SMALL: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2}
KINDS: dict[str, tuple[type[nn.Module], PretrainedConfig, bool]] = {
    "llama": (LlamaMLP, LlamaConfig(**SMALL), True),
    "qwen2": (Qwen2MLP, Qwen2Config(**SMALL), True),
    "llama-gelu": (LlamaMLP, LlamaConfig(**SMALL, hidden_act="gelu"), False),
    "gemma": (GemmaMLP, GemmaConfig(**SMALL), False),
}


def block(kind: str, dropout: float, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    make, config, _ = KINDS[kind]
    made: Any = make(config).to(dtype)
    for layer in (made.gate_proj, made.up_proj, made.down_proj):
        d_out, d_in = layer.weight.shape
        adapt(layer).term = Factors(
            torch.randn(3, d_in, requires_grad=True), torch.randn(d_out, 3, requires_grad=True), 0.5, dropout
        )
    return made


def through(made: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients; what was kept."""
    x = (
        torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
        .to(made.gate_proj.weight.dtype)
        .requires_grad_()
    )
    kept: dict[int, Tensor] = {}

    def note(y: Tensor) -> Tensor:
        kept[y.untyped_storage()._cdata] = y
        return y

    torch.manual_seed(4)  # what dropout draws from
    with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
        y = made(x)
    leaves = [x, *(p for z in (made.gate_proj, made.up_proj, made.down_proj) for p in (z.term.A, z.term.B))]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)], list(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gated_block_is_the_same_to_the_last_bit_and_keeps_less(
    kind: str, dropout: float, dtype: torch.dtype
) -> None:
    plain, lean = block(kind, dropout, dtype), block(kind, dropout, dtype)
    blocks.use(lean)
    gated = KINDS[kind][2]
    assert isinstance(lean, blocks.Gated) is gated
    assert isinstance(lean, type(plain)), "whoever asks for the class finds it"
    expected, all_kept = through(plain)
    ours, kept = through(lean)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)
    wide = [sum(y.numel() == 2 * 5 * 20 and y.is_floating_point() for y in part) for part in (kept, all_kept)]
    assert wide == ([2, 4] if gated else [wide[1], wide[1]])


def test_a_bare_block_and_one_without_gradients() -> None:
    plain, lean = block("llama", 0.0, torch.float32), block("llama", 0.0, torch.float32)
    blocks.use(lean)
    x = torch.randn(4, 12)
    for made in (plain, lean):
        made.down_proj.term = None
    with torch.no_grad():
        assert torch.equal(lean(x), plain(x))


class Projections(nn.Module):
    """A norm whose output three adapted layers have in common, as attention has them."""

    def __init__(self, norm: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)
        self.layers = [adapt(nn.Linear(12, n)) for n in (12, 6, 6)]
        self.leaves: list[Tensor] = []
        for layer in self.layers:
            A, B = torch.randn(3, 12, requires_grad=True), torch.randn(layer.out_features, 3, requires_grad=True)
            layer.term = Factors(A, B, 0.5, dropout)
            self.leaves += [A, B]

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.cat([layer(h) for layer in self.layers], -1)[..., :12]


def gradients(made: Projections, x: Tensor) -> tuple[list[Tensor], int]:
    """Output and gradients, and how many tensors of the norm's size were kept."""
    kept: dict[int, Tensor] = {}

    def note(y: Tensor) -> Tensor:
        kept[y.untyped_storage()._cdata] = y
        return y

    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda y: y):
        y = made(x)
    found = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *made.leaves])]
    return found, sum(z.numel() == x.numel() and z.is_floating_point() for z in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("make", [lambda: LlamaRMSNorm(12), lambda: nn.LayerNorm(12)])
def test_what_a_norm_makes_is_made_twice_rather_than_kept(make: Any, dropout: float) -> None:
    found: list[list[Tensor]] = []
    counts: list[int] = []
    times: list[int] = []
    for lean in (False, True):
        torch.manual_seed(3)
        made = Projections(make(), dropout)
        nn.init.uniform_(next(made.norm.parameters()))
        if lean:
            blocks.use(made)
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with patch.object(made.norm, "forward", wraps=made.norm.forward) as norm:
            gradients(made, x)
            result, count = gradients(made, x)  # nothing is left over from the first
        times.append(norm.call_count)
        found.append(result)
        counts.append(count)
    (y, dx, *rest), (same_y, same_dx, *same_rest) = found
    assert torch.equal(y, same_y)
    torch.testing.assert_close(dx, same_dx)  # the way back of a norm has a formula of its own
    for plain, ours in zip(rest, same_rest, strict=True):
        assert torch.equal(plain, ours)
    assert counts[1] == counts[0] - 1
    assert times == [2, 4], "once for all three layers"


@given(
    tokens=st.integers(1, 9), size=st.integers(1, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99)
)
def test_a_norm_and_its_gradient_are_those_of_float64(tokens: int, size: int, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    norm = LlamaRMSNorm(size).requires_grad_(False)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=draw)
    blocks.use(nn.ModuleList([norm]))
    assert isinstance(norm, blocks.Normed)
    x = (scale * torch.randn(2, tokens, size, generator=draw)).requires_grad_()
    weights, before = torch.randn(2, tokens, size, generator=draw), x.detach().clone()
    y = norm(x)
    (dx,) = torch.autograd.grad(y, x, weights)
    z = x.detach().double().requires_grad_()
    truth = norm.weight.double() * z / (z.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    (expected,) = torch.autograd.grad(truth, z, weights.double())
    for ours, t in ((y, truth), (dx, expected)):
        # what is left of a gradient along x is a difference of terms of the size of the gradient itself
        near = 1e-6 * float(t.detach().norm()) + 1e-6 * float((weights * norm.weight).norm() / scale) * (ours is dx)
        assert float((ours.detach().double() - t.detach()).norm()) <= near
    assert torch.equal(x, before)
    with torch.inference_mode():
        assert torch.equal(norm(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_half_precision_is_transformers_own_with_the_gradient_of_float64(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    plain, lean = [LlamaRMSNorm(40).requires_grad_(False).to(dtype) for _ in range(2)]
    for norm in (plain, lean):
        norm.weight.copy_(torch.linspace(0.5, 2, 40))
    blocks.use(nn.ModuleList([lean]))
    x = torch.randn(3, 7, 40, generator=draw).to(dtype).requires_grad_()
    weights = torch.randn(3, 7, 40, generator=draw).to(dtype)
    y = lean(x)
    assert type(y.grad_fn).__name__ == "RootMeanSquareBackward"
    assert torch.equal(y, plain(x))
    (dx,) = torch.autograd.grad(y, x, weights)
    z = x.detach().double().requires_grad_()
    truth = lean.weight.double() * z / (z.square().mean(-1, keepdim=True) + lean.variance_epsilon).sqrt()
    (expected,) = torch.autograd.grad(truth, z, weights.double())
    assert dx.dtype == dtype
    assert float((dx.double() - expected).norm()) < torch.finfo(dtype).eps * float(expected.norm())
    with torch.no_grad():
        assert torch.equal(lean(x), plain(x))


def test_what_is_changed_after_the_norm_is_kept_as_it_was_changed() -> None:
    found: list[list[Tensor]] = []
    for lean in (False, True):
        torch.manual_seed(3)
        made = Projections(LlamaRMSNorm(12), 0.0)
        if lean:
            blocks.use(made)
        x = torch.randn(2, 5, 12)
        h = made.norm(x)
        h.mul_(3)
        y = torch.cat([layer(h) for layer in made.layers], -1)
        found.append(list(torch.autograd.grad(y.square().sum(), made.leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_norm_that_is_trained_counts_or_drops_is_left_alone() -> None:
    trained, counting = LlamaRMSNorm(12), nn.BatchNorm1d(12).requires_grad_(False)
    plain = LlamaRMSNorm(12).requires_grad_(False)
    blocks.use(nn.ModuleList([trained, counting, plain]))
    assert [len(x._forward_hooks) for x in (trained, counting, plain)] == [0, 0, 1]
