"""A base model in four bits, against the same model with the unpacked weights in its place."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import nf4
from flexlora.adapted import FrozenLinear
from flexlora.memory import Workload, training_memory
from flexlora.modeling import Model, empty_model, load_model
from flexlora.prompts import Encoded
from flexlora.training import train_client
from flexlora.types import ClientRule, Download, FlexLoraError, LocalTraining, LowRank, Sparse, TrainTask
from tiny import tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")
CODE = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip
"""The levels of NF4: arXiv 2305.14314, appendix E."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


def unpacked(model: Model, folder: Path) -> Model:
    """The same network in float32 with the weights that the packed one multiplies with."""
    plain = load_model(str(folder), precision="float32")
    theirs = dict(plain.network.named_modules())
    for name, layer in model.network.named_modules():
        if isinstance(layer, FrozenLinear) and layer.packed is not None:
            theirs[name].weight.data.copy_(layer.dense())
    return plain


@settings(max_examples=15, deadline=None)
@given(d_out=st.integers(1, 9), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_weight_becomes_the_nearest_level_of_its_block(d_out: int, blocks: int, seed: int) -> None:
    weight = torch.randn(d_out, 64 * blocks, generator=torch.Generator().manual_seed(seed))
    before = weight.clone()
    data, state = nf4.pack(weight, torch.device("cpu"))
    found = nf4.unpack(data, state)
    assert torch.equal(weight, before)
    assert data.dtype == torch.uint8
    assert data.numel() == weight.numel() // 2
    assert found.shape == weight.shape
    for block, got in zip(weight.view(-1, 64).double(), found.view(-1, 64).double(), strict=True):
        scale = float(block.abs().max())
        nearest = torch.tensor([min(CODE, key=lambda level: abs(level - float(x) / scale)) for x in block]) * scale
        # the scales themselves are kept in eight bits; a value between two levels may round to either
        assert float((got - nearest).abs().max()) <= 0.35 * scale
        assert float((got - nearest).norm()) <= 0.06 * float(nearest.norm()) + 0.02 * scale


def example(seed: int) -> Encoded:
    ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Encoded(tuple(ids), 7, 0)


@pytest.mark.parametrize("kind", ["low rank", "sparse"])
def test_training_over_four_bits_is_training_over_the_unpacked_weights(folder: Path, kind: str) -> None:
    model = load_model(str(folder), precision="nf4")
    plain = unpacked(model, folder)
    draw = torch.Generator().manual_seed(2)
    if kind == "low rank":
        adapter = {
            m: LowRank(torch.randn(d_out, 3, generator=draw) * 0.1, torch.randn(3, d_in, generator=draw) * 0.1)
            for m, (d_out, d_in) in model.shapes.items()
        }
        rule = ClientRule()
    else:
        adapter = {m: Sparse(torch.zeros(5), torch.arange(5) * 3, shape) for m, shape in model.shapes.items()}
        rule = ClientRule(train=("values",))
    training = LocalTraining(batch_size=2, micro_batch_size=1, learning_rate=1e-3, dropout=0.2)
    task = TrainTask(1, 0, dict.fromkeys(adapter, 3), Download(adapter, {}, rule), training, seed=4)
    before = copy.deepcopy({n: p.clone() for n, p in model.network.named_parameters()})
    ours = train_client(model, task, [example(i) for i in range(4)])
    theirs = train_client(plain, task, [example(i) for i in range(4)])
    for module in adapter:
        for a, b in zip(ours.adapter[module], theirs.adapter[module], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    assert all(torch.equal(before[n], p) for n, p in model.network.named_parameters())


def test_it_is_the_same_base_model_in_less_memory(folder: Path) -> None:
    model, plain = (load_model(str(folder), precision=p) for p in ("nf4", "float32"))
    assert model.fingerprint == plain.fingerprint
    assert model.network.get_output_embeddings().weight.dtype == torch.float32
    packed = [layer for layer in model.packable() if layer.packed is not None]
    assert len(packed) == len(model.packable()) == len(plain.packable())
    for layer in packed:
        assert layer.weight.numel() * layer.weight.element_size() == layer.in_features * layer.out_features // 2


def test_the_memory_advisor_counts_four_bits(folder: Path) -> None:
    needs = {}
    for precision in ("nf4", "bfloat16"):
        model = empty_model(str(folder), precision=precision)
        needs[precision] = training_memory(model, dict.fromkeys(model.shapes, 2), Workload(cutoff_len=16))
    numbers = [d_out * d_in for d_out, d_in in model.shapes.values()]
    saved = needs["bfloat16"].weights - needs["nf4"].weights
    assert abs(saved - (2 - nf4.BITS / 8) * sum(numbers) + 2 * max(numbers)) < len(numbers)
    assert needs["nf4"].activations == needs["bfloat16"].activations


def test_without_the_library_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FlexLoraError, match=r"--precision nf4: needs bitsandbytes; `pip install '\.\[qlora\]'` in"):
        load_model(str(folder), precision="nf4")
