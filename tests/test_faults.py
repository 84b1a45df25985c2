"""Real runs of a tiny model in processes of their own: killed at any moment, on a full disk, in a folder that cannot be
written, started twice, told to stop. What is left must be whole, and going on must give the bytes of a run left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from flexlora import FlexLoraError
from flexlora.rundir import read_metrics
from tiny import tiny_federation, tiny_model

# A server that has imported the package already forks the processes: each starts in milliseconds and can be killed.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "flexlora.launch",
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "rouge_score.rouge_scorer",
        "dp_accounting.rdp",
    ]
)

VARIANTS: dict[str, dict[str, Any]] = {
    "flexlora": {"ranks": "heavy_tail_strong"},
    "fedsa": {"method": "fedsa", "ranks": "homo"},  # clients keep B from round to round
    "private": {"method": "ffa", "ranks": "homo", "dp_noise": 0.5, "dp_clip": 0.1},
    "robust": {"method": "flexlora-carry", "robust": True, "wire_dtype": "bfloat16"},
}


def work(values: dict[str, Any], resume: bool, kill_at: int, limit: int, out: str) -> None:
    """In its own process: play or resume a run; kill_at: die before that change of a file; limit: bytes of a file at most."""
    from flexlora.config import make_config
    from flexlora.launch import resume as go_on
    from flexlora.launch import run

    folder = str(Path(values["output_dir"]) / values["name"])
    changes = [0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if not args or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        inside = isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(folder)
        relative = event in ("os.remove", "os.rmdir") and not str(args[0]).startswith("/")  # rmtree, by descriptor
        if writes and (inside or relative):
            changes[0] += 1
            if changes[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    said = ""
    try:
        if resume:
            go_on(Path(folder))
        else:
            run(make_config(values))
    except FlexLoraError as error:
        said = str(error)
    except KeyboardInterrupt as stop:
        said = f"stopped {stop}"
    finally:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        Path(out).write_text(json.dumps({"said": said, "changes": changes[0]}), encoding="utf-8")


class Lab:
    """A tiny model and federation, and runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = {
            "model": str(tiny_model(folder / "model")),
            "data": str(tiny_federation(folder / "data", 6)),
            "participation": 0.5,
            "rounds": 3,
            "early_stop": False,
            "eval_every": 2,
            "max_new_tokens": 3,
            "eval_examples": 2,
            "learning_rate": 0.02,
            "output_dir": str(folder),
        }
        self.references: dict[str, tuple[Path, float, int]] = {}

    def start(self, variant: str, name: str, *, resume: bool = False, kill_at: int = 0, limit: int = 0) -> BaseProcess:
        values = {**self.values, **VARIANTS[variant], "name": name}
        self.out = self.folder / f"{name}.said"
        self.out.unlink(missing_ok=True)
        process = PROCESSES.Process(target=work, args=(values, resume, kill_at, limit, str(self.out)))
        process.start()
        return process

    def said(self) -> dict[str, Any]:
        return json.loads(self.out.read_text())

    def reference(self, variant: str) -> tuple[Path, float, int]:
        """(folder, seconds, changes of files) of a run that was left alone."""
        if variant not in self.references:
            begin = time.perf_counter()
            process = self.start(variant, f"alone-{variant}")
            process.join()
            assert process.exitcode == 0
            assert self.said()["said"] == ""
            seconds = time.perf_counter() - begin
            self.references[variant] = (self.folder / f"alone-{variant}", seconds, self.said()["changes"])
        return self.references[variant]

    def prepare(self, variant: str, name: str) -> Path:
        """A new run's folder, with the reference's secret: private runs differ otherwise."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        secret = self.reference(variant)[0] / "secret"
        if secret.is_file():
            folder.mkdir()
            shutil.copy(secret, folder)
        return folder

    def finish(self, variant: str, name: str) -> None:
        """Go on with a run, and compare what comes out with the reference."""
        process = self.start(variant, name, resume=(self.folder / name / "config.yaml").is_file())
        process.join()
        assert self.said()["said"] == ""
        alone, done = self.reference(variant)[0], self.folder / name
        assert content(done, "adapter/*") == content(alone, "adapter/*")
        assert content(done, "checkpoints/*/state.safetensors") == content(alone, "checkpoints/*/state.safetensors")
        assert content(done, "kept/*/*") == content(alone, "kept/*/*")
        for ours, expected in zip(timeless(done), timeless(alone), strict=True):
            assert {k: v for k, v in ours.items() if expected.get(k) != v} == {}
            assert ours == expected
        assert names(done) == names(alone)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def content(folder: Path, pattern: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob(pattern)) if p.is_file()}


def names(folder: Path) -> list[str]:
    """Everything in a run folder but the lock: nothing half-written may be left."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock")


def timeless(folder: Path) -> list[dict[str, Any]]:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if k != "seconds"}
        return [without(v) for v in value] if isinstance(value, list) else value

    return [without(line) for line in read_metrics(folder)]


# --- killed ------------------------------------------------------------------------------------------------------------


def kill_at_a_moment(lab: Lab, variant: str, draw: random.Random) -> None:
    seconds = lab.reference(variant)[1]
    lab.prepare(variant, "killed")
    process = lab.start(variant, "killed")
    process.join(draw.uniform(0.1, 0.95) * seconds)
    process.kill()
    process.join()
    lab.finish(variant, "killed")


def kill_at_a_change(lab: Lab, variant: str, change: int) -> None:
    lab.prepare(variant, "cut")
    process = lab.start(variant, "cut", kill_at=change)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    lab.finish(variant, "cut")


def test_killed_at_two_moments(lab: Lab) -> None:
    for seed in (1, 2):
        kill_at_a_moment(lab, "flexlora", random.Random(seed))


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_before_a_change_of_a_file(lab: Lab, variant: str) -> None:
    changes = lab.reference(variant)[2]
    kill_at_a_change(lab, variant, random.Random(variant).randrange(changes // 2, changes))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_twenty_moments(lab: Lab, seed: int) -> None:
    kill_at_a_moment(lab, list(VARIANTS)[seed % len(VARIANTS)], random.Random(100 + seed))


@pytest.mark.faults
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_before_every_change_of_a_file(lab: Lab, variant: str) -> None:
    for change in range(1, lab.reference(variant)[2] + 1, 1 if variant == "fedsa" else 3):
        kill_at_a_change(lab, variant, change)


@pytest.mark.faults
def test_killed_again_and_again(lab: Lab) -> None:
    lab.prepare("fedsa", "again")
    lab.start("fedsa", "again", kill_at=30).join()
    for change in range(12, 60, 4):
        lab.start("fedsa", "again", resume=True, kill_at=change).join()
    lab.finish("fedsa", "again")
