"""Blocks that keep less for the way back, against transformers' own to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP
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
