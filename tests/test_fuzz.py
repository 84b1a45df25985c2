"""Bad input of every kind that comes from outside: a line (FlexLoraError), a note (DamagedError) or a result, and nothing
written. 500 inputs in all as a rule, 10,000 with the marker `faults`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexlora import guard, ranks, wire
from flexlora.checkpoint import DamagedError, flatten, read_checkpoint, restore, write_checkpoint
from flexlora.config import Config, make_config, read_config
from flexlora.data.federation import open_federation
from flexlora.data.records import read_records
from flexlora.methods import get_method
from flexlora.prompts import load_template
from flexlora.rundir import read_metrics
from flexlora.saved import load_adapter, save_adapter
from flexlora.types import (
    ClientFailure,
    ClientRule,
    ClientUpdate,
    Download,
    FlexLoraError,
    LocalTraining,
    LowRank,
    TrainTask,
)
from noisy import noisy_update
from tiny import tiny_federation

SHAPES = {"m.q_proj": (6, 5), "m.down_proj": (4, 7)}
RANKS = {"m.q_proj": 3, "m.down_proj": 2}

# --- bad input ----------------------------------------------------------------------------------------------------------

words = st.sampled_from(
    [
        "",
        "true",
        "null",
        "nan",
        "-1",
        "0",
        "1e999",
        "../../etc",
        "\0",
        "\ud800",
        "é",
        "homo",
        "ffa",
        "a" * 300,
        "{}",
        "[]",
    ]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), words, st.text(max_size=8), st.dates()
)
junk: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
json_junk: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
edits = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "insert", "repeat", "drop", "replace"]), st.floats(0, 1), st.binary(max_size=6)),
    min_size=1,
    max_size=4,
)  # fmt: skip


def edited(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The content with bytes cut, flipped, inserted, repeated, dropped or replaced at relative places."""
    for kind, where, new in changes:
        at = int(where * len(content))
        head, tail = content[:at], content[at:]
        content = {
            "cut": head,
            "flip": head + bytes(b ^ 0x41 for b in tail[:1]) + tail[1:],
            "insert": head + new + tail,
            "repeat": head + tail[:40] * 3 + tail,
            "drop": head + tail[len(new) + 1 :],
            "replace": head + new + tail[len(new) :],
        }[kind]
    return content


def planted(value: Any, place: float, new: Any) -> Any:
    """A JSON value with one of its parts, at a relative place, replaced or left out."""
    if isinstance(value, dict) and value:
        keys = list(value)
        index = min(int(place * len(keys)), len(keys) - 1)
        rest = place * len(keys) - index
        inner = planted(value[keys[index]], rest, new)
        return {k: inner if k == keys[index] else v for k, v in value.items() if k != keys[index] or rest < 0.9}
    if isinstance(value, list) and value:
        index = min(int(place * len(value)), len(value) - 1)
        return [*value[:index], planted(value[index], place * len(value) - index, new), *value[index + 1 :]]
    return new


# --- what takes it ------------------------------------------------------------------------------------------------------


