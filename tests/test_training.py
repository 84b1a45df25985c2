"""Local training against a plain PEFT + torch loop, and what must not change with batches, clients and random states."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    get_linear_schedule_with_warmup,
)

from flexlora import attention
from flexlora import rows as rows_module
from flexlora import training as training_module
from flexlora.logits import bare_head
from flexlora.modeling import Model, load_model
from flexlora.rows import collate, label_tokens
from flexlora.saved import save_adapter
from flexlora.training import batches, learning_rate, loss_sum, train_client
from flexlora.types import Adapter, ClientRule, ClientUpdate, Download, LocalTraining, LowRank, Sparse, TrainTask
from tiny import tiny_model

Q0 = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Example:
    input_ids: tuple[int, ...]
    response_start: int
    cut: int = 0


def make_examples(count: int = 11, seed: int = 0) -> list[Example]:
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        prompt, answer = 3 + (5 * i) % 7, 2 + (3 * i) % 5
        ids = torch.randint(0, 256, (prompt + answer,), generator=draw).tolist()
        examples.append(Example(tuple(ids), prompt, cut=i % 3))
    return examples


EXAMPLES = make_examples()
TRAINING = LocalTraining(
    learning_rate=0.02, batch_size=4, micro_batch_size=2, epochs=2, train_on_inputs=False, warmup=1, alpha=6.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(str(folder))


def start_adapter(model: Model, ranks: Sequence[int] = (4, 1, 6), seed: int = 0) -> dict[str, LowRank]:
    """Both factors away from zero, so that every part has a gradient at once."""
    draw = torch.Generator().manual_seed(seed)
    result = {}
    for i, (m, (d_out, d_in)) in enumerate(model.shapes.items()):
        r = ranks[i % len(ranks)]
        result[m] = LowRank(
            torch.randn(d_out, r, generator=draw) * 0.05, torch.randn(r, d_in, generator=draw) / d_in**0.5
        )
    return result


def task_of(
    adapter: Adapter, training: LocalTraining = TRAINING, rule: ClientRule | None = None, **more: Any
) -> TrainTask:
    ranks = {m: len(x.A) for m, x in adapter.items() if isinstance(x, LowRank)}
    download = Download(adapter, more.pop("base_delta", {}), rule or ClientRule())
    return replace(TrainTask(1, 7, ranks, download, training, seed=123), **more)


def difference(a: Adapter, b: Adapter) -> float:
    """Largest difference of any entry."""
    worst = 0.0
    assert list(a) == list(b)
    for x, y in zip(a.values(), b.values(), strict=True):
        for s, t in zip(x[:2], y[:2], strict=True):
            assert isinstance(s, Tensor)
            assert isinstance(t, Tensor)
            assert s.shape == t.shape
            worst = max(worst, float((s - t).abs().max()) if s.numel() else 0.0)
    return worst


def peft_loop(
    folder: Path, scratch: Path, adapter: dict[str, LowRank], training: LocalTraining, seed: int
) -> tuple[list[float], dict[str, Tensor]]:
    """The obvious loop: PEFT, one left-padded batch a step with an attention mask, all logits, a loop over examples."""
    save_adapter(scratch, adapter, base_model=str(folder), kind=training.scaling, alpha=training.alpha)
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), scratch, is_trainable=True)
    network.train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    if training.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=training.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
    steps = batches([len(x.input_ids) for x in EXAMPLES], training, seed)
    schedule = get_linear_schedule_with_warmup(optimizer, training.warmup, len(steps))
    losses = []
    for chosen in steps:
        width = max(len(EXAMPLES[i].input_ids) for i in chosen)
        ids, mask = torch.full((len(chosen), width), 258), torch.zeros(len(chosen), width, dtype=torch.long)
        for row, i in enumerate(chosen):
            n = len(EXAMPLES[i].input_ids)
            ids[row, width - n :] = torch.tensor(EXAMPLES[i].input_ids)
            mask[row, width - n :] = 1
        position = (mask.cumsum(1) - 1).clamp(min=0)
        log_p = network(input_ids=ids, attention_mask=mask, position_ids=position).logits.log_softmax(-1)
        total, count = torch.zeros(()), 0
        for row, i in enumerate(chosen):
            x = EXAMPLES[i]
            first = 1 if training.train_on_inputs else x.response_start
            for k in range(first, len(x.input_ids)):
                total = total - log_p[row, width - len(x.input_ids) + k - 1, x.input_ids[k]]
                count += 1
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    state = {n.removeprefix("base_model.model."): p.detach() for n, p in network.named_parameters() if p.requires_grad}
    return losses, state


def curve(model: Model, task: TrainTask, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], ClientUpdate]:
    """Losses of all steps beside the update."""
    from flexlora import training

    losses: list[float] = []
    inner = training._backward

    def record(*args: Any) -> float:
        losses.append(inner(*args))
        return losses[-1]

    monkeypatch.setattr(training, "_backward", record)
    return losses, train_client(model, task, EXAMPLES)


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("kind", ["alpha_over_r", "rslora"])
@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.02), ("sgd", 0.5)])
def test_equals_a_plain_peft_loop(
    model: Model,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_on_inputs: bool,
    kind: Any,
    optimizer: Any,
    rate: float,
) -> None:
    training = replace(
        TRAINING, optimizer=optimizer, learning_rate=rate, scaling=kind, train_on_inputs=train_on_inputs, warmup=2
    )
    adapter = start_adapter(model)
    expected, state = peft_loop(folder, tmp_path, adapter, training, 123)
    losses, update = curve(model, task_of(adapter, training), monkeypatch)
    assert len(losses) == 6
    assert losses == pytest.approx(expected, abs=1e-5)
    assert max(losses) - min(losses) > 0.1  # something was learnt: the curves are not merely flat
    for m, x in update.adapter.items():
        assert isinstance(x, LowRank)
        A, B = state[f"{m}.lora_A.default.weight"], state[f"{m}.lora_B.default.weight"]
        torch.testing.assert_close(x.A, A, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(x.B / update.scaling[m], B, rtol=1e-3, atol=1e-4)
    assert update.scaling[Q0] == (6 / 4 if kind == "alpha_over_r" else 3.0)


def test_accumulation_does_not_change_the_result(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    curves, adapters = [], []
    for micro in (8, 3, 1):
        training = replace(TRAINING, batch_size=8, micro_batch_size=micro, optimizer="sgd", learning_rate=0.5)
        with monkeypatch.context() as patch:
            losses, update = curve(model, task_of(start_adapter(model), training), patch)
        curves.append(losses)
        adapters.append(update.adapter)
    for other in (1, 2):
        assert curves[other] == pytest.approx(curves[0], abs=1e-5)
        assert difference(adapters[0], adapters[other]) < 1e-5
    assert difference(adapters[0], start_adapter(model)) > 0.01


def with_beginning(length: int, count: int = 6) -> list[Example]:
    """Examples that all begin with the same tokens; one of them is hardly longer than these."""
    beginning = tuple((7 * i) % 200 for i in range(length))
    rest = make_examples(count, seed=4)
    longer = [Example(beginning + x.input_ids, x.response_start + length) for x in rest]
    return [*longer, Example((*beginning, 5, 6), length)]


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize(("cutoff", "passes"), [(512, 1), (24, 3), (4, 7)])
def test_a_common_beginning_is_computed_once_and_changes_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch, train_on_inputs: bool, cutoff: int, passes: int
) -> None:
    examples = with_beginning(20)
    training = replace(
        TRAINING,
        optimizer="sgd",
        learning_rate=0.5,
        batch_size=7,
        micro_batch_size=2,
        epochs=1,
        warmup=0,
        cutoff_len=cutoff,  # two examples of that length bound a row
        train_on_inputs=train_on_inputs,
    )
    task = task_of(start_adapter(model), training, base_delta=start_adapter(model, [2], seed=4))
    assert bare_head(model.network)  # passes a token to find out, once
    assert model.halves_rows  # and this one four
    tokens: list[int] = []
    watch = model.network.get_input_embeddings().register_forward_hook(lambda _, x, __: tokens.append(x[0].numel()))
    outcomes = []
    for shares in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(model, "shares_rows", shares)
            patch.setattr(rows_module, "PAIR", 10**6)  # halves have less padding, which is counted here
            outcomes.append((train_client(model, task, examples), tokens.copy()))
        tokens.clear()
    watch.remove()
    (ours, few), (plain, many) = outcomes
    assert len(few) == passes
    assert max(few) <= max(2 * cutoff, max(len(x.input_ids) for x in examples))
    own = sum(len(x.input_ids) for x in examples)
    assert sum(few) == own - (7 - passes) * 19
    assert sum(many) >= own
    for key in ("first_loss", "last_loss"):
        assert ours.metrics[key] == pytest.approx(plain.metrics[key], abs=1e-5)
    assert difference(ours.adapter, plain.adapter) < 1e-5
    assert difference(ours.adapter, task.download.adapter) > 0.01


def test_a_row_holds_no_more_than_two_lanes_on_a_processor(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []
    watch = model.network.get_input_embeddings().register_forward_hook(lambda _, x, __: tokens.append(x[0].numel()))
    training = replace(TRAINING, batch_size=7, micro_batch_size=2, epochs=1, cutoff_len=30, train_on_inputs=True)
    for lane, least, most in ((1000, 41, 60), (20, 34, 40), (10, 1, 33)):
        monkeypatch.setattr("flexlora.training.LANE", lane)
        tokens.clear()
        train_client(model, task_of(start_adapter(model), training), with_beginning(20))
        assert least <= max(tokens) <= most
    watch.remove()


@pytest.mark.parametrize(("micro", "lane", "least", "most"), [(1, 10, 30, 33), (2, 10, 34, 66), (1, 60, 34, 60)])
def test_a_row_holds_no_more_than_a_micro_batch_would_or_one_lane(
    model: Model, monkeypatch: pytest.MonkeyPatch, micro: int, lane: int, least: int, most: int
) -> None:
    tokens: list[int] = []
    watch = model.network.get_input_embeddings().register_forward_hook(lambda _, x, __: tokens.append(x[0].numel()))
    monkeypatch.setattr("flexlora.training.LANE", lane)
    training = replace(TRAINING, batch_size=7, micro_batch_size=micro, epochs=1, cutoff_len=512)
    examples = with_beginning(20)
    train_client(model, task_of(start_adapter(model), training), examples)
    watch.remove()
    assert max(len(x.input_ids) for x in examples) == 33
    assert least <= max(tokens) <= most


def test_a_mean_over_many_labels_is_not_too_small_for_float16(model: Model, folder: Path) -> None:
    """SGD moves the adapter by what the gradient is: in float16 about as in float32."""
    examples = [Example(tuple(range(3, 60)), 1) for _ in range(64)]
    training = replace(
        TRAINING, optimizer="sgd", learning_rate=1.0, batch_size=64, micro_batch_size=64, epochs=1, warmup=0
    )
    half, start = load_model(str(folder), precision="float16"), start_adapter(model)
    found = [train_client(one, task_of(start, training), examples).adapter for one in (model, half)]
    for m, origin in start.items():
        whole, halved = (x[m] for x in found)
        assert isinstance(whole, LowRank)
        assert isinstance(halved, LowRank)
        for x, y, z in ((whole.A, halved.A, origin.A), (whole.B, halved.B, origin.B)):
            assert float((x - y).norm()) < 0.01 * float((x - z).norm())


def test_windows_are_not_shared(model: Model) -> None:
    assert model.shares_rows
    config = MistralConfig(**model.network.config.to_dict() | {"model_type": "mistral", "sliding_window": 8})
    window = Model(MistralForCausalLM(config), model.tokenizer, name="window")
    assert not window.shares_rows
    train_client(window, task_of(start_adapter(window)), with_beginning(20))


def test_a_network_that_scales_its_logits_gives_the_same_bits_from_the_first_client_on(model: Model) -> None:
    """That it does is found out in a pass of its own, which must draw nothing."""
    config = GraniteConfig(**model.network.config.to_dict() | {"model_type": "granite", "logits_scaling": 3.0})
    torch.manual_seed(0)
    granite = Model(GraniteForCausalLM(config), model.tokenizer, name="granite")
    training = replace(TRAINING, dropout=0.3)
    first, second = (train_client(granite, task_of(start_adapter(granite), training), EXAMPLES) for _ in range(2))
    assert bare_head(granite.network) is None
    assert difference(first.adapter, second.adapter) == 0.0


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lanes_side_by_side_change_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch, train_on_inputs: bool, dropout: float
) -> None:
    """The same bits whichever lane is done first; on any number of cores what one large pass gives, but for rounding."""
    more = {"batch_size": 7, "micro_batch_size": 7, "dropout": dropout, "train_on_inputs": train_on_inputs}
    training = replace(TRAINING, **more, optimizer="sgd", learning_rate=0.5, warmup=0)
    task, examples = task_of(start_adapter(model), training), make_examples(7)
    threads: set[int] = set()
    watch = model.network.get_input_embeddings().register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    outcomes = []
    try:
        monkeypatch.setattr(rows_module, "PAIR", 8)
        monkeypatch.setattr(rows_module, "LANE", 8)
        for cores in (1, 2, 3, 2):
            torch.set_num_threads(cores)
            threads.clear()
            outcomes.append(train_client(model, task, examples))
            assert torch.get_num_threads() == cores
            assert (len(threads) > 1) == (cores > 1)
        monkeypatch.setattr(rows_module, "PAIR", 10**6)
        whole = train_client(model, task, examples)
    finally:
        watch.remove()
    one, two, three, again = outcomes
    assert difference(two.adapter, again.adapter) == 0.0
    assert difference(one.adapter, two.adapter) < 1e-5
    assert difference(one.adapter, three.adapter) < 1e-5
    assert (difference(one.adapter, whole.adapter) < 1e-5) is (dropout == 0.0)


@pytest.mark.parametrize(("precision", "dropout"), [("float32", 0.0), ("float32", 0.3), ("bfloat16", 0.0)])
@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("examples", [make_examples(7)[:1], with_beginning(20)], ids=["one", "shared"])
def test_halves_of_a_row_side_by_side_change_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_on_inputs: bool,
    examples: list[Example],
    precision: str,
    dropout: float,
) -> None:
    """Nor does dropout, which one core draws for a whole row as two would for its halves."""
    model = load_model(str(tiny_model(tmp_path)), precision=precision)
    more = {"batch_size": 7, "micro_batch_size": 7, "train_on_inputs": train_on_inputs, "dropout": dropout}
    training = replace(TRAINING, **more, optimizer="sgd", learning_rate=0.5, warmup=0)
    task = task_of(start_adapter(model), training, base_delta=start_adapter(model, [2], seed=4))
    ways: list[list[int]] = []
    cut = training_module.halves
    monkeypatch.setattr(rows_module, "PAIR", 2)
    monkeypatch.setattr(
        training_module, "halves", lambda rows: ways.append([len(x.labels) for x in cut(rows)]) or cut(rows)
    )
    outcomes = []
    for cores in (1, 2, 2, 3):
        torch.set_num_threads(cores)
        outcomes.append(train_client(model, task, examples))
        assert torch.get_num_threads() == cores
    one, two, again, three = outcomes
    assert ways
    assert all(len(labels) == 2 for labels in ways)
    near = 1e-5 if precision == "float32" else 0.02
    assert difference(two.adapter, again.adapter) == 0.0
    assert difference(two.adapter, three.adapter) < near
    assert difference(one.adapter, two.adapter) < near
    assert difference(one.adapter, task.download.adapter) > 0.01
    assert one.metrics["last_loss"] == pytest.approx(two.metrics["last_loss"], abs=near)


def test_a_second_half_that_never_begins_ends_the_first(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    task, examples = task_of(start_adapter(model), replace(TRAINING, batch_size=7)), with_beginning(20)
    monkeypatch.setattr(rows_module, "PAIR", 2)
    begin, begun = ThreadPoolExecutor.submit, []

    def submit(*given: Any, **more: Any) -> Any:
        begun.append(1)
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        return begin(*given, **more)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        train_client(model, task, examples)
    assert all(x.term is None for x in model._layers.values())


def test_a_gradient_that_the_second_half_never_sends_is_not_waited_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, examples = task_of(start_adapter(model), replace(TRAINING, batch_size=7)), with_beginning(20)
    monkeypatch.setattr(rows_module, "PAIR", 2)
    tell = attention.Between.tell
    monkeypatch.setattr(
        attention.Between, "tell", lambda self, what, *more: None if what == "gradients" else tell(self, what, *more)
    )
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="no gradient for the first"):
        train_client(model, task, examples)


def test_a_core_that_is_taken_away_meanwhile_does_not_matter(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    task, examples = task_of(start_adapter(model), replace(TRAINING, batch_size=7)), with_beginning(20)
    monkeypatch.setattr(rows_module, "PAIR", 2)
    outcomes = []
    for left in (2, 1):
        torch.set_num_threads(2)
        outcomes.append(train_client(model, task, examples, progress=lambda *_, n=left: torch.set_num_threads(n)))
    assert difference(outcomes[0].adapter, outcomes[1].adapter) < 1e-5


@pytest.mark.parametrize("place", ["_parts_back", "_in_parts"])
def test_what_ends_one_half_of_a_row_ends_the_client(model: Model, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """The other half does not wait for it for ever, and the next client is none the worse."""
    task, examples = task_of(start_adapter(model), replace(TRAINING, batch_size=7)), with_beginning(20)
    monkeypatch.setattr(rows_module, "PAIR", 2)
    back = getattr(attention, place)
    torch.set_num_threads(2)
    good = train_client(model, task, examples)
    for of_the_second in (True, False):

        def fails(*given: Any, of_the_second: bool = of_the_second) -> Any:
            if bool(given[6 if place == "_parts_back" else 3]) is of_the_second:
                raise RuntimeError("no memory")
            return back(*given)

        with monkeypatch.context() as patch:
            patch.setattr(attention, place, fails)
            with pytest.raises(RuntimeError, match="no memory"):
                train_client(model, task, examples)
        assert difference(train_client(model, task, examples).adapter, good.adapter) == 0.0


@pytest.mark.parametrize(
    ("keys", "alone"),
    [
        ({}, False),
        ({"attention_dropout": 0.1}, True),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, True),
    ],
)
def test_networks_that_draw_or_change_train_one_pass_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], alone: bool
) -> None:
    """And neither they nor those with a window have rows that are cut."""
    config = MistralConfig(**model.network.config.to_dict() | {"model_type": "mistral", "sliding_window": None} | keys)
    other = Model(MistralForCausalLM(config), model.tokenizer, name="other")
    assert other.side_by_side is not alone
    other_keys: dict[str, Any] = config.to_dict() | {"sliding_window": 3}
    windowed = MistralConfig(**other_keys)
    window = Model(MistralForCausalLM(windowed), model.tokenizer, name="window")
    cut: list[int] = []
    monkeypatch.setattr(training_module, "halves", lambda rows: cut.append(1) or [rows])
    torch.set_num_threads(2)
    for one, expected in ((other, not alone), (window, False)):
        cut.clear()
        train_client(one, task_of(start_adapter(one), replace(TRAINING, epochs=1)), with_beginning(20))
        assert bool(cut) is expected


def test_padding_and_the_other_examples_do_not_matter(model: Model) -> None:
    alone = [loss_sum(model, collate([x], False)).item() for x in EXAMPLES]
    together = loss_sum(model, collate(EXAMPLES, False)).item()
    assert together == pytest.approx(sum(alone), rel=1e-5)


def test_labels_are_the_response_or_everything_but_the_first_token() -> None:
    x, y = Example((5, 6, 7, 8), 2), Example((9, 3), 1)
    batch = collate([x, y], False)
    assert batch.labels.tolist() == [7, 8, 3]
    assert batch.keep.tolist() == [1, 2, 4]
    batch = collate([x, y], True)
    assert batch.labels.tolist() == [6, 7, 8, 3]
    assert batch.keep.tolist() == [0, 1, 2, 4]
    assert [label_tokens(x, False), label_tokens(x, True), label_tokens(y, False)] == [2, 3, 1]


def base_hash(model: Model) -> str:
    digest = hashlib.sha256()
    for weight in model.network.state_dict().values():
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def test_many_clients_leave_base_weights_modules_and_input_alone(model: Model) -> None:
    before, modules = base_hash(model), [id(x) for x in model.network.modules()]
    adapter = start_adapter(model)
    kept = {m: LowRank(x.B.clone(), x.A.clone()) for m, x in adapter.items()}
    first = train_client(model, task_of(adapter), EXAMPLES)
    for client in range(4):
        other = start_adapter(model, [1 + client, 3], seed=client)
        update = train_client(model, task_of(other, seed=client, client=client), make_examples(4, client))
        assert update.client == client
        assert [len(x.A) for x in update.adapter.values() if isinstance(x, LowRank)] == [1 + client, 3] * 7
    again = train_client(model, task_of(adapter), EXAMPLES)
    assert difference(first.adapter, again.adapter) == 0.0  # nothing of the clients between stays in the model
    assert difference(adapter, kept) == 0.0
    assert base_hash(model) == before
    assert [id(x) for x in model.network.modules()] == modules
    assert not any(p.requires_grad or p.grad is not None for p in model.network.parameters())
    assert not model.network.training


def test_global_random_states_stay_and_do_not_matter(model: Model) -> None:
    task = task_of(start_adapter(model), replace(TRAINING, dropout=0.3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = train_client(model, task, EXAMPLES)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert difference(train_client(model, task, EXAMPLES).adapter, first.adapter) == 0.0
    assert difference(train_client(model, replace(task, seed=5), EXAMPLES).adapter, first.adapter) > 1e-3


def test_dropout_draws_with_the_seed_and_acts(model: Model) -> None:
    still = replace(
        TRAINING, batch_size=11, micro_batch_size=11, epochs=1, warmup=0
    )  # one step: the order is no matter
    adapter = start_adapter(model)
    one, two = (train_client(model, task_of(adapter, still, seed=s), EXAMPLES).metrics["train_loss"] for s in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    noisy = replace(still, dropout=0.5)
    one, two = (train_client(model, task_of(adapter, noisy, seed=s), EXAMPLES).metrics["train_loss"] for s in (1, 2))
    assert abs(one - two) > 1e-4


@pytest.mark.parametrize(("train", "frozen"), [(("B",), 1), (("A",), 0)])
def test_frozen_parts_do_not_move(model: Model, train: tuple[str, ...], frozen: int) -> None:
    adapter = start_adapter(model, [4])  # scaling 1.5
    update = train_client(model, task_of(adapter, rule=ClientRule(train=train)), EXAMPLES)
    for m, x in update.adapter.items():
        assert torch.allclose(x[frozen], adapter[m][frozen], rtol=1e-6, atol=0)  # pyright: ignore[reportArgumentType]
        assert not torch.allclose(x[1 - frozen], adapter[m][1 - frozen], atol=1e-3)  # pyright: ignore[reportArgumentType]


def test_base_delta_counts_and_is_not_trained(model: Model) -> None:
    adapter, base_delta = start_adapter(model), start_adapter(model, [2], seed=4)
    with_delta = train_client(model, task_of(adapter, base_delta=base_delta), EXAMPLES)
    without = train_client(model, task_of(adapter), EXAMPLES)
    assert with_delta.metrics["first_loss"] != pytest.approx(without.metrics["first_loss"], abs=1e-3)
    assert list(with_delta.adapter) == list(adapter)
    assert [x.A.shape for x in with_delta.adapter.values()] == [x.A.shape for x in adapter.values()]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sparse_stage_equals_dense_training_under_a_mask(model: Model, folder: Path, optimizer: Any) -> None:
    """Oracle: the whole weight matrices as parameters, their gradients masked, full-batch steps."""
    rate = 0.01 if optimizer == "adamw" else 0.5
    training = replace(TRAINING, optimizer=optimizer, learning_rate=rate, batch_size=11, epochs=3, warmup=0)
    sparse, masks = {}, {}
    for m, (d_out, d_in) in model.shapes.items():
        index = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(d_out))[:50]
        sparse[m] = Sparse(torch.randn(50, generator=torch.Generator().manual_seed(3)) * 0.1, index, (d_out, d_in))
        masks[m] = torch.zeros(d_out * d_in).index_fill(0, index, 1.0).view(d_out, d_in)
    rule = ClientRule(train=("values",), send=("values",))
    update = train_client(model, task_of(sparse, training, rule), EXAMPLES)

    network: Any = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    weights: dict[str, Tensor] = {m: network.get_submodule(m).weight for m in model.shapes}
    base = {m: w.detach().clone() for m, w in weights.items()}
    parameters = [w.requires_grad_() for w in weights.values()]
    with torch.no_grad():
        for m, x in sparse.items():
            weights[m].view(-1).index_add_(0, x.index, x.values)
    cls = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    steps = cls(parameters, lr=rate, weight_decay=0.0)
    for step in range(3):
        total, count = torch.zeros(()), 0
        for x in EXAMPLES:
            logits = network(input_ids=torch.tensor([x.input_ids])).logits[0]
            labels = torch.tensor(x.input_ids)[x.response_start :]
            total = total + torch.nn.functional.cross_entropy(
                logits[x.response_start - 1 : -1], labels, reduction="sum"
            )
            count += len(labels)
        (total / count).backward()
        for m, w in weights.items():
            assert w.grad is not None
            w.grad *= masks[m]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        steps.param_groups[0]["lr"] = rate * (3 - step) / 3
        steps.step()
        steps.zero_grad()
    for m, x in update.adapter.items():
        assert isinstance(x, Sparse)
        expected = (weights[m].detach() - base[m]).view(-1)[x.index]
        torch.testing.assert_close(x.values, expected, rtol=1e-3, atol=2e-5)
        assert float((x.values - sparse[m].values).abs().max()) > 1e-3
    assert not update.scaling


def test_prune_penalty_has_the_gradient_of_its_formula(model: Model) -> None:
    """SGD on one batch: the step differs from the one without penalty by -rate * gradient of the formula."""
    strength, gamma, rate = 0.01, 0.6, 1e-2
    training = replace(TRAINING, optimizer="sgd", learning_rate=rate, batch_size=11, epochs=1, warmup=0, alpha=5.0)
    adapter = start_adapter(model, [5])  # scaling 1: folded B is lora_B
    from flexlora import training as module

    old, module.MAX_GRAD_NORM = module.MAX_GRAD_NORM, 1e9  # the clip would mix both terms
    try:
        plain = train_client(model, task_of(adapter, training), EXAMPLES).adapter
        rule = ClientRule(prune=(strength, gamma, 5))  # smallest rank 5: nothing is cut
        pruned = train_client(model, task_of(adapter, training, rule), EXAMPLES).adapter
    finally:
        module.MAX_GRAD_NORM = old
    for m, x in adapter.items():
        B, A = x.B.double().requires_grad_(), x.A.double().requires_grad_()
        product = (B[:, 3:] ** 2).sum().sqrt() * (A[3:] ** 2).sum().sqrt()
        (strength * product).backward()
        for part, truth in ((0, B.grad), (1, A.grad)):
            assert truth is not None
            step = (plain[m][part] - pruned[m][part]) / rate  # pyright: ignore[reportOperatorIssue]
            torch.testing.assert_close(step.double(), truth, rtol=0, atol=1e-4)  # pyright: ignore[reportAttributeAccessIssue]
            assert float(truth.abs().max()) > 5e-4


def test_pruning_drops_what_faded_down_to_the_smallest_rank(model: Model) -> None:
    adapter = start_adapter(model, [5, 2])
    strong = ClientRule(prune=(5.0, 0.6, 2))  # ⌊.6 · 5⌋ = 3, ⌊.6 · 2⌋ = 1 but at least 2
    update = train_client(model, task_of(adapter, rule=strong), EXAMPLES)
    assert [len(x.A) for x in update.adapter.values() if isinstance(x, LowRank)] == [3, 2] * 7
    assert [x.B.shape[1] for x in update.adapter.values() if isinstance(x, LowRank)] == [3, 2] * 7
    grown = ClientRule(prune=(-0.5, 0.6, 1))  # a reward: the tails grow a little, nothing is cut
    update = train_client(model, task_of(adapter, rule=grown), EXAMPLES)
    assert [len(x.A) for x in update.adapter.values() if isinstance(x, LowRank)] == [5, 2] * 7


def test_update_says_what_was_done(model: Model) -> None:
    calls: list[tuple[int, int]] = []
    update = train_client(model, task_of(start_adapter(model)), EXAMPLES, progress=lambda a, b: calls.append((a, b)))
    assert calls == [(i, 6) for i in range(1, 7)]
    assert update.weight == 11.0
    m = update.metrics
    assert (m["examples"], m["steps"], m["cut"]) == (11, 6, sum(x.cut for x in EXAMPLES))
    assert m["tokens"] == 2 * sum(len(x.input_ids) for x in EXAMPLES)
    assert m["label_tokens"] == 2 * sum(len(x.input_ids) - x.response_start for x in EXAMPLES)
    assert m["last_loss"] < m["first_loss"]
    assert m["seconds"] > 0


def test_a_client_without_examples_is_an_error_and_leaves_the_model_bare(model: Model) -> None:
    for examples in ([], [Example((5,), 0)]):
        with pytest.raises(ValueError, match="client 7"):
            train_client(model, task_of(start_adapter(model)), examples)
    assert not model.read()


@given(
    count=st.integers(1, 70),
    size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    grouped=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_batches_cover_every_epoch_once(count: int, size: int, epochs: int, grouped: bool, seed: int) -> None:
    lengths = [(i * 37) % 50 for i in range(count)]
    training = replace(TRAINING, batch_size=size, epochs=epochs, group_by_length=grouped)
    steps = batches(lengths, training, seed)
    per_epoch = -(-count // size)
    assert len(steps) == epochs * per_epoch
    for e in range(epochs):
        part = steps[e * per_epoch : (e + 1) * per_epoch]
        assert sorted(i for b in part for i in b) == list(range(count))
        assert sorted(len(b) for b in part)[1:] == [size] * (per_epoch - 1)
    assert steps == batches(lengths, training, seed)


def test_group_by_length_pads_less_and_keeps_a_random_order() -> None:
    lengths = [(i * 37) % 101 for i in range(96)]

    def padded(grouped: bool, seed: int) -> int:
        steps = batches(lengths, replace(TRAINING, batch_size=8, epochs=1, group_by_length=grouped), seed)
        return sum(len(b) * max(lengths[i] for i in b) for b in steps)

    assert padded(True, 1) < 0.75 * padded(False, 1)
    training = replace(TRAINING, batch_size=8, epochs=1, group_by_length=True)
    assert batches(lengths, training, 1) != batches(lengths, training, 2)


@given(warmup=st.integers(0, 6), steps=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_the_rate_is_transformers_linear_schedule(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert learning_rate(step, steps, replace(TRAINING, learning_rate=0.3, warmup=warmup)) == pytest.approx(
            schedule.get_last_lr()[0]
        )
        optimizer.step()
        schedule.step()
