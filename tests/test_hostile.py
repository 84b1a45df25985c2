"""Messages and files that somebody made to do harm, one by one: headers that lie, JSON without end, names that climb."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from flexlora import guard, wire
from flexlora.config import Config, make_config
from flexlora.saved import load_adapter, save_adapter
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
    TrainTask,
)
from noisy import noisy_update

SHAPES = {"m.q_proj": (6, 5), "m.down_proj": (4, 7)}
SENT = {m: LowRank(torch.zeros(a, 2), torch.ones(2, b)) for m, (a, b) in SHAPES.items()}
TASK = TrainTask(3, 0, dict.fromkeys(SHAPES, 2), Download(SENT, {}, ClientRule()), LocalTraining(), 0, base="smol")
GOOD = wire.pack_update(
    replace(noisy_update(0, SENT, seed=1), round=3, base="smol"), TASK.download.rule, torch.float32
)  # fmt: skip


def message(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with that header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(shape: list[int], size: int, dtype: str = "F32", name: str = "m.q_proj.A") -> bytes:
    return message({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, b"0" * size)


HOSTILE = {
    "a header longer than the file": struct.pack("<Q", 99_000_000) + b"{}",
    "a header longer than memory": struct.pack("<Q", 2**63) + b"{}",
    "nesting": message(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a shape beyond the data": one([2**40, 2**20], 4),
    "a shape that overflows": one([2**32, 2**32], 0),
    "no numbers, but a side of 2^62": one([0, 2**62], 0),
    "no numbers, but a side of 2^64 - 1": one([0, 2**64 - 1], 0),
    "ten thousand dimensions": one([1] * 10_000, 4),
    "no dimension": one([], 4),
    "the same name twice": message(
        b'{"m.q_proj.A":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"m.q_proj.A":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"0000",
    ),
    "two tensors on the same bytes": message(
        {f"m.q_proj.{p}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for p in "AB"}, b"0000"
    ),
    "a type without numbers in torch": one([4], 4, "F8_E8M0"),
    "complex numbers": one([1, 1], 8, "C64"),
    "a name that climbs": one([1, 1], 4, name="../../../../etc/passwd.A"),
    "a name with an escape": one([1, 1], 4, name="\x1b[2J.A"),
}


def answered(parcel: wire.Parcel) -> str | ClientUpdate:
    """What the server makes of an answer."""
    try:
        update = wire.unpack_update(parcel, TASK)
    except FlexLoraError as error:
        return str(error)
    result = update if isinstance(update, ClientFailure) else guard.examine(update, TASK)
    return result.reason if isinstance(result, ClientFailure) else result


def test_the_good_message_passes() -> None:
    assert isinstance(answered(GOOD), ClientUpdate)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_a_line(name: str, tmp_path: Path) -> None:
    said = answered(GOOD._replace(adapter=HOSTILE[name]))
    assert isinstance(said, str)
    assert said.isprintable()
    assert len(said) < 500
    # the same bytes as an adapter from outside
    folder = tmp_path / "adapter"
    save_adapter(folder, SENT, base_model="m", kind="alpha_over_r", alpha=16.0, readme="")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(HOSTILE[name])
    with pytest.raises(FlexLoraError) as error:
        load_adapter(folder, SHAPES)
    assert str(error.value).isprintable()
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }


def test_factors_of_two_ranks_are_refused() -> None:
    tensors = {f"{m}.{p}": getattr(x, p).clone() for m, x in SENT.items() for p in "AB"}
    tensors["m.q_proj.A"] = torch.ones(1, 5)  # assigned: 2 rows
    assert "of ranks 2 and 1" in str(answered(GOOD._replace(adapter=save(tensors))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_types_that_do_not_travel_are_refused(dtype: torch.dtype) -> None:
    tensors = {f"{m}.{p}": getattr(x, p).to(dtype) for m, x in SENT.items() for p in "AB"}
    assert f"numbers of type {dtype}" in str(answered(GOOD._replace(adapter=save(tensors))))


def test_more_numbers_than_were_sent_are_refused_before_they_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{m}.{p}": getattr(x, p).bfloat16() for m, x in SENT.items() for p in "AB"}
    tensors["m.q_proj.A"] = torch.ones(2000, 5, dtype=torch.bfloat16)
    grown: list[int] = []
    widen = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: grown.append(x.numel()) or widen(x))
    assert "more numbers in m.q_proj" in str(answered(GOOD._replace(adapter=save(tensors))))
    assert max(grown, default=0) <= 12


def facts(**changes: Any) -> str:
    return json.dumps({**json.loads(GOOD.facts), **changes})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"kind": "update", "weight": ' + "9" * 5_000 + "}", "not JSON"),
        ("\0", "not JSON"),
        ("[]", "no update"),
        (facts(weight=float("nan")), "no number of examples"),
        (facts(weight=float("inf")), "no number of examples"),
        (facts(weight=-1), "no number of examples"),
        (facts(weight=1e300), "no number of examples"),
        (facts(weight=1e-300), "no number of examples"),
        (facts(weight=True), "not a number"),
        (facts(weight="5"), "not a number"),
        (facts(weight=[[[5]]]), "not a number"),
        (facts(round=2), "trained for round 2"),
        (facts(round=None), "trained for round -1"),
        (facts(base="llama"), "another base model"),
        (facts(base=None), "another base model"),
        (facts(kind="failure", reason="\x1b[31mred\x1b[0m\r\nflexlora: all is well \ud800"), "?[31mred?[0m flexlora"),
        (facts(kind="failure", reason="x" * 10**6), "xxx"),
        (facts(kind="failure", reason={"a": [1]}), "{'a': [1]}"),
    ],
)
def test_hostile_facts_are_a_line(text: str, reason: str) -> None:
    said = answered(GOOD._replace(facts=text))
    assert isinstance(said, str)
    assert reason in said
    assert said.isprintable()
    assert len(said) <= 500
    said.encode()


def test_figures_that_nobody_can_count_are_dropped() -> None:
    update = answered(GOOD._replace(facts=facts(metrics={"train_loss": 1e308, "tokens": 1e16, "steps": 3, "id": 9})))
    assert isinstance(update, ClientUpdate)
    assert dict(update.metrics) == {"steps": 3, "bytes_up": len(GOOD.adapter)}


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc", "a\\b", "a\0b", ""])
def test_names_of_runs_cannot_leave_their_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(FlexLoraError, match="name: a name is one folder name"):
        make_config({"name": name, "output_dir": tmp_path})
    assert Config().trust_remote_code is False


@pytest.mark.parametrize("run", ["..", "../../etc", "A" * 8, "", "0" * 65, "0/1", "0\n"])
def test_names_of_kept_parts_cannot_leave_their_folder(run: str) -> None:
    """The name comes from the server, the folder is the site's."""
    flower = pytest.importorskip("flexlora.runners.flower")

    class Context:
        node_config: dict[str, Any] = {}  # noqa: RUF012

    with pytest.raises(FlexLoraError, match="no proper name"):
        flower.kept_folder(Context(), run)
    assert flower.kept_folder(Context(), "0a" * 8).name == "0a" * 8


def test_a_score_of_more_tokens_than_its_examples_can_have_is_no_vote() -> None:
    flower = pytest.importorskip("flexlora.runners.flower")
    runner = object.__new__(flower.FlowerRunner)
    runner._settings = LocalTraining(cutoff_len=10)
    tasks = [EvalTask(1, client, TASK.download, 8) for client in (0, 1)]
    told = [ClientScore(0, 40.0, 80, 8), ClientScore(1, 1e-9, 2**40, 8)]
    runner._stream = lambda kind, tasks: zip(tasks, map(wire.pack_score, told), strict=True)
    first, second = runner.evaluate(1, tasks)
    assert first == told[0]
    assert isinstance(second, ClientFailure)
    assert "more tokens than its examples" in second.reason
