"""Real runs of a tiny model in processes of their own: killed at any moment, on a full disk, in a folder that cannot be
written, started twice, told to stop. What is left must be whole, and going on must give the bytes of a run left alone."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from flexlora import FlexLoraError
from flexlora.checkpoint import checkpoint_folder, checkpoint_rounds
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
    "robust": {"method": "flexlora", "robust": True, "wire_dtype": "bfloat16"},
}


def work(values: dict[str, Any], resume: bool, kill_at: int, how: signal.Signals, limit: int, out: str) -> None:
    """In its own process: play or resume a run.

    kill_at: get the signal `how` before that change of a file; limit: bytes of a file at most.
    """
    from flexlora.config import make_config
    from flexlora.launch import resume as go_on
    from flexlora.launch import run

    folder = str(Path(values["output_dir"]) / values["name"])
    changes = [0]

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if not args or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        writes = event != "open" or (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR))
        # Not what is written beside it: with noise of its own a run may end before the change that is waited for.
        inside = isinstance(args[0], (str, os.PathLike)) and f"{os.fspath(args[0])}/".startswith(f"{folder}/")
        relative = event in ("os.remove", "os.rmdir") and not str(args[0]).startswith("/")  # rmtree, by descriptor
        if writes and (inside or relative):
            changes[0] += 1
            if changes[0] == kill_at:
                os.kill(os.getpid(), how)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs start without
    sys.addaudithook(watch)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
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
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
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

    def start(
        self,
        variant: str,
        name: str,
        *,
        resume: bool = False,
        kill_at: int = 0,
        how: signal.Signals = signal.SIGKILL,
        limit: int = 0,
    ) -> BaseProcess:
        values = {**self.values, **VARIANTS[variant], "name": name}
        self.out = self.folder / f"{name}.said"
        self.out.unlink(missing_ok=True)
        process = PROCESSES.Process(target=work, args=(values, resume, kill_at, how, limit, str(self.out)))
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
    # A private run that is given its secret changes fewer files than the one that made it: it may be done before.
    assert process.exitcode == -signal.SIGKILL or (variant == "private" and process.exitcode == 0)
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


# --- a disk that refuses ------------------------------------------------------------------------------------------------


def whole_checkpoints(folder: Path) -> list[int]:
    """Rounds whose checkpoint matches its hash; none may be half there."""
    rounds = checkpoint_rounds(folder / "checkpoints")
    for round in rounds:
        record = json.loads((checkpoint_folder(folder / "checkpoints", round) / "state.json").read_text())
        blob = (checkpoint_folder(folder / "checkpoints", round) / "state.safetensors").read_bytes()
        assert hashlib.sha256(blob).hexdigest() == record["sha256"]
    return rounds


def test_files_that_cannot_grow_leave_the_last_checkpoint_whole(lab: Lab) -> None:
    folder = lab.prepare("flexlora", "limited")
    lab.start("flexlora", "limited", kill_at=lab.reference("flexlora")[2] * 2 // 3).join()
    before = whole_checkpoints(folder)
    assert before
    lab.start("flexlora", "limited", resume=True, limit=4096).join()
    said = lab.said()["said"]
    assert said.count("\n") == 0
    assert str(folder) in said
    assert "File too large" in said
    assert f"flexlora resume {folder}" in said
    assert whole_checkpoints(folder)[-1] == before[-1]
    lab.finish("flexlora", "limited")


def test_a_full_disk_gives_a_line_and_leaves_the_last_checkpoint_whole(lab: Lab) -> None:
    fill_the_disk(lab, 0.67)


@pytest.mark.faults
@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_a_disk_that_is_full_at_any_time(lab: Lab, share: float) -> None:
    fill_the_disk(lab, share)


def fill_the_disk(lab: Lab, share: float) -> None:
    """Play a run on a disk that holds a share of what it writes; then make room and go on."""
    small = lab.folder / "small"
    small.mkdir(exist_ok=True)
    shutil.rmtree(lab.folder / "full", ignore_errors=True)
    room = int(sum(len(x) for x in content(lab.reference("flexlora")[0], "**/*").values()) * share)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        lab.values["output_dir"] = str(small)
        lab.start("flexlora", "full").join()
        said = lab.said()["said"]
        assert "No space left on device" in said
        assert said.count("\n") == 0
        assert (f"flexlora resume {small / 'full'}" in said) == (small / "full" / "config.yaml").is_file()
        assert whole_checkpoints(small / "full") == checkpoint_rounds(small / "full" / "checkpoints")
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        lab.values["output_dir"] = str(lab.folder)
        shutil.copytree(small / "full", lab.folder / "full")
    finally:
        lab.values["output_dir"] = str(lab.folder)
        subprocess.run(["umount", str(small)], check=True)
    lab.finish("flexlora", "full")


def test_a_folder_that_cannot_be_written_is_a_line_and_nothing_else(lab: Lab) -> None:
    (lab.folder / "file").write_text("")
    lab.values["output_dir"] = str(lab.folder / "file")
    try:
        lab.start("flexlora", "x").join()
    finally:
        lab.values["output_dir"] = str(lab.folder)
    assert "cannot be written" in lab.said()["said"]
    assert "--output_dir" in lab.said()["said"]
    assert (lab.folder / "file").read_text() == ""


def test_a_read_only_run_folder_is_a_line(lab: Lab) -> None:
    folder = lab.prepare("flexlora", "frozen")
    lab.start("flexlora", "frozen", kill_at=lab.reference("flexlora")[2] * 2 // 3).join()
    before = content(folder, "**/*")
    bind = subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True, check=False)
    if bind.returncode:
        pytest.skip("a read-only mount is not permitted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        lab.start("flexlora", "frozen", resume=True).join()
        said = lab.said()["said"]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    assert "Read-only file system" in said
    assert said.count("\n") == 0
    assert content(folder, "**/*") == before
    lab.finish("flexlora", "frozen")


# --- two at once, and told to stop ---------------------------------------------------------------------------------------


def wait_for_a_round(folder: Path, process: BaseProcess) -> None:
    while not (folder / "metrics.jsonl").is_file():
        assert process.is_alive()
        time.sleep(0.01)


def test_a_second_process_is_refused(lab: Lab) -> None:
    folder = lab.prepare("flexlora", "twice")
    first = lab.start("flexlora", "twice")
    wait_for_a_round(folder, first)
    first_said = lab.out
    os.kill(first.pid or 0, signal.SIGSTOP)
    second = lab.start("flexlora", "twice", resume=True)
    second.join()
    assert "another process is working on this run" in lab.said()["said"]
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join()
    lab.out = first_said
    assert lab.said()["said"] == ""
    lab.finish("flexlora", "twice")  # nothing is left to play


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_told_to_stop_it_says_how_to_go_on(lab: Lab, name: str) -> None:
    """The real command, in a process of its own."""
    folder = lab.prepare("flexlora", name)
    values = {**lab.values, **VARIANTS["flexlora"], "name": name}
    words = [f"--{key}={str(value).lower() if value is False else value}" for key, value in values.items()]
    program = "import sys; from flexlora.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "run", "--quiet", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "metrics.jsonl").is_file() or not read_metrics(folder):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate()
    if process.returncode == 0:  # it was already done
        pytest.skip("the run ended before the signal")
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("flexlora: stopped; finished rounds are saved")
    assert f"flexlora resume {folder}" in errors
    assert "Traceback" not in errors
    lab.finish("flexlora", name)


def stop_at_a_change(lab: Lab, variant: str, change: int, how: signal.Signals) -> None:
    """Wherever it comes, also while a checkpoint is written, before there is one, or while it is cleaned up after one."""
    folder = lab.prepare(variant, "told")
    process = lab.start(variant, "told", kill_at=change, how=how)
    process.join()
    assert process.exitcode == 0
    begun = (folder / "config.yaml").is_file()
    assert lab.said()["said"] in ((f"stopped {folder}" if begun else "stopped "), "" if variant == "private" else None)
    lab.finish(variant, "told")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_told_to_stop_before_a_change_of_a_file(lab: Lab, how: signal.Signals) -> None:
    changes = lab.reference("flexlora")[2]
    for change in (2, random.Random(how).randrange(8, changes), changes):
        stop_at_a_change(lab, "flexlora", change, how)


@pytest.mark.faults
@pytest.mark.parametrize("variant", VARIANTS)
def test_told_to_stop_before_every_change_of_a_file(lab: Lab, variant: str) -> None:
    for change in range(1, lab.reference(variant)[2] + 1, 3):
        stop_at_a_change(lab, variant, change, signal.SIGINT if change % 2 else signal.SIGTERM)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(8))
def test_told_to_stop_at_eight_moments(lab: Lab, seed: int) -> None:
    """Also in training and in validation, where no file changes."""
    draw = random.Random(200 + seed)
    folder = lab.prepare("flexlora", "told")
    process = lab.start("flexlora", "told")
    process.join(draw.uniform(0.3, 0.95) * lab.reference("flexlora")[1])
    if process.is_alive():
        os.kill(process.pid or 0, draw.choice([signal.SIGINT, signal.SIGTERM]))
    process.join()
    assert process.exitcode == 0
    assert lab.said()["said"] in (f"stopped {folder}", "stopped ", "")
    lab.finish("flexlora", "told")


# --- damage and change --------------------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_passed_over_with_a_line(lab: Lab) -> None:
    folder = lab.folder / "damaged"
    shutil.copytree(lab.reference("fedsa")[0], folder)
    blob = folder / "checkpoints" / "round-0003" / "state.safetensors"
    blob.write_bytes(blob.read_bytes()[:-9])
    (folder / ".early").mkdir()
    (folder / ".early" / "0.safetensors").write_bytes(b"left by another process")
    lab.finish("fedsa", "damaged")


def test_a_run_without_a_whole_checkpoint_is_refused(lab: Lab) -> None:
    folder = lab.folder / "hopeless"
    shutil.copytree(lab.reference("flexlora")[0], folder)
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_bytes(path.read_bytes()[:-2])
    before = content(folder, "**/*")
    lab.start("flexlora", "hopeless", resume=True).join()
    assert "no checkpoint is whole; start a new run" in lab.said()["said"]
    assert content(folder, "**/*") == before


def test_an_adapter_between_two_renames_comes_back(lab: Lab) -> None:
    folder = lab.folder / "renamed"
    shutil.copytree(lab.reference("flexlora")[0], folder)
    (folder / "adapter").rename(folder / ".adapter.old")
    lab.finish("flexlora", "renamed")


def test_changed_data_is_refused_by_name(lab: Lab) -> None:
    path = Path(lab.values["data"]) / "6" / "local_training_0.json"
    lab.reference("flexlora")
    original = path.read_bytes()
    path.write_bytes(original.replace(b"Copy", b"Kopy").replace(b"backwards", b"backwardz"))
    try:
        lab.start("flexlora", "alone-flexlora", resume=True).join()
        assert "local_training_0.json" in lab.said()["said"]
        assert "changed since the run began" in lab.said()["said"]
    finally:
        path.write_bytes(original)
