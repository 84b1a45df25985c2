"""Pools: every task has one answer whatever dies, and workers give the bits that this process gives."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora import Config, client, wire
from flexlora.client import Site, open_site
from flexlora.methods import get_method
from flexlora.runners.choice import refuse_runner
from flexlora.runners.local import LocalRunner
from flexlora.runners.pool import LostError, PoolRunner
from flexlora.runners.workers import device, worker_runner
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
from flexlora.wire import Parcel
from tiny import tiny_federation, tiny_model

ONE = {"m.q_proj": LowRank(torch.ones(3, 1), torch.ones(1, 2))}


def plain_tasks(count: int) -> list[TrainTask]:
    download = Download(ONE, {}, ClientRule())
    return [TrainTask(1, number, {"m.q_proj": 1}, download, LocalTraining(), number) for number in range(count)]


class Dying:
    """A slot that answers with what it was sent; dies of the clients in `deadly`, as often as is said there."""

    def __init__(self, number: int, deadly: dict[int, int], log: list[tuple[str, int]]) -> None:
        self.number, self.deadly, self.log = number, deadly, log
        self.task: int | None = None
        log.append(("start", number))

    def send(self, parcel: Parcel) -> None:
        assert self.task is None, "a busy slot got a task"
        number: int = json.loads(parcel.facts)["client"]
        self.parcel, self.task = parcel, number
        self.log.append(("task", number))

    def receive(self) -> Parcel:
        task, self.task = self.task, None
        assert task is not None
        if self.deadly.get(task, 0):
            self.deadly[task] -= 1
            raise LostError("exit code -9")
        return Parcel(json.dumps({"kind": "update", "client": task, "weight": 1.0}), self.parcel.adapter)

    def close(self) -> None:
        self.log.append(("close", self.number))


def pool(slots: int, deadly: dict[int, int], log: list[tuple[str, int]]) -> PoolRunner:
    def last(busy: Sequence[Any]) -> Sequence[Any]:
        return busy[-1:]  # out of order on purpose

    return PoolRunner(
        lambda number: Dying(number, deadly, log),
        last,
        slots=slots,
        clients=range(9),
        config=Config(),
        settings=LocalTraining(),
    )


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_every_task_has_one_answer_and_no_slot_two_tasks(slots: int) -> None:
    log: list[tuple[str, int]] = []
    answers = list(pool(slots, {}, log).train(1, plain_tasks(7)))
    assert sorted(a.client for a in answers) == list(range(7))
    assert all(isinstance(a, ClientUpdate) for a in answers)
    assert [event for event, _ in log].count("start") == slots


def test_a_client_whose_slot_dies_once_is_done_again_and_twice_is_a_failure() -> None:
    log: list[tuple[str, int]] = []
    runner = pool(2, {3: 1, 4: 2}, log)
    answers = {a.client: a for a in runner.train(1, plain_tasks(6))}
    assert sorted(answers) == list(range(6))
    failed = {number for number, a in answers.items() if isinstance(a, ClientFailure)}
    assert failed == {4}
    assert "exit code -9" in getattr(answers[4], "reason", "")
    assert [event for event, _ in log].count("close") == 3
    assert log.count(("task", 3)) == 2
    assert log.count(("task", 4)) == 2
    # The pool is as large as before.
    assert len(list(runner.train(2, plain_tasks(4)))) == 4
    runner.close()
    starts, closes = ([event for event, _ in log].count(name) for name in ("start", "close"))
    assert starts == closes == 5


def test_a_round_that_is_left_in_the_middle_leaves_no_answer_to_the_next() -> None:
    log: list[tuple[str, int]] = []
    runner = pool(3, {}, log)
    stream = runner.train(1, plain_tasks(6))
    next(iter(stream))
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert sorted(a.client for a in runner.train(2, plain_tasks(5))) == list(range(5))


def test_a_pool_that_is_closed_in_the_middle_of_a_round_starts_nothing_more() -> None:
    log: list[tuple[str, int]] = []
    runner = pool(3, {}, log)
    stream = runner._stream(plain_tasks(6))
    next(stream)
    runner.close()
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    starts, closes = ([event for event, _ in log].count(name) for name in ("start", "close"))
    assert starts == closes == 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder / "model"), tiny_federation(folder / "data", 4)


def real_tasks(site: Site, config: Config) -> tuple[list[TrainTask], list[EvalTask]]:
    """fedsa, so that something is kept; clients 0 and 1 at rank 2, the others at 3."""
    method = get_method("fedsa")
    state = method.init(site.model.shapes, 42)
    training, evaluation = [], []
    for number in range(4):
        ranks = dict.fromkeys(site.model.shapes, 2 + number // 2)
        download = method.distribute(state, ranks)
        settings = config.local_training(1, "chat")
        training.append(TrainTask(1, number, ranks, download, settings, number, site.model.fingerprint))
        evaluation.append(EvalTask(1, number, download, 2))
    return training, evaluation


def compare(one: Any, other: Any) -> None:
    assert isinstance(one, ClientUpdate)
    assert isinstance(other, ClientUpdate)
    assert wire.encode(one.adapter) == wire.encode(other.adapter)
    assert (one.client, one.weight, one.scaling, one.round, one.base) == (
        other.client,
        other.weight,
        other.scaling,
        other.round,
        other.base,
    )
    timeless = [{k: v for k, v in x.metrics.items() if k != "seconds"} for x in (one, other)]
    assert timeless[0] == timeless[1]


def config_of(tiny: tuple[Path, Path], **keys: Any) -> Config:
    return Config(
        model=str(tiny[0]), data=tiny[1], lora_dropout=0.1, learning_rate=0.01, prompt_template="chat", **keys
    )


def check_against_this_process(runner: PoolRunner, config: Config, folder: Path) -> None:
    """Answers and kept parts, bit for bit."""
    site = open_site(config, folder / "here")
    here = LocalRunner(site, range(4), config.local_training(1, "chat"))
    training, evaluation = real_tasks(site, config)
    there = {x.client: x for x in runner.train(1, training)}
    assert sorted(there) == [0, 1, 2, 3]
    for expected in here.train(1, training):
        compare(there[expected.client], expected)
    scores = {x.client: x for x in runner.evaluate(1, evaluation)}
    for expected in here.evaluate(1, evaluation):
        assert isinstance(expected, ClientScore)
        assert scores[expected.client] == expected
    kept = {p.relative_to(folder / "here"): p.read_bytes() for p in (folder / "here").rglob("*.safetensors")}
    assert len(kept) == 4
    for name, content in kept.items():
        assert (folder / "there" / name).read_bytes() == content


def test_workers_give_the_bits_of_this_process_though_one_is_killed(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(tiny, workers=2)
    runner = worker_runner(config, tmp_path / "there", range(4), config.local_training(1, "chat"))
    try:
        slots: Any = runner._slots
        victim = slots[1].process.pid
        os.kill(victim, signal.SIGKILL)
        check_against_this_process(runner, config, tmp_path)
        pids = [slot.process.pid for slot in slots]
        assert victim not in pids
    finally:
        runner.close()
    assert all(slot.process.returncode is not None for slot in slots)


MAPPED = """
import re, sys
from pathlib import Path
from flexlora import Config
from flexlora.client import load