class Place:
    """A folder with one good example of everything, made once; `files` is what must not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny_federation(folder / "data", 1)
        self.records = (folder / "data" / "1" / "local_training_0.json").read_bytes()
        method = get_method("flexlora")
        self.state = method.init(SHAPES, 0, [RANKS])
        sent = {m: x for m, x in method.distribute(self.state, RANKS).adapter.items() if isinstance(x, LowRank)}
        self.checkpoint = write_checkpoint(folder, 1, self.state, {"note": [1, 2.5, "x"]})
        self.blobs = {name: (self.checkpoint / name).read_bytes() for name in ("state.json", "state.safetensors")}
        save_adapter(folder / "adapter", sent, base_model="tiny")
        self.adapter = {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
        self.task = TrainTask(3, 0, RANKS, Download(sent, {}, ClientRule()), LocalTraining(), 5, "base")
        update = noisy_update(0, sent, seed=0, weight=6.0)
        self.update = ClientUpdate(0, 6.0, update.adapter, metrics={"train_loss": 1.0}, round=3, base="base")
        self.parcel = wire.pack_update(self.update, ClientRule(), torch.float32)
        self.template = json.dumps(asdict(load_template("alpaca")), default=str).encode()
        self.metrics = b'{"round": 1, "clients": []}\n{"round": 2, "clients": []}\n'
        self.file = folder / "input"

    def names(self) -> list[str]:
        return sorted(str(p) for p in self.folder.rglob("*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    made = Place(tmp_path_factory.mktemp("fuzz"))
    made.file.write_bytes(b"")
    return made


def fuzz_config_values(place: Place, draw: Callable[..., Any]) -> None:
    keys = st.sampled_from([*Config.model_fields, "global_model", "R_1", "lambd"]) | st.text(max_size=6)
    config = make_config(draw(st.dictionaries(keys, junk, max_size=4)), "my.yaml")
    json.dumps(config.dump())
    yaml.safe_dump(config.dump())


def fuzz_config_file(place: Place, draw: Callable[..., Any]) -> None:
    good = yaml.safe_dump(Config(num_clients=4, ranks={"types": {"a": 2}, "shares": {"a": 1.0}}).dump()).encode()
    place.file.write_bytes(edited(good, draw(edits)))
    make_config(read_config(place.file), str(place.file))


def fuzz_rank_plan(place: Place, draw: Callable[..., Any]) -> None:
    good = {"types": {"small": 4, "large": {"*.q_proj": 8, "*": 16}}, "shares": {"small": 0.5, "large": 0.5}}
    plan = ranks.read_plan(planted(good, draw(st.floats(0, 1)), draw(junk)), lora_r=8, hidden_size=64)
    for kind in plan.types.values():
        resolved, _ = ranks.resolve(kind, SHAPES, None)
        assert all(1 <= r <= min(SHAPES[m]) for m, r in resolved.items())


def fuzz_records(place: Place, draw: Callable[..., Any]) -> None:
    if draw(st.booleans()):
        content = edited(place.records, draw(edits))
    else:
        content = json.dumps(planted(json.loads(place.records), draw(st.floats(0, 1)), draw(json_junk))).encode()
    place.file.write_bytes(content)
    assert read_records(place.file)


def fuzz_template(place: Place, draw: Callable[..., Any]) -> None:
    path = place.file.with_suffix(".json")
    path.write_bytes(edited(place.template, draw(edits)))
    try:
        load_template(str(path))
    finally:
        path.unlink()


def fuzz_checkpoint(place: Place, draw: Callable[..., Any]) -> None:
    name = draw(st.sampled_from(["state.json", "state.safetensors"]))
    path = place.checkpoint / name
    path.write_bytes(edited(place.blobs[name], draw(edits)))
    try:
        state, progress = read_checkpoint(place.checkpoint, place.state)
    finally:
        path.write_bytes(place.blobs[name])
    # what is accepted is what was written
    assert progress == {"note": [1, 2.5, "x"]}
    assert flatten(state)[0] == flatten(place.state)[0]


def fuzz_state(place: Place, draw: Callable[..., Any]) -> None:
    """A tree whose hash is right, by somebody who can compute one: no class is made that the method does not vouch for."""
    tree, tensors = flatten(place.state)
    restore(planted(tree, draw(st.floats(0, 1)), draw(json_junk)), tensors, place.state)


def fuzz_metrics(place: Place, draw: Callable[..., Any]) -> None:
    path = place.folder / "metrics.jsonl"
    path.write_bytes(edited(place.metrics, draw(edits)))
    try:
        assert all(isinstance(line["round"], int) for line in read_metrics(place.folder))
    finally:
        path.unlink()


def fuzz_adapter(place: Place, draw: Callable[..., Any]) -> None:
    name = draw(st.sampled_from(sorted(n for n in place.adapter if n != "README.md")))
    path = place.folder / "adapter" / name
    path.write_bytes(edited(place.adapter[name], draw(edits)))
    try:
        for module, x in load_adapter(place.folder / "adapter", SHAPES).items():
            assert (len(x.B), x.A.shape[1]) == SHAPES[module]
    finally:
        path.write_bytes(place.adapter[name])


def received(place: Place, parcel: wire.Parcel) -> None:
    update = wire.unpack_update(parcel, place.task)
    result = update if isinstance(update, ClientFailure) else guard.examine(update, place.task)
    if isinstance(result, ClientFailure):
        assert "\n" not in result.reason
        return
    assert 0 < result.weight < math.inf
    for module, x in result.adapter.items():
        assert isinstance(x, LowRank)
        assert len(x.A) <= RANKS[module]
        assert bool(torch.isfinite(x.A).all())
        assert bool(torch.isfinite(x.B).all())
    get_method("flexlora").aggregate(place.state, [result])


def fuzz_message(place: Place, draw: Callable[..., Any]) -> None:
    received(place, wire.Parcel(place.parcel.facts, edited(place.parcel.adapter, draw(edits))))


def fuzz_message_facts(place: Place, draw: Callable[..., Any]) -> None:
    if draw(st.booleans()):
        facts = edited(place.parcel.facts.encode(), draw(edits)).decode("utf-8", "replace")
    else:
        facts = json.dumps(planted(json.loads(place.parcel.facts), draw(st.floats(0, 1)), draw(json_junk)))
    received(place, wire.Parcel(facts, place.parcel.adapter))


def fuzz_message_tensors(place: Place, draw: Callable[..., Any]) -> None:
    """Well-formed messages with wrong names, shapes and types of tensors."""
    from safetensors.torch import save

    names = st.sampled_from([*(f"{m}.{p}" for m in SHAPES for p in ("A", "B", "values")), "x.A", "A", ".A", "m.q_proj"])
    sizes = st.lists(st.integers(0, 7), max_size=3)
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
    made = draw(st.dictionaries(names, st.tuples(sizes, dtypes), max_size=5))
    tensors = {name: torch.ones(size).to(dtype) for name, (size, dtype) in made.items()}
    received(place, wire.Parcel(place.parcel.facts, save(tensors)))


def fuzz_federation(place: Place, draw: Callable[..., Any]) -> None:
    inner = place.folder / "data" / "1"
    extra = inner / draw(
        st.sampled_from(["local_training_1.json", "local_eval_7.json", "local_test_0.json", "notes.txt"])
    )
    before = extra.read_bytes() if extra.is_file() else None
    extra.write_bytes(edited(place.records, draw(edits)))
    try:
        federation = open_federation(place.folder / "data", draw(st.none() | st.integers(-1, 3)))
        for client in federation.clients:
            assert federation.train(client)
            federation.test(client)
        federation.validation_sample(5, 0)
    finally:
        if before is None:
            extra.unlink()
        else:
            extra.write_bytes(before)


TARGETS = {
    f.__name__.removeprefix("fuzz_"): f
    for f in (
        fuzz_config_values,
        fuzz_config_file,
        fuzz_rank_plan,
        fuzz_records,
        fuzz_federation,
        fuzz_template,
        fuzz_checkpoint,
        fuzz_state,
        fuzz_metrics,
        fuzz_adapter,
        fuzz_message,
        fuzz_message_facts,
        fuzz_message_tensors,
    )
}


def attempts(place: Place, target: str, count: int) -> None:
    @settings(
        max_examples=count, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], database=None
    )
    @given(st.data())
    def attempt(data: Any) -> None:
        before = place.names()
        said = "a result"
        try:
            TARGETS[target](place, data.draw)
        except FlexLoraError as error:
            said = str(error)
        except DamagedError as error:
            said = " ".join(str(error).split())
        assert said.strip()
        assert "\n" not in said
        assert place.names() == before

    attempt()


@pytest.mark.parametrize("target", TARGETS)
def test_bad_input_is_told_in_a_line(place: Place, target: str) -> None:
    attempts(place, target, 40)


@pytest.mark.faults
@pytest.mark.parametrize("target", TARGETS)
def test_ten_thousand_bad_inputs(place: Place, target: str) -> None:
    attempts(place, target, 800)
