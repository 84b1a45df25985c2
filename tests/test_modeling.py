"""The base model and its adapters, against PEFT and dense float64 arithmetic."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV32Config

from flexlora import gguf, likelihood
from flexlora.adapted import Factors, adapt, dropped
from flexlora.logits import said
from flexlora.modeling import Model, Scaling, load_model, scaling
from flexlora.rows import Rows
from flexlora.saved import load_adapter, save_adapter, save_merged
from flexlora.types import FlexLoraError, LowRank, Sparse
from tiny import tiny_model, tiny_tokenizer

IDS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder))


def random_adapter(model: Model, ranks: list[int] | int = 4, seed: int = 0) -> dict[str, LowRank]:
    """Ranks by module, in turn; entries large enough to change the logits."""
    draw = torch.Generator().manual_seed(seed)
    ranks = [ranks] if isinstance(ranks, int) else ranks
    return {
        m: LowRank(
            torch.randn(d_out, ranks[i % len(ranks)], generator=draw) * 0.1,
            torch.randn(ranks[i % len(ranks)], d_in, generator=draw) * 0.3,
        )
        for i, (m, (d_out, d_in)) in enumerate(model.shapes.items())
    }


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.network(input_ids=IDS).logits


def dense_logits(folder: Path, *deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """The truth: a fresh float64 network with the delta weights added to its weights."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for delta in deltas:
            for module, x in delta.items():
                weights[f"{module}.weight"].add_(x.double())
        return network(input_ids=IDS).logits.float()


def dense(adapter: dict[str, LowRank]) -> dict[str, torch.Tensor]:
    return {m: x.B.double() @ x.A.double() for m, x in adapter.items()}


def weights_hash(model: Model) -> str:
    digest = hashlib.sha256()
    for name, weight in model.network.state_dict().items():
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def test_shapes_are_the_seven_projections_in_network_order(model: Model) -> None:
    assert len(model.shapes) == 14
    names = list(model.shapes)
    assert names[:3] == [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    assert model.shapes["model.layers.0.self_attn.k_proj"] == (16, 32)
    assert model.shapes["model.layers.1.mlp.down_proj"] == (32, 48)
    assert model.hidden_size == 32
    assert model.has_chat_template
    assert model.tokenizer.pad_token_id is not None


@pytest.mark.parametrize("s", [1.0, 0.37])
def test_attached_logits_equal_the_dense_truth_whatever_the_scaling(model: Model, folder: Path, s: float) -> None:
    adapter, base_delta = random_adapter(model, [4, 1, 7]), random_adapter(model, [3, 0], seed=1)
    model.attach(adapter, base_delta=base_delta, scaling=s)
    torch.testing.assert_close(
        logits(model), dense_logits(folder, dense(adapter), dense(base_delta)), rtol=1e-4, atol=1e-4
    )
    model.detach()
    torch.testing.assert_close(logits(model), dense_logits(folder), rtol=1e-4, atol=1e-4)


def test_a_missing_module_is_the_bare_base_layer(model: Model, folder: Path) -> None:
    model.attach(random_adapter(model))
    part = dict(list(random_adapter(model, seed=2).items())[3:5])
    model.attach(part)
    torch.testing.assert_close(logits(model), dense_logits(folder, dense(part)), rtol=1e-4, atol=1e-4)
    assert list(model.read()) == list(part)
    model.detach()


def test_sparse_logits_equal_the_dense_truth(model: Model, folder: Path) -> None:
    sparse, deltas = {}, {}
    for m, (d_out, d_in) in model.shapes.items():
        index = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(len(m)))[:40]
        values = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 0.3
        sparse[m] = Sparse(values, index, (d_out, d_in))
        deltas[m] = torch.zeros(d_out * d_in).index_put((index,), values).view(d_out, d_in)
    model.attach(sparse)
    torch.testing.assert_close(logits(model), dense_logits(folder, deltas), rtol=1e-4, atol=1e-4)
    back = model.read()
    for m, x in sparse.items():
        y = back[m]
        assert isinstance(y, Sparse)
        assert y.shape == x.shape
        assert torch.equal(y.values, x.values)
        assert torch.equal(y.index, x.index)
    model.detach()