def anonymous():
    return int(re.search(r"Anonymous: +([0-9]+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024

load(Config(model=sys.argv[1]))  # what is loaded once whatever the model is
before = anonymous()
model = load(Config(model=sys.argv[2], precision="float32"))  # as the file has it
total = sum(float(p.sum()) for p in model.network.parameters())  # every page is touched
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_base_weights_are_mapped_from_their_file_so_that_workers_share_them(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 2048, "num_attention_heads": 8}
    model = tiny_model(tmp_path / "model", num_key_value_heads=8, **sizes)
    weights = (model / "model.safetensors").stat().st_size
    assert weights > 60e6
    done = subprocess.run(
        [sys.executable, "-c", MAPPED, str(tiny[0]), str(model)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 0.2 * weights


def test_a_worker_that_cannot_open_its_data_says_so(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of((tiny[0], tmp_path / "nowhere"), workers=1)
    runner = worker_runner(config, tmp_path, range(4), config.local_training(1, "chat"))
    try:
        with pytest.raises(FlexLoraError, match="nowhere"):
            list(runner.train(1, plain_tasks(1)))
    finally:
        runner.close()


def test_this_process_starts_no_federation() -> None:
    with pytest.raises(FlexLoraError, match="flexlora flower init"):
        refuse_runner(Config(runner="flower"))
    refuse_runner(Config(workers=3))


def test_another_base_model_is_refused_by_the_site(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(tiny)
    site = open_site(config, tmp_path)
    training, _ = real_tasks(site, config)
    answer = client.train(site, replace(training[0], base="another"))
    assert isinstance(answer, ClientFailure)
    assert "another base model" in answer.reason


def test_worker_slots_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device("cpu", 1) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device("auto", n) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device("cuda:1", 0) == "cuda:1"
