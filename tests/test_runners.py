"""Whole runs: the state of every round is that of the default runner, whoever trains and whatever dies."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from federation import BIN, PATIENCE, descendants, free_port, until
from flexlora import Config, run
from flexlora.launch import silent
from flexlora.rundir import Run, read_metrics
from flexlora.runners.workers import worker_runner
from flexlora.types import FlexLoraError
from tiny import tiny_federation, tiny_model

Notify = Callable[[str, Any], None]
KEYS: dict[str, Any] = {
    "rounds": 2,
    "participation": 1.0,
    "ranks": {"types": {"small": 2, "large": 5}, "clients": {0: "small", 1: "large", 2: "small", 3: "large"}},
    "learning_rate": 0.01,
    "lora_dropout": 0.1,
    "eval_every": 0,
    "early_stop": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder / "model"), tiny_federation(folder / "data", 4)


@pytest.fixture(scope="module")
def expected(tiny: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return played(tiny, tmp_path_factory.mktemp("runs"))


def played(tiny: tuple[Path, Path], folder: Path, notify: Notify = silent, **keys: Any) -> Run:
    config = Config(model=str(tiny[0]), data=tiny[1], output_dir=folder, name="one", **{**KEYS, **keys})
    return run(config, notify)


def same(done: Run, expected: Run) -> None:
    """Every round's state, byte for byte, and every figure of a client but its seconds."""
    for round in (1, 2):
        one, other = (
            (x.checkpoints / f"round-{round:04d}" / "state.safetensors").read_bytes() for x in (done, expected)
        )
        assert one == other
    lines = [
        [timeless(client) for line in read_metrics(x.folder) for client in line["clients"]] for x in (done, expected)
    ]
    assert lines[0] == lines[1]


def timeless(client: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in client.items() if name != "seconds"}


def killer(command: str) -> tuple[Notify, list[int]]:
    """Kills one process of this name that was started from here, when the first client of round 1 is done; its id."""
    killed: list[int] = []

    def notify(event: str, facts: Any) -> None:
        if event == "client" and not killed:
            for pid in descendants(os.getpid()):
                if command.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return

    return notify, killed


def test_two_workers_give_the_states_of_one_process(tiny: tuple[Path, Path], tmp_path: Path, expected: Run) -> None:
    same(played(tiny, tmp_path, workers=2), expected)


def test_a_worker_that_is_killed_in_a_round_changes_nothing(
    tiny: tuple[Path, Path], tmp_path: Path, expected: Run
) -> None:
    notify, killed = killer("flexlora.runners.workers")
    same(played(tiny, tmp_path, notify, workers=2), expected)
    assert len(killed) == 1


def test_workers_share_the_threads(tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    class Started:
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(options["env"])
            self.listens = os.dup(options["pass_fds"][0])

        def terminate(self) -> None:
            os.close(self.listens)

        def wait(self, timeout: float | None = None) -> None: ...

    monkeypatch.setattr(subprocess, "Popen", Started)
    for threads, workers in ((8, 3), (2, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        config = Config(model=str(tiny[0]), data=tiny[1], workers=workers)
        worker_runner(config, tmp_path, range(4), config.local_training(1, "chat")).close()
    assert [env["OMP_NUM_THREADS"] for env in started] == ["2"] * 3 + ["1"] * 4


@pytest.mark.federation
def test_ray_gives_the_states_of_one_process_though_an_actor_is_killed_in_a_round(
    tiny: tuple[Path, Path], tmp_path: Path, expected: Run
) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install '.[ray]'")
    notify, killed = killer("ray::Desk")
    same(played(tiny, tmp_path, notify, runner="ray", workers=2), expected)
    assert len(killed) == 1


def test_room_is_counted_machine_by_machine_and_a_share_of_a_gpu_lies_on_one() -> None:
    pytest.importorskip("ray", reason="needs ray: pip install '.[ray]'")
    from flexlora.runners.ray import places

    two = {"CPU": 8.0, "GPU": 2.0}
    assert [places(two, 2, gpus) for gpus in (0.0, 0.5, 0.6, 1.0, 2.0, 3.0)] == [4, 4, 2, 2, 1, 0]
    assert places({"CPU": 3.0}, 2, 0.0) == 1
    assert places({"CPU": 3.0}, 1, 1.0) == 0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """Address of a Ray that says it has one GPU, in processes of its own."""
    pytest.importorskip("ray", reason="needs ray: pip install '.[ray]'")
    port = free_port()
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--num-gpus=1", "--disable-usage-stats"]
    words += ["--include-dashboard=false", "--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
    env = {**os.environ, **PATIENCE, "OMP_NUM_THREADS": "1"}
    own = tempfile.mkdtemp(prefix="r")  # short: sockets lie in it; and nobody else finds this cluster
    env["RAY_TMPDIR"] = own
    with (tmp_path / "ray.log").open("wb") as log:
        head = subprocess.Popen([str(BIN / "ray"), *words], env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: b"Ray runtime started" in (tmp_path / "ray.log").read_bytes(), 300, "a Ray cluster")
        yield f"127.0.0.1:{port}"
    finally:
        family = descendants(head.pid)
        head.terminate()
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            head.kill()
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        shutil.rmtree(own, ignore_errors=True)


@pytest.mark.federation
def test_a_ray_cluster_is_joined_by_its_address_and_two_actors_share_a_gpu(
    tiny: tuple[Path, Path], tmp_path: Path, expected: Run, cluster: str
) -> None:
    import ray

    free: list[float] = []

    def notify(event: str, facts: Any) -> None:
        if event == "client" and facts["round"] == 1 and not free:
            time.sleep(1)  # what is free is told with a delay
            free.append(ray.available_resources().get("GPU", 0.0))

    done = played(tiny, tmp_path, notify, runner="ray", workers=2, ray_address=cluster, worker_gpus=0.5)
    same(done, expected)
    assert free == [0.0]
    # Ray would wait for what it does not have without a word.
    for keys, words in (
        (
            {"workers": 2, "worker_gpus": 1.0},
            r"workers: Ray has room for 1 of 2 that need 1 CPUs and 1 GPUs each; lower --workers or",
        ),
        ({"workers": 3}, r"workers: Ray has room for 2 of 3 that need 1 CPUs each; lower --workers or"),
    ):
        with pytest.raises(FlexLoraError, match=words):
            played(tiny, tmp_path / "refused", notify, runner="ray", ray_address=cluster, **keys)
        assert not ray.is_initialized()
        assert not (tmp_path / "refused").exists()
