"""What travels: tasks and answers survive the way bit for bit, and nothing that arrives is trusted."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import wire
from flexlora.client import arrived, scored
from flexlora.methods import get_method
from flexlora.types import (
    ClientFailure,
    ClientRule,
    ClientScore,
    ClientUpdate,
    Download,
    EvalTask,
    FlexLoraError,
    LocalTraining,
    LowRank,
    Sparse,
    TrainTask,
)
from flexlora.wire import Parcel

SHAPES = {"z.q_proj": (6, 5), "a.down_proj": (4, 7)}
RANKS = {"z.q_proj": 2, "a.down_proj": 3}


def same(a: Any, b: Any) -> bool:
    """Equality of factors bit for bit."""
    return list(a) == list(b) and all(
        type(a[m]) is type(b[m])
        and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a[m], b[m], strict=True))
        for m in a
    )


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(seed: int = 0) -> dict[str, LowRank]:
    return {
        m: LowRank(noise((SHAPES[m][0], r), seed + i), noise((r, SHAPES[m][1]), seed + 9 + i))
        for i, (m, r) in enumerate(RANKS.items())
    }


def task(download: Download | None = None, **changes: Any) -> TrainTask:
    download = download or Download(adapter(), {}, ClientRule())
    return replace(TrainTask(3, 5, RANKS, download, LocalTraining(dropout=0.1), 2**62 + 1, "abc"), **changes)


def there(sent: TrainTask | EvalTask, dtype: torch.dtype = torch.float32, seed: int = 11) -> TrainTask | EvalTask:
    got, training, got_dtype = wire.unpack_task(
        wire.pack_task(sent, seed=seed, dtype=dtype, training=LocalTraining(warmup=2))
    )
    assert got_dtype == dtype
    assert training == (sent.training if isinstance(sent, TrainTask) else LocalTraining(warmup=2))
    return got


def test_a_task_arrives_as_it_was_sent() -> None:
    base = {"z.q_proj": LowRank(noise((6, 4), 1), noise((4, 5), 2))}
    rule = ClientRule(train=("A",), send=("A",), prune=(0.5, 0.9, 1))
    sent = task(Download(adapter(), base, rule))
    got = there(sent)
    assert isinstance(got, TrainTask)
    assert same(got.download.adapter, sent.download.adapter)
    assert same(got.download.base_delta, base)
    assert replace(got, download=sent.download) == sent
    assert got.download.rule == rule


def test_an_eval_task_arrives_as_it_was_sent() -> None:
    sent = EvalTask(2, 7, Download(adapter(), {}, ClientRule()), 4)
    got = there(sent)
    assert isinstance(got, EvalTask)
    assert (got.round, got.client, got.examples) == (2, 7, 4)
    assert same(got.download.adapter, sent.download.adapter)


def test_bfloat16_halves_the_message_and_arrives_as_it_was_cast() -> None:
    sent = task()
    cast = wire.cast(sent.download.adapter, torch.bfloat16)
    got = there(task(Download(cast, {}, ClientRule())), torch.bfloat16)
    assert same(got.download.adapter, cast)
    floats = sum(x.B.numel() + x.A.numel() for x in adapter().values())
    full, half = (wire.size(adapter(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert abs((full - half) - 2 * floats) <= 16


def test_places_of_sparse_values_are_derived_and_never_travel() -> None:
    method = get_method("slora", sparse_rounds=2)
    download = method.distribute(method.init(SHAPES, 11, [RANKS]), RANKS)
    sent = task(download)
    parcel = wire.pack_task(sent, seed=11, dtype=torch.float32)
    assert same(there(sent).download.adapter, download.adapter)
    longest = max(len(x.index) for x in download.adapter.values() if isinstance(x, Sparse))
    numbers = sum(len(x.index) for x in download.adapter.values() if isinstance(x, Sparse))
    assert len(parcel.adapter) < 4 * numbers + 400
    assert len(json.dumps([0] * longest)) > 30
    assert all(t.dtype == torch.float32 for parts in wire.decode(parcel.adapter).values() for t in parts.values())


def test_a_part_that_the_client_keeps_goes_neither_way() -> None:
    method = get_method("fedsa")
    download = method.distribute(method.init(SHAPES, 11, [RANKS]), RANKS)
    sent = task(download)
    parcel = wire.pack_task(sent, seed=11, dtype=torch.float32)
    assert {part for parts in wire.decode(parcel.adapter).values() for part in parts} == {"A"}
    assert same(there(sent).download.adapter, download.adapter)
    answer = wire.pack_update(ClientUpdate(5, 3.0, adapter(4)), download.rule, torch.float32)
    assert {part for parts in wire.decode(answer.adapter).values() for part in parts} == {"A"}
    got = arrived(answer, sent, torch.float32)
    assert isinstance(got, ClientUpdate)
    for m, x in got.adapter.items():
        assert isinstance(x, LowRank)
        assert torch.equal(x.A, adapter(4)[m].A)
        assert torch.equal(x.B, torch.zeros_like(x.B))


@settings(deadline=None, max_examples=20)
@given(weight=st.floats(1e-3, 1e6), loss=st.floats(0, 100), seed=st.integers(0, 1000))
def test_an_update_arrives_as_it_left(weight: float, loss: float, seed: int) -> None:
    metrics = {"train_loss": loss, "examples": 4}
    update = ClientUpdate(5, weight, adapter(seed), metrics=metrics, round=3, base="abc")
    answer = wire.pack_update(update, ClientRule(), torch.float32)
    got = arrived(answer, task(), torch.float32)
    assert isinstance(got, ClientUpdate)
    assert (got.client, got.weight, got.round, got.base) == (5, weight, 3, "abc")
    assert same(got.adapter, update.adapter)
    assert got.metrics["train_loss"] == loss
    assert got.metrics["bytes_up"] == len(answer.adapter) == wire.size(update.adapter)
    assert got.metrics["bytes_down"] == wire.size(task().download.adapter)
    assert got.scaling == {"z.q_proj": 16 / 2, "a.down_proj": 16 / 3}


def answer_with(**changes: Any) -> Parcel:
    update = ClientUpdate(5, 3.0, adapter(1), metrics={"train_loss": 1.0}, round=3, base="abc")
    parcel = wire.pack_update(update, ClientRule(), torch.float32)
    facts = json.loads(parcel.facts) | {k: v for k, v in changes.items() if k != "adapter"}
    return Parcel(json.dumps(facts), changes.get("adapter", parcel.adapter))


def test_figures_that_nobody_asked_for_are_dropped() -> None:
    told = {"train_loss": 2.0, "failed": 1.0, "id": 7, "seconds": "long", "tokens": 10**400, "ranks": 3}
    got = arrived(answer_with(metrics=told), task(), torch.float32)
    assert isinstance(got, ClientUpdate)
    assert set(got.metrics) == {"train_loss", "bytes_up", "bytes_down"}


def test_a_client_answers_for_itself_alone() -> None:
    got = arrived(answer_with(client=6), task(), torch.float32)
    assert got.client == 5


def test_a_part_that_the_rule_does_not_send_is_not_taken() -> None:
    download = Download(adapter(), {}, ClientRule(train=("B",), send=("B",)))
    got = arrived(answer_with(), task(download), torch.float32)
    assert isinstance(got, ClientUpdate)
    for m, x in got.adapter.items():
        assert isinstance(x, LowRank)
        assert torch.equal(x.A, adapter()[m].A)
        assert torch.equal(x.B, adapter(1)[m].B)


STRANGE = {"other.module": LowRank(torch.ones(2, 1), torch.ones(1, 2))}


@pytest.mark.parametrize(
    ("parcel", "word"),
    [
        (Parcel("no json"), "JSON"),
        (Parcel("[" * 100_000), "JSON"),
        (Parcel("[]"), "no update"),
        (Parcel('{"kind": "score"}'), "no update"),
        (answer_with(weight="much"), "weight"),
        (answer_with(weight=True), "weight"),
        (answer_with(adapter=b""), "safetensors"),
        (answer_with(adapter=b"\xff" * 64), "safetensors"),
        (answer_with(adapter=wire.encode(STRANGE)), "not sent"),
        (answer_with(adapter=wire.encode({"z.q_proj": LowRank(torch.ones(6), torch.ones(5))})), "no matrices"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_rejection(parcel: Parcel, word: str) -> None:
    got = arrived(parcel, task(), torch.float32)
    assert isinstance(got, ClientFailure)
    assert got.client == 5
    assert got.reason.startswith("rejected: ")
    assert word in got.reason
    assert "\n" not in got.reason


def test_a_failure_arrives_on_one_line() -> None:
    got = arrived(wire.pack_failure(ClientFailure(9, "no\ndata " + "x" * 9999)), task(), torch.float32)
    assert isinstance(got, ClientFailure)
    assert got.client == 5
    assert got.reason.startswith("no data x")
    assert len(got.reason) <= 500


@pytest.mark.parametrize(
    "facts",
    [
        {"loss_sum": float("nan"), "tokens": 5, "examples": 2},
        {"loss_sum": -1.0, "tokens": 5, "examples": 2},
        {"loss_sum": 1.0, "tokens": -5, "examples": 2},
        {"loss_sum": 1.0, "tokens": 5, "examples": 5},
        {"loss_sum": 1.0, "tokens": 5},
        {"loss_sum": "1", "tokens": 5, "examples": 2},
    ],
)
def test_a_score_that_makes_no_sense_is_a_rejection(facts: dict[str, Any]) -> None:
    asked = EvalTask(2, 7, Download(adapter(), {}, ClientRule()), 4)
    good = wire.pack_score(ClientScore(7, 1.5, 5, 4))
    assert scored(good, asked) == ClientScore(7, 1.5, 5, 4)
    assert isinstance(scored(Parcel(json.dumps({"kind": "score", **facts})), asked), ClientFailure)


@pytest.mark.parametrize("lacking", ["round", "rule", "shapes", "training", "dtype", "kind", "seed"])
def test_a_task_of_another_version_is_one_line(lacking: str) -> None:
    parcel = wire.pack_task(task(), seed=1, dtype=torch.float32)
    facts = json.loads(parcel.facts)
    del facts[lacking]
    with pytest.raises(FlexLoraError, match="version"):
        wire.unpack_task(parcel._replace(facts=json.dumps(facts)))


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("rule", {"train": [], "send": [], "keep": [], "prune": [0.1]}),
        ("round", float("inf")),
        ("client", float("inf")),
        ("shapes", {"q_proj": [-3, 5]}),
        ("shapes", {"q_proj": [2**62, 5]}),
        ("shapes", {"q_proj": [True, 5]}),
    ],
)
def test_a_task_that_makes_no_sense_is_one_line(fact: str, value: Any) -> None:
    parcel = wire.pack_task(task(), seed=1, dtype=torch.float32)
    facts = json.loads(parcel.facts)
    assert fact in facts
    facts[fact] = value
    why = "q_proj cannot have" if fact == "shapes" else ""
    with pytest.raises(FlexLoraError, match=f"the task cannot be read .*{why}"):
        wire.unpack_task(parcel._replace(facts=json.dumps(facts)))