def test_read_gives_back_folded_copies(model: Model) -> None:
    adapter = random_adapter(model, [2, 5])
    scales = {m: 16 / len(x.A) for m, x in adapter.items()}
    model.attach(adapter, scaling=scales, train=("A", "B"))
    live = model.factors()["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(live.B.detach(), adapter["model.layers.0.self_attn.q_proj"].B / 8)
    back = model.read()
    with torch.no_grad():
        for tensor in model.trainable():
            tensor.add_(1.0)
    for m, x in adapter.items():
        y = back[m]
        assert isinstance(y, LowRank)
        torch.testing.assert_close(y.B, x.B)
        assert torch.equal(y.A, x.A)
    model.detach()
    assert not model.trainable()


def test_switching_keeps_module_objects_and_base_weights(model: Model) -> None:
    modules = [id(x) for x in model.network.modules()]
    weights = [x.data_ptr() for x in model.network.parameters()]
    before = weights_hash(model)
    for seed in range(3):
        model.attach(random_adapter(model, [1 + seed, 4], seed), scaling=0.5, train=("A",))
        logits(model)
        model.detach()
    assert [id(x) for x in model.network.modules()] == modules
    assert [x.data_ptr() for x in model.network.parameters()] == weights
    assert weights_hash(model) == before


def test_train_names_the_parts_with_gradients(model: Model) -> None:
    adapter = random_adapter(model, 3)
    for train, shapes in (((), []), (("B",), [(32, 3), (16, 3)]), (("A", "B"), [(3, 32), (32, 3)])):
        model.attach(adapter, train=train)
        assert [tuple(x.shape) for x in model.trainable()[:2]] == shapes
        assert len(model.trainable()) == 14 * len(train)
    model.detach()


@pytest.mark.parametrize("keep", [[0], [17, 3, 4], list(range(18))])
def test_logits_at_positions_are_the_full_logits_there(model: Model, keep: list[int]) -> None:
    rows = Rows(IDS, torch.tensor(keep), torch.zeros(len(keep), dtype=torch.long))
    with torch.no_grad():
        states, head = said(model.network, rows)
        some = likelihood.logits(states, head)
    torch.testing.assert_close(some, logits(model).flatten(0, 1)[keep], rtol=1e-5, atol=1e-5)
    assert logits(model).shape == (2, 9, model.network.config.vocab_size)  # nothing stays selected


@pytest.mark.parametrize("kind", ["alpha_over_r", "rslora"])
def test_peft_loads_a_saved_adapter_with_equal_logits(
    model: Model, folder: Path, tmp_path: Path, kind: Scaling
) -> None:
    adapter = random_adapter(model, [4, 1, 0, 7, 4])  # one module in five has rank 0
    save_adapter(tmp_path, adapter, base_model=str(folder), kind=kind, alpha=12.0, readme="# An adapter\n")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    model.attach(adapter, scaling=0.7)
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.detach()
    assert not torch.allclose(logits(model), expected, atol=1e-2)
    assert (tmp_path / "README.md").read_text() == "# An adapter\n"

    back = load_adapter(tmp_path, model.shapes)
    assert list(back) == [m for m, x in adapter.items() if len(x.A)]
    for m, x in back.items():
        torch.testing.assert_close(x.B, adapter[m].B)
        assert torch.equal(x.A, adapter[m].A)


def test_an_empty_adapter_saves_as_zeros(model: Model, folder: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path, random_adapter(model, 0), base_model=str(folder))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, logits(model), rtol=1e-6, atol=1e-6)


