"""Real federations on loopback: TLS and site authentication, a simulation, and what is killed on the way.

Each starts a dozen processes that load torch: `make test-federation` runs them.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from federation import BIN, Federation, living_in, own_folder, until
from flexlora import Config, run
from flexlora.rundir import read_metrics
from flexlora.runners.flower_folder import site_key
from tiny import tiny_federation, tiny_model

pytestmark = pytest.mark.federation

RANKS = (2, 3, 8)
KEYS: dict[str, Any] = {"rounds": 2, "lora_dropout": 0.1, "eval_every": 0, "early_stop": False}
LONG = 1200


def local(model: Path, data: Path, folder: Path, **keys: Any) -> Path:
    """The run folder of the same run in this process."""
    table = {"types": {f"r{r}": r for r in RANKS}, "clients": {i: f"r{r}" for i, r in enumerate(RANKS)}}
    values = {**KEYS, "method": "flexlora", "ranks": table, "participation": 1.0, **keys}
    return run(Config(model=str(model), data=data, output_dir=folder, name="local", **values)).folder


def state(folder: Path, round: int) -> bytes:
    return (folder / "checkpoints" / f"round-{round:04d}" / "state.safetensors").read_bytes()


def federation(tmp_path: Path, sites: int) -> tuple[Federation, Path, Path]:
    model, data = tiny_model(tmp_path / "model"), tiny_federation(tmp_path / "data", sites)
    return Federation(tmp_path / "fed", sites), model, data


def test_three_authenticated_sites_give_the_adapter_of_the_local_runner(tmp_path: Path) -> None:
    town, model, data = federation(tmp_path, 3)
    with town:
        town.superlink()
        for site in range(3):
            town.register(site)
        for site, rank in enumerate(RANKS):
            town.supernode(site, rank=rank, data=str(own_folder(data, 3, site, tmp_path / f"own-{site}")))
        site_key(tmp_path / "stranger")
        town.running["stranger"] = town.running["site-0"]  # its name is taken by the stranger for a moment
        town.supernode(0, tmp_path / "stranger", rank=2, data=str(tmp_path / "own-0"))
        stranger, town.running["site-0"] = town.running["site-0"], town.running.pop("stranger")
        until(lambda: stranger.poll() is not None, LONG, "the refusal of an unregistered key")
        assert stranger.returncode != 0
        town.run(model=str(model), **KEYS)
        until(lambda: town.played(2), LONG, "two rounds")
        done = town.folder / "runs" / "federation"
        until(lambda: (done / "checkpoints" / "round-0002" / "state.json").is_file(), 60, "the checkpoint")
    here = local(model, data, tmp_path / "here")
    assert state(done, 2) == state(here, 2)
    there = [[c["ranks"] for c in line["clients"]] for line in read_metrics(done)]
    assert there == [["2", "3", "8"]] * 2
    assert (done / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_killed_site_is_survived_and_a_killed_superlink_is_gone_on_from(tmp_path: Path) -> None:
    town, model, data = federation(tmp_path, 3)
    keys = {**KEYS, "rounds": 3, "min_clients": 2, "round_timeout": 300.0}
    done = town.folder / "runs" / "federation"
    with town:
        town.superlink()
        for site in range(3):
            town.register(site)
            town.supernode(site, rank=RANKS[site], data=str(own_folder(data, 3, site, tmp_path / f"own-{site}")))
        town.run(model=str(model), **keys)
        until(lambda: town.played(1), LONG, "the first round")
        until(lambda: "ROUND 2]" in town.log("site-1"), LONG, "site 1's message of round 2")
        town.kill("site-1")
        until(lambda: town.played(2), LONG, "a round without the killed site")
        # A line comes before its checkpoint: killed between the two, the round would be played again.
        until(lambda: (done / "checkpoints" / "round-0002").is_dir(), 60, "its checkpoint")
        town.kill("superlink")
        town.kill("run")
        before = (done / "metrics.jsonl").read_text().splitlines()[:2]
        town.superlink()
        town.supernode(1, rank=RANKS[1], data=str(tmp_path / "own-1"))
        town.run(model=str(model), **keys)
        until(lambda: town.played(3), LONG, "the round after the restart")
    lines = read_metrics(done)
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert (done / "metrics.jsonl").read_text().splitlines()[:2] == before
    # Two sites are enough to begin with; the third may still be on its way.
    assert len(lines[0]["clients"]) >= 2
    assert {c["id"] for c in lines[1]["clients"]} == {0, 2}
    assert [c["id"] for c in lines[1]["failed"]] == [1]
    assert {c["id"] for c in lines[2]["clients"]} >= {0, 2}


def test_a_simulation_of_four_sites_gives_the_adapter_of_the_local_runner(tmp_path: Path) -> None:
    town, model, data = federation(tmp_path, 4)
    home = tmp_path / "home"
    home.mkdir()
    keys = {**KEYS, "model": str(model), "data": str(data), "min_clients": 4, "lora_r": 3, "rounds": 2}
    text = " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else repr(v)}" for k, v in keys.items())
    words = ["run", "app", "--stream", "--run-config", text]
    words += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1"]
    try:
        with (tmp_path / "run.log").open("wb") as log:
            subprocess.run(
                [str(BIN / "flwr"), *words],
                cwd=town.folder,
                env={**town.env, "FLWR_HOME": str(home)},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=LONG,
                check=True,
            )
    finally:
        for pid in living_in(home):
            os.kill(pid, signal.SIGKILL)
    done = town.folder / "runs" / "federation"
    assert (done / "metrics.jsonl").is_file(), (tmp_path / "run.log").read_text()[-4000:]
    assert [[c["id"] for c in line["clients"]] for line in read_metrics(done)] == [[0, 1, 2, 3]] * 2
    here = local(model, data, tmp_path / "here", ranks="homo", lora_r=3)
    assert state(done, 2) == state(here, 2)
