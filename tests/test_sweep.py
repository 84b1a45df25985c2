"""Sweeps: the runs of a file, done ones skipped, interrupted ones gone on with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexlora.config import make_config
from flexlora.launch import run
from flexlora.scorer import ModelScorer
from flexlora.sweep import play_sweep, read_sweep
from flexlora.tables import grouped
from flexlora.types import FlexLoraError
from tiny import tiny_federation, tiny_model


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "runs"), "data": "d", **keys}))
    return path


def test_a_file_names_its_runs(tmp_path: Path) -> None:
    slora = {"label": "sparse", "method": "flexlora", "baseline": "slora", "sparse_rounds": 2}
    path = write(
        tmp_path, rounds=7, vary={"method": ["fedavg", "rbla", slora], "ranks": ["homo", "random"], "seed": [1, 2]}
    )
    sweep = read_sweep(path)
    assert sweep.folder == tmp_path / "runs" / "some"
    assert list(sweep.runs)[:3] == ["fedavg-homo-1", "fedavg-homo-2", "rbla-homo-1"]
    assert len(sweep.runs) == 10
    config = sweep.runs["sparse-random-2"]
    assert (config.method, config.baseline, config.sparse_rounds, config.seed) == ("flexlora", "slora", 2, 2)
    assert (config.ranks, config.rounds, config.output_dir) == ("random", 7, sweep.folder)
    assert [line.split(":")[0] for line in sweep.left_out] == ["fedavg-random-1", "fedavg-random-2"]
    assert read_sweep(path, {"rounds": 3}).runs["rbla-homo-1"].rounds == 3


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({}, "vary must be a map of keys to lists"),
        ({"vary": {"method": []}}, "vary must be a map of keys to lists"),
        ({"vary": {"methods": ["flexlora"]}}, "vary, methods: 'flexlora' is no value of a key"),
        ({"vary": {"method": [{"method": "rbla"}]}}, "give a map of keys with a label"),
        ({"vary": {"method": ["rbla", "rbla"]}}, "two runs are called rbla"),
        ({"vary": {"method": ["rblla"]}}, "did you mean rbla?"),
        ({"vary": {"seed": ["one"]}}, "seed"),
        (
            {"vary": {"ranks": ["random", "hevy_tail"]}},
            "some.yaml, hevy_tail: ranks: 'hevy_tail' is neither a file nor",
        ),
        (
            {"vary": {"method": ["fedavg"]}, "ranks": "random"},
            "some.yaml: nothing is left to play: fedavg: method fedavg",
        ),
        ({"vary": {"seed": [1]}, "rouns": 3}, "some.yaml: unknown key rouns: did you mean rounds?"),
        ({"vary": {"seed": [1]}, "session_name": "../x"}, "some.yaml: name: a name is one folder name"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    with pytest.raises(FlexLoraError) as error:
        read_sweep(write(tmp_path, **keys))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_old_names_mean_the_same_and_the_narrower_wins(tmp_path: Path) -> None:
    old = {"label": "old", "num_communication_rounds": 9, "data_path": "e"}
    path = write(tmp_path, session_name="known", rounds=7, vary={"run": [old, {"label": "new", "rounds": 8}]})
    sweep = read_sweep(path, {"client_selection_frac": 0.5})
    assert sweep.folder == tmp_path / "runs" / "known"
    assert [(c.rounds, str(c.data), c.participation) for c in sweep.runs.values()] == [(9, "e", 0.5), (8, "d", 0.5)]
    assert {str(c.data) for c in read_sweep(path, {"data_path": "o"}).runs.values()} == {"e", "o"}


def test_ranks_auto_can_be_swept(tmp_path: Path) -> None:
    axes = {"method": ["flexlora", "fedavg"], "ranks": ["auto", "homo"]}
    sweep = read_sweep(write(tmp_path, client_memory={"default": "8GB"}, vary=axes))
    assert list(sweep.runs) == ["flexlora-auto", "flexlora-homo", "fedavg-homo"]
    assert [line.split(":")[0] for line in sweep.left_out] == ["fedavg-auto"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny_sweep")
    return {
        "model": str(tiny_model(folder / "model")),
        "data": str(tiny_federation(folder / "data", 4)),
        "participation": 0.5,
        "rounds": 2,
        "eval_every": 2,
        "eval_examples": 2,
        "max_new_tokens": 2,
        "validation_examples": 2,
        "lora_target_modules": ["q_proj"],
    }


def test_a_sweep_skips_what_is_done(tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = write(tmp_path, **tiny, vary={"method": ["flexlora", "rbla"], "seed": [1, 2]})
    sweep = read_sweep(path)
    started: list[str] = []

    def note(event: str, facts: Any) -> None:
        if event == "start":
            started.append(Path(facts["folder"]).name)
        if event == "saved" and len(started) == 2 and facts["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play_sweep(sweep, note)
    assert started == ["flexlora-1", "flexlora-2"]
    done = (sweep.folder / "flexlora-1" / "metrics.jsonl").read_bytes()
    runs = play_sweep(
        sweep, lambda event, facts: started.append(Path(facts["folder"]).name) if event == "start" else None
    )
    assert started[2:] == ["flexlora-2", "rbla-1", "rbla-2"]
    assert (sweep.folder / "flexlora-1" / "metrics.jsonl").read_bytes() == done
    assert [len(r.metrics) for r in runs] == [2, 2, 2, 2]

    # the same clients for all methods of one seed
    sample = {r.folder.name: [[c["id"] for c in line["clients"]] for line in r.metrics] for r in runs}
    assert sample["flexlora-1"] == sample["rbla-1"]
    assert sample["flexlora-2"] == sample["rbla-2"]

    # the comparison of a report is over the seeds
    groups = grouped(runs)
    assert [len(group) for group in groups.values()] == [2, 2]

    with pytest.raises(FlexLoraError, match="flexlora-1: was run with rounds 2, the sweep says 5"):
        play_sweep(read_sweep(path, {"rounds": 5}))
    with pytest.raises(FlexLoraError, match="was run with epochs 1, the sweep says 2"):
        play_sweep(read_sweep(path, {"epochs": 2}))


def test_a_run_whose_last_checkpoint_was_not_written_is_gone_on_with(tmp_path: Path, tiny: dict[str, Any]) -> None:
    sweep = read_sweep(write(tmp_path, **tiny, vary={"seed": [1]}))
    (run,) = play_sweep(sweep)
    last = run.checkpoints / "round-0002"
    state = (last / "state.safetensors").read_bytes()
    shutil.rmtree(last)
    rounds: list[int] = []
    play_sweep(sweep, lambda event, facts: rounds.append(facts["round"]) if event == "saved" else None)
    assert rounds == [2]
    assert (last / "state.safetensors").read_bytes() == state
    for folder in run.checkpoints.iterdir():  # to make room, once all is done
        shutil.rmtree(folder)
    play_sweep(sweep, lambda event, facts: rounds.append(facts["round"]) if event == "saved" else None)
    assert rounds == [2]


def test_what_clients_state_of_their_memory_is_for_ranks_auto(tmp_path: Path) -> None:
    axes = {"ranks": ["auto", "homo"]}
    sweep = read_sweep(write(tmp_path, client_memory={"default": "8GB"}, vary=axes))
    assert [config.client_memory for config in sweep.runs.values()] == [{"default": "8GB"}, {}]


def test_the_base_model_is_scored_once_for_all_runs_that_score_it_alike(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**tiny, "rounds": 1, "eval_every": 1}
    axes = {"seed": [1, 2], "max_new_tokens": [2, 3]}
    bare: list[int] = []
    evaluate = ModelScorer.evaluate

    def noted(self: ModelScorer, adapter: Any, by_rank: Any) -> Any:
        if not adapter:
            bare.append(self.config.max_new_tokens)
        return evaluate(self, adapter, by_rank)

    monkeypatch.setattr(ModelScorer, "evaluate", noted)
    runs = play_sweep(read_sweep(write(tmp_path, **keys, vary=axes)))
    assert bare == [2, 3]
    alone = run(make_config({**keys, "seed": 2, "output_dir": tmp_path, "name": "alone"}, "test"))
    assert alone.base == {r.folder.name: r for r in runs}["2-2"].base