def test_an_adapter_made_by_peft_is_read_with_its_patterns(model: Model, folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 6},
        alpha_pattern={"down_proj": 5},
        init_lora_weights=False,
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    theirs.save_pretrained(str(tmp_path))
    model.attach(load_adapter(tmp_path, model.shapes))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    model.detach()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights 'pissa' changes the base weights too; save it as plain LoRA",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights 'OLoRA'"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens cannot be read; train one without them"),
        ({"alpha_pattern": {r"layers\.\d+\.self_attn.q_proj": 4}}, "alpha_pattern has the regular expression"),
        ({"alpha_pattern": {"q_proj|v_proj": 4}}, "write modules' names or their last parts"),
    ],
    ids=str,
)
def test_factors_that_mean_something_else_are_refused(
    model: Model, folder: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    save_adapter(tmp_path, random_adapter(model, 2), base_model=str(folder))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FlexLoraError) as error:
        load_adapter(tmp_path, model.shapes)
    assert says in one_line(error)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian", "alora_invocation_tokens": None},
        {"alpha_pattern": {"^q_proj": 99, "self_attn.q_proj": 5, "^model.layers.1.mlp.down_proj": 3}},
    ],
    ids=str,
)
def test_peft_reads_what_is_taken_alike(model: Model, folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    save_adapter(tmp_path, random_adapter(model, 4), base_model=str(folder))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    model.attach(load_adapter(tmp_path, model.shapes))
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    model.detach()


def test_a_disk_that_refuses_the_tokenizer_is_an_error_of_the_system(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizers library has nothing but Exception for it."""

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_merged(model, {}, {}, tmp_path)


def test_a_model_that_chooses_its_keys_goes_on_choosing() -> None:
    """DeepSeek's lightning indexer: each query attends to the keys of the largest scores alone."""
    sizes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network, dense = (
            AutoModelForCausalLM.from_config(DeepseekV32Config(**sizes, index_topk=k), dtype=torch.float32).eval()
            for k in (3, IDS.shape[1])
        )
    dense.load_state_dict(network.state_dict())
    with torch.no_grad():
        expected = network(input_ids=IDS).logits
        assert not torch.allclose(dense(input_ids=IDS).logits, expected, atol=0.1)
    adapted = Model(network, None, name="sparse", targets=("o_proj",))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert not adapted.shares_rows


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "default", "linear"])
def test_positions_that_a_pass_changes_are_passed_alone(
    model: Model, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each type of layers has its own."""
    keys = model.network.config.to_dict()

    class Text:
        def __init__(self, rotary: Any) -> None:
            self.rotary = rotary

        def get_text_config(self) -> Text:
            return self

        def to_dict(self) -> dict[str, Any]:
            return {**keys, "rope_parameters": self.rotary}

    alone = kind in ("dynamic", "longrope")
    for rotary in (
        {"rope_type": kind, "rope_theta": 1e4},
        {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": kind, "factor": 2.0}},
    ):
        vars(model).pop("side_by_side", None)
        monkeypatch.setattr(model.network, "config", Text(rotary))
        assert model.side_by_side is not alone
    vars(model).pop("side_by_side", None)


def test_merged_folder_has_the_logits_of_the_adapted_model(model: Model, folder: Path, tmp_path: Path) -> None:
    adapter, base_delta = random_adapter(model, [4, 0, 2]), random_adapter(model, 2, seed=5)
    before = weights_hash(model)
    save_merged(model, adapter, base_delta, tmp_path)
    assert weights_hash(model) == before
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        got = merged(input_ids=IDS).logits
    torch.testing.assert_close(got, dense_logits(folder, dense(adapter), dense(base_delta)), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == model.tokenizer.chat_template


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("train", ["AB", "A", "B"])
def test_the_layer_has_the_values_and_gradients_of_plain_operations(dropout: float, bias: bool, train: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, b, A, B, g = (
        torch.randn(*size, generator=draw, dtype=torch.float64)
        for size in [(2, 5, 7), (3, 7), (3,), (4, 7), (3, 4), (2, 5, 3)]
    )
    layer = adapt(torch.nn.Linear(7, 3, bias=bias).double())
    with torch.no_grad():
        layer.weight.copy_(W)
        if bias:
            layer.bias.copy_(b)

    def outcome(plain: bool, need_x: bool) -> list[torch.Tensor | None]:
        x_, A_, B_ = (t.clone().requires_grad_(need) for t, need in ((x, need_x), (A, "A" in train), (B, "B" in train)))
        torch.manual_seed(5)
        if plain:
            z = x_
            if dropout:
                keep = torch.ones(x_.numel(), dtype=x_.dtype).index_fill(0, dropped(x_, dropout), 0)
                z = x_ * keep.view_as(x_) / (1 - dropout)
            y = x_ @ W.T + (b if bias else 0.0) + 1.7 * (z @ A_.T @ B_.T)
        else:
            layer.term = Factors(A_, B_, 1.7, dropout)
            y = layer.train()(x_)
        y.backward(g)
        return [y.detach(), x_.grad, A_.grad, B_.grad]

    for need_x in (True, False):
        with torch.random.fork_rng():
            for ours, truth in zip(outcome(False, need_x), outcome(True, need_x), strict=True):
                assert (ours is None) == (truth is None)
                if ours is not None:
                    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_half_precision_does_not_swallow_a_small_adapter(dtype: torch.dtype, bias: bool) -> None:
    """What the adapter adds is far below the last digit of most entries; on average it is there all the same."""
    draw = torch.Generator().manual_seed(0)
    layer = adapt(torch.nn.Linear(64, 96, bias=bias).to(dtype))
    A, B = torch.randn(4, 64, generator=draw), torch.randn(96, 4, generator=draw)
    x = torch.randn(3, 400, 64, generator=draw).to(dtype)
    added = x.double() @ A.double().T @ B.double().T
    size = float(layer(x).double().abs().mean()) * torch.finfo(dtype).eps / 8 / float(added.abs().mean())
    layer.term = Factors(A, (B * size).requires_grad_(), 1.0)
    bare = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    lost = layer(x).detach().double() - bare
    share = float((lost * added * size).sum() / (added * size).square().sum())
    assert abs(share - 1) < 0.1


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_every_entry_is_dropped_by_itself_with_the_given_probability(p: float) -> None:
    """Counts of entries and of pairs of neighbours against those of independent draws, within five deviations."""
    n, rounds = 400, 2000
    with torch.random.fork_rng():
        torch.manual_seed(11)
        drops = torch.zeros(rounds, n)
        for row in drops:
            at = dropped(torch.empty(20, 20), p)
            assert bool((at.diff() > 0).all())
            row[at] = 1.0
    for q, share in ((p, drops), (p * p, drops[:, 1:] * drops[:, :-1]), (p * p, drops[:, 7:] * drops[:, :-7])):
        deviation = (q * (1 - q) / rounds) ** 0.5
        assert float((share.mean(0) - q).abs().max()) < 5 * deviation
        assert abs(float(share.mean()) - q) < 5 * deviation * 3**0.5 / share.shape[1] ** 0.5


def test_dropping_draws_again_where_the_first_draw_ends_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    rand, sizes = torch.rand, []

    def short(few: int, generator: torch.Generator | None) -> torch.Tensor:
        sizes.append(few)
        return rand(few, generator=generator) if len(sizes) > 2 else torch.zeros(few)  # gaps of one

    monkeypatch.setattr(torch, "rand", short)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        at = dropped(torch.empty(10, 40), 0.1)
    assert len(sizes) == 3
    assert at[: 2 * sizes[0]].tolist() == list(range(2 * sizes[0]))
    assert int(at.max()) < 400


@pytest.mark.parametrize(
    "device", ["gpu", "cpu:x", "mps", "meta", "cuda" if not torch.cuda.is_available() else "cuda:99"]
)
def test_a_device_that_cannot_be_used_is_a_line(folder: Path, device: str) -> None:
    with pytest.raises(
        FlexLoraError, match=f"device: '{device}' cannot be used here .*; choose cpu, cuda or auto"
    ) as error:
        load_model(str(folder), device=device)
    assert "\n" not in str(error.value)


def test_fingerprint_is_of_the_weights_not_of_folder_or_precision(folder: Path, model: Model, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert load_model(str(copy), targets=["q_proj"]).fingerprint == model.fingerprint
    assert load_model(str(copy), precision="bfloat16").fingerprint == model.fingerprint
    assert load_model(str(tiny_model(tmp_path / "other", seed=1))).fingerprint != model.fingerprint


def test_scaling() -> None:
    assert scaling(16, 4, "alpha_over_r") == 4.0
    assert scaling(16, 4, "rslora") == 8.0


def one_line(error: pytest.ExceptionInfo[FlexLoraError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_missing_target_names_the_option_and_what_there_is(folder: Path) -> None:
    with pytest.raises(FlexLoraError) as error:
        load_model(str(folder), targets=("q_proj", "c_attn"))
    assert "--lora_target_modules" in one_line(error)
    assert "c_attn" in one_line(error)
    assert "gate_proj" in one_line(error)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent"), str(tmp_path / "absent.gguf"), str(tmp_path)):
        with pytest.raises(FlexLoraError) as error:
            load_model(name)
        assert f"--model {name}" in one_line(error)


def test_a_model_without_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "pickled"))
    torch.save(torch.load, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FlexLoraError) as error:
        load_model(str(copy))
    assert "safetensors" in one_line(error)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"num_hidden_layers": 3}),
        ("config.json", {"hidden_size": 64}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"hidden_act": "none such"}),
        ("config.json", []),
        ("tokenizer.json", []),
    ],
)
def test_a_model_folder_that_does_not_fit_its_weights_is_one_line(
    folder: Path, tmp_path: Path, file: str, change: Any
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "other"))
    was = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**was, **change} if change else change))
    with pytest.raises(FlexLoraError) as error:
        load_model(str(copy))
    assert f"--model {copy}" in one_line(error)
    if "num_hidden_layers" in change:
        assert "its weights lack 9 tensors" in one_line(error)


def test_adapters_that_do_not_fit_or_are_pickled_are_refused(model: Model, folder: Path, tmp_path: Path) -> None:
    wrong = {"model.layers.0.self_attn.q_proj": LowRank(torch.zeros(5, 2), torch.zeros(2, 32))}
    with pytest.raises(FlexLoraError, match="q_proj"):
        model.attach(wrong)
    save_adapter(tmp_path / "wrong", wrong, base_model=str(folder))
    with pytest.raises(FlexLoraError, match="does not fit the model"):
        load_adapter(tmp_path / "wrong", model.shapes)
    assert load_adapter(tmp_path / "wrong")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FlexLoraError) as error:
        load_adapter(pickled)
    assert ".bin" in one_line(error)
    config = tmp_path / "wrong" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(FlexLoraError, match="DoRA"):
        load_adapter(tmp_path / "wrong")


class TestConversion:
    """GGUF to safetensors, with transformers' reader replaced by a tiny model: the real one takes half a minute."""

    @pytest.fixture
    def source(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        file = tmp_path / "tiny.gguf"
        file.write_bytes(b"GGUF tiny")
        self.calls = 0

        def read(*, gguf_file: str, **_: object) -> object:
            assert gguf_file == file.name
            self.calls += 1
            network = AutoModelForCausalLM.from_pretrained(folder)
            network.config.quantization_config = {"quant_method": "gguf"}
            return network

        class Auto:
            from_pretrained = staticmethod(read)

        class AutoTokens:
            from_pretrained = staticmethod(lambda **_: tiny_tokenizer())

        monkeypatch.setattr("transformers.AutoModelForCausalLM", Auto)
        monkeypatch.setattr("transformers.AutoTokenizer", AutoTokens)
        return file

    def test_once_then_from_the_cache(self, source: Path, folder: Path, tmp_path: Path) -> None:
        result = gguf.converted(source, tmp_path / "cache")
        assert gguf.converted(source, tmp_path / "cache") == result
        assert self.calls == 1
        assert [x.name for x in result.parent.iterdir()] == [result.name]  # nothing unfinished beside it
        (tmp_path / "usual").mkdir()
        assert result.stat().st_mode == (tmp_path / "usual").stat().st_mode  # a cache may be shared
        assert "quantization_config" not in json.loads((result / "config.json").read_text())
        assert (result / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    def test_a_damaged_or_unfinished_folder_is_made_again(self, source: Path, tmp_path: Path) -> None:
        result = gguf.converted(source, tmp_path / "cache")
        good = (result / "model.safetensors").read_bytes()
        (result / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        gguf.converted(source, tmp_path / "cache")
        assert self.calls == 2
        assert (result / "model.safetensors").read_bytes() == good
        (result / gguf.MANIFEST).unlink()
        gguf.converted(source, tmp_path / "cache")
        assert self.calls == 3
        for number, text in enumerate(("{", "[]", "{}", '{"source": 1, "files": []}'), start=4):
            (result / gguf.MANIFEST).write_text(text)
            gguf.converted(source, tmp_path / "cache")
            assert self.calls == number

    def test_another_file_is_another_folder(self, source: Path, tmp_path: Path) -> None:
        first = gguf.converted(source, tmp_path / "cache")
        source.write_bytes(b"GGUF other")
        assert gguf.converted(source, tmp_path / "cache") != first
        assert self.calls == 2


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "find_spec", lambda _: None)
    with pytest.raises(FlexLoraError) as error:
        load_model("smollm2")
    assert "pip install" in one_line(error)


def test_the_cache_folder_follows_option_then_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf.cache_folder() == tmp_path / "flexlora"
    assert gguf.cache_folder(tmp_path / "mine") == tmp_path / "mine"
