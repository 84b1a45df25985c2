"""Tables for people: their figures, and that they fit a terminal of 80 columns."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from flexlora import ranks
from flexlora.config import Config
from flexlora.data.federation import open_federation
from flexlora.evaluation import Scores
from flexlora.memory import Memory
from flexlora.rundir import Run
from flexlora.tables import (
    comparison_table,
    demo_clients_table,
    demo_scores_table,
    grouped,
    mean_deviation,
    memory_table,
    ranks_table,
    report_table,
    scores_table,
    spectrum_table,
)


def write_run(folder: Path, losses: Sequence[float], failed: int = 0, scored: bool = True, **keys: Any) -> Run:
    """A run folder with one line of metrics.jsonl a loss; round numbers from 98 on make wide rows."""
    folder.mkdir(parents=True)
    config = Config(**({"model": "m", "data": Path("d"), "output_dir": folder.parent, "name": folder.name} | keys))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    best = 98 + min(range(len(losses)), key=lambda i: losses[i])
    with (folder / "metrics.jsonl").open("w") as file:
        for i, loss in enumerate(losses):
            kinds = ["8"] * 40 + ["30"] * 20 + ["30+200"] * 11 + ["200"] * 10
            line = {
                "round": 98 + i,
                "train_loss": loss + 0.1,
                "validation": {"loss": loss},
                "eval": {"loss": loss + 0.2, "rougeL": 1 / loss} if scored else {},
                "clients": [{"id": n, "ranks": r, "bytes_up": 1e6, "bytes_down": 2e6} for n, r in enumerate(kinds)],
                "failed": [{"id": 99, "ranks": "8", "failed": "lost"}] * failed,
                "energy": {"8": 0.25},
                "seconds": {"train": 1000.0, "eval": 10.0},
                "best_round": best,
                "stopped": None,
            }
            file.write(json.dumps(line) + "\n")
    (folder / "base.json").write_text(json.dumps({"validation": {"loss": 9.0}, "eval": {"loss": 9.5, "rougeL": 0.01}}))
    return Run(folder)


def printed(table: Any) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=80).print(table)
    return file.getvalue().splitlines()


def test_rounds_fit_80_columns_and_nothing_is_cut(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r", [12.5, 11.25], failed=3)
    lines = printed(report_table([run.folder]))
    assert "…" not in "".join(lines)
    assert lines[2].split() == ["base", "–", "9.000", "9.500", "0.010"]
    best = next(text for text in lines if text.startswith("99 *"))
    for figure in ("11.350", "11.250", "11.450", "0.089", "40@8", "243", "1010"):
        assert figure in best
    for kind in ("20@30", "11@30+200", "10@200"):
        assert any(kind in text for text in lines)


def test_columns_in_which_nothing_happened_are_left_out(tmp_path: Path) -> None:
    full = "\n".join(printed(report_table([write_run(tmp_path / "a", [2.0], failed=1).folder])))
    bare = "\n".join(printed(report_table([write_run(tmp_path / "b", [2.0], scored=False).folder])))
    assert "failed" in full
    assert "ROUGE-L" in full
    assert "failed" not in bare
    assert "ROUGE-L" not in bare


def test_seeds_are_one_group_and_other_keys_split_it(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", [2.0], seed=1),
        write_run(tmp_path / "b", [3.0], seed=2),
        write_run(tmp_path / "c", [3.0], seed=2, learning_rate=0.5),
        write_run(tmp_path / "d", [3.0], seed=2, method="hetlora"),
    ]
    groups = grouped(runs)
    assert [[run.folder.name for run in members] for members in groups.values()] == [["a", "b"], ["c"], ["d"]]
    assert list(groups)[1] == "flexlora random fedit learning_rate=0.5"


def test_rank_maps_are_told_apart(tmp_path: Path) -> None:
    one, two = ({"types": {"a": r}, "shares": {"a": 1.0}} for r in (4, 8))
    runs = [write_run(tmp_path / str(i), [2.0], ranks=r) for i, r in enumerate((one, two, one))]
    assert [len(members) for members in grouped(runs).values()] == [2, 1]


def test_rank_files_of_one_name_are_told_apart_and_a_file_may_be_called_map(tmp_path: Path) -> None:
    one, two = ({"types": {"a": r}, "shares": {"a": 1.0}} for r in (4, 8))
    kinds = ("a/x.yaml", "b/x.yaml", "a/x.yaml", "c/map.yaml", one, two, "d/y.yaml", "heavy_tail:release")
    runs = [write_run(tmp_path / str(i), [2.0], seed=i, ranks=r) for i, r in enumerate(kinds)]
    found = {name: [int(run.folder.name) for run in members] for name, members in grouped(runs).items()}
    names = ("a/x.yaml", "b/x.yaml", "c/map.yaml", "map", "map 2", "y", "heavy_tail:release")
    members = ([0, 2], [1], [3], [4], [5], [6], [7])
    assert found == {f"flexlora {name} fedit": of for name, of in zip(names, members, strict=True)}
    assert list(grouped(runs[3:4])) == ["flexlora map fedit"]


def test_data_inside_the_run_folder_split_no_group(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / n, [2.0], data=tmp_path / n / "data", seed=i) for i, n in enumerate("ab")]
    assert len(grouped(runs)) == 1
    runs.append(write_run(tmp_path / "c", [2.0], data=tmp_path / "elsewhere"))
    assert len(grouped(runs)) == 2


def test_comparison_shows_mean_and_deviation_and_fits(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / n, [loss], seed=i).folder for i, (n, loss) in enumerate((("a", 2.0), ("b", 3.0)))]
    folders.append(write_run(tmp_path / "c", [4.0], method="flexlora-carry", method_options={"eta": 0.5}).folder)
    lines = printed(comparison_table(folders))
    assert "…" not in "".join(lines)
    row = next(i for i, text in enumerate(lines) if text.startswith("flexlora random fedit"))
    assert lines[row].split()[3:] == ["2", "2.5000", "2.7000", "0.4167", "0.2500", "243.0"]
    assert lines[row + 1].split() == ["±", "0.7071", "±", "0.7071", "±", "0.1179", "±", "0.0000"]
    assert any("eta=0.5" in text for text in lines)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),
        ([None, float("nan"), float("inf")], "–"),
        ([1.0, None, float("-inf")], "1.000"),
        ([1.0, 2.0], "1.500 ± 0.707"),
        ([1.0, float("inf"), 2.0, float("nan")], "1.500 ± 0.707"),
    ],
)
def test_mean_deviation(values: list[float | None], text: str) -> None:
    assert mean_deviation(values) == text


def test_spectrum_table_names_the_largest_rank_needed() -> None:
    found = {
        "layers.0.q_proj": torch.tensor([3.0, 1.0, 0.0]),  # energy 9, 1: rank 1 keeps .9
        "layers.1.q_proj": torch.tensor([1.0, 1.0, 1.0]),  # rank 3 keeps .9
        "layers.0.v_proj": torch.tensor([1.0, 0.0]),
    }
    table, largest = spectrum_table(found, 0.9)
    lines = printed(table)
    assert largest == 3
    assert next(text for text in lines if text.startswith("0 ")).split() == ["0", "1", "1"]
    assert next(text for text in lines if text.startswith("1 ")).split() == ["1", "3", "–"]
    assert next(text for text in lines if text.startswith("largest")).split() == ["largest", "3", "1"]


def test_clients_of_one_label_are_counted_together() -> None:
    table = [{"a": 4, "b": 8}, {"a": 8, "b": 4}, {"a": 2, "b": 2}, {"a": 2, "b": 2}]
    assert ranks.counts(table) == {"2": 2, "4+8": 1, "8+4": 1}


@pytest.mark.parametrize("name", ["maths [/easy]", "maths [bold]"])
def test_names_from_data_and_configuration_are_no_markup(name: str, tmp_path: Path) -> None:
    part = {"examples": 1, "rougeL": 0.5, "exact_match": 0.5, "loss": 1.0}
    scores = Scores(1, 0.5, 0.5, 0.5, 1.0, 0.5, {name: part}, [])
    plan = ranks.read_plan({"types": {name: {"[/q]": 4, "*": 8}}, "shares": {name: 1.0}}, lora_r=8, hidden_size=64)
    run = write_run(tmp_path / "r", [2.0], method_options={"eta": name})
    lines = run.metrics
    lines[0]["clients"] = [lines[0]["clients"][0] | {"examples": 3, "loss": 1.0}]
    (run.folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    for kind in ("training", "eval", "test"):
        record = {"instruction": "i", "input": "", "output": "o", "category": name}
        (tmp_path / f"local_{kind}_0.json").write_text(json.dumps([record]))
    tables = {
        "scores": scores_table(scores),
        "ranks": ranks_table(plan, 1, 0),
        "memory": memory_table(plan, {name: Memory(1, 1, 1, 1)}, None),
        "comparison": comparison_table([run.folder]),
        "demo": demo_scores_table({name: {"base": scores, "federated": scores}}),
        "clients": demo_clients_table(run, open_federation(tmp_path, 1)),
    }
    for what, table in tables.items():
        assert name in " ".join(printed(table)), what
    assert "[/q] 4" in " ".join(printed(tables["ranks"]))
