"""Natural Instructions into a federation: from a small checkout in the real format, and back through inspect."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexlora.cli import main
from flexlora.data.federation import open_federation
from flexlora.data.inspection import inspect, inspection_table
from flexlora.data.natural_instructions import prepare
from flexlora.types import FlexLoraError


def task(path: Path, count: int, **changes: Any) -> None:
    """A task file with the fields of the repository."""
    instances = [
        {"id": f"{path.stem}-{i}", "input": f"{path.stem} question {i}", "output": [f"answer {i}", f"reply {i}"]}
        for i in range(count)
    ]
    content = {
        "Contributors": ["A"],
        "Source": ["s"],
        "URL": ["u"],
        "Categories": ["Question Answering"],
        "Reasoning": [],
        "Definition": ["Answer the question."],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instruction_language": ["English"],
        "Domains": ["Wikipedia"],
        "Positive Examples": [{"input": "x", "output": "y", "explanation": "z"}],
        "Negative Examples": [],
        "Instances": instances,
        "Instance License": ["Apache 2.0"],
    }
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "natural-instructions"
    tasks, lists = root / "tasks", root / "splits" / "default"
    tasks.mkdir(parents=True)
    lists.mkdir(parents=True)
    task(tasks / "task002_b.json", 200)
    task(tasks / "task010_c.json", 100, Definition="One string.", Categories=["Sentiment Analysis"])
    task(tasks / "task1000_d.json", 40)
    task(tasks / "task003_german.json", 50, Output_language=["German"])
    task(tasks / "task004_unlisted.json", 50)
    task(tasks / "task005_same_source.json", 50)
    task(tasks / "task006_french.json", 50, Input_language=["French"])
    task(tasks / "task039_held.json", 60, Categories=["Title Generation"])
    task(tasks / "task1586_held.json", 30, Categories=["Textual Entailment"])
    (lists / "train_tasks.txt").write_text("task1000_d\ntask002_b\ntask010_c\ntask003_german\n")
    (lists / "test_tasks.txt").write_text("task1586_held\ntask039_held\n")
    (lists / "excluded_tasks.txt").write_text("task005_same_source\ntask006_french\ntask999_not_here\n")
    return root


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.json"))}


def test_ten_percent_of_each_task_one_task_a_client_split_80_10_10(checkout: Path, tmp_path: Path):
    done = prepare(checkout, tmp_path / "out")
    assert (done.clients, done.examples, done.held_out, done.dropped) == (3, 16 + 8 + 2, 6 + 3, 0)
    federation = open_federation(tmp_path / "out", 3)
    sizes = [tuple(len(part(c)) for part in (federation.train, federation.eval, federation.test)) for c in range(3)]
    assert sizes == [(16, 2, 2), (8, 1, 1), (2, 1, 1)]
    first = federation.train(0)[0]
    number = first.input.rsplit(" ", 1)[1]
    assert (first.instruction, first.category) == ("Answer the question.", "Question Answering task002")
    assert first.references == (f"answer {number}", f"reply {number}")
    assert federation.train(1)[0].instruction == "One string."
    everything = [
        record.input
        for client in range(3)
        for part in (federation.train, federation.eval, federation.test)
        for record in part(client)
    ]
    assert len(set(everything)) == len(everything)
    assert [record.category for record in federation.global_test()] == (
        ["Title Generation task039"] * 6 + ["Textual Entailment task1586"] * 3
    )


def test_the_manifest_names_files_hashes_and_counts(checkout: Path, tmp_path: Path):
    prepare(checkout, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    row = manifest["clients"][0]
    source = checkout / row["file"]
    assert row["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert {key: row[key] for key in ("task", "instances", "training", "eval", "test")} == {
        "task": "task002_b",
        "instances": 200,
        "training": 16,
        "eval": 2,
        "test": 2,
    }
    assert [row["task"] for row in manifest["held out"]] == ["task039_held", "task1586_held"]


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(checkout: Path, tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(checkout, tmp_path / name, seed=seed)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a")["3/local_training_0.json"] != bytes_of(tmp_path / "c")["3/local_training_0.json"]
    assert {p.name for p in tmp_path.iterdir()} == {"natural-instructions", "a", "b", "c"}


def test_all_languages_takes_every_task_but_those_that_leak_what_is_held_out(checkout: Path, tmp_path: Path):
    """English tasks are excluded for the source that they share with a test task, others for their language alone."""
    done = prepare(checkout, tmp_path / "out", languages="all", fraction=1.0)
    assert done.clients == 6
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [row["task"] for row in manifest["clients"]] == [
        *("task002_b", "task003_german", "task004_unlisted", "task006_french", "task010_c", "task1000_d")
    ]
    assert manifest["excluded"] == 1
    # However many are asked for, none of them leaks.
    assert prepare(checkout, tmp_path / "some", languages="all", max_clients=9).clients == 6


def test_all_languages_needs_the_list_of_what_leaks_and_english_does_not(checkout: Path, tmp_path: Path):
    (checkout / "splits" / "default" / "excluded_tasks.txt").unlink()
    with pytest.raises(FlexLoraError, match=r"excluded_tasks\.txt: missing or not text: give a complete"):
        prepare(checkout, tmp_path / "all", languages="all")
    prepare(checkout, tmp_path / "english")
    assert json.loads((tmp_path / "english" / "manifest.json").read_text())["excluded"] == 0


def test_the_command_says_that_other_languages_may_leak(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for languages in ("english", "all"):
        options = ["--source", str(checkout), "--out", str(tmp_path / languages), "--languages", languages]
        main(["data", "prepare", *options])
        said = " ".join(capsys.readouterr().out.split())
        assert ("tasks in other languages may hold" in said) == (languages == "all")


def test_max_clients_draws_tasks_by_the_seed(checkout: Path, tmp_path: Path):
    drawn = set()
    for seed in range(6):
        out = tmp_path / str(seed)
        assert prepare(checkout, out, max_clients=2, seed=seed).clients == 2
        rows = json.loads((out / "manifest.json").read_text())["clients"]
        drawn.add(tuple(sorted(row["task"] for row in rows)))
        assert "task003_german" not in [row["task"] for row in rows]
    assert len(drawn) > 1


def test_copies_and_instances_without_an_answer_are_left_out_and_counted(checkout: Path, tmp_path: Path):
    instances = [{"id": str(i), "input": f"q{i}", "output": [f"a{i}"]} for i in range(20)]
    instances += [{"id": "x", "input": "q0", "output": ["a0"]}, {"id": "y", "input": "q", "output": [""]}]
    instances += [{"id": "z", "input": "two", "output": ["", "kept"]}, {"id": "n", "input": "none", "output": []}]
    task(checkout / "tasks" / "task002_b.json", 0, Instances=instances)
    done = prepare(checkout, tmp_path / "out", fraction=1.0)
    row = json.loads((tmp_path / "out" / "manifest.json").read_text())["clients"][0]
    assert (row["copies"], row["without answer"], row["instances"]) == (1, 2, 24)
    assert row["training"] + row["eval"] + row["test"] == 21
    assert done.dropped == 3
    task(checkout / "tasks" / "task002_b.json", 0, Instances=instances, Definition=["Else leave it blank."])
    prepare(checkout, tmp_path / "blank", fraction=1.0)
    row = json.loads((tmp_path / "blank" / "manifest.json").read_text())["clients"][0]
    assert row["without answer"] == 1  # an empty string may be right there, an empty list may not
    inspect(tmp_path / "blank")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: (r / "splits" / "default" / "test_tasks.txt").unlink(), r"test_tasks\.txt: missing"),
        (lambda r: (r / "tasks" / "task010_c.json").unlink(), r"task010_c\.json: missing though train_tasks\.txt"),
        (lambda r: (r / "tasks" / "task010_c.json").write_text("{"), r"task010_c\.json: broken JSON"),
        (lambda r: (r / "tasks" / "task010_c.json").write_text("[1]"), r"task010_c\.json: is not a JSON object"),
        (lambda r: task(r / "tasks" / "task010_c.json", 3, Definition=[]), "Definition is no text"),
        (lambda r: task(r / "tasks" / "task010_c.json", 3, Instances={}), "Instances is no list"),
        (lambda r: task(r / "tasks" / "task010_c.json", 0, Instances=[{"input": "q"}]), "instance 1 has no output"),
        (lambda r: task(r / "tasks" / "task010_c.json", 0, Instances=[{"output": ["a"]}]), "instance 1: input is null"),
        (lambda r: task(r / "tasks" / "task010_c.json", 0, Instances=[{"input": "q", "output": [3]}]), "is a number"),
        (
            lambda r: (r / "splits" / "default" / "test_tasks.txt").write_text("task002_b"),
            "task002_b is in both lists",
        ),
    ],
)
def test_a_bad_checkout_gets_one_line_and_leaves_nothing(checkout: Path, tmp_path: Path, change: Any, says: str):
    change(checkout)
    with pytest.raises(FlexLoraError, match=says) as error:
        prepare(checkout, tmp_path / "deep" / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("deep/*")) + list(tmp_path.glob("deep/.*"))


def test_bad_options_get_one_line(checkout: Path, tmp_path: Path):
    bad: list[tuple[dict[str, Any], str]] = [
        ({"fraction": 0}, "--fraction 0: must be above 0"),
        ({"fraction": 1.5}, "--fraction 1.5"),
        ({"languages": "german"}, "--languages german: choose english or all"),
        ({"max_clients": 0}, "--max_clients 0"),
    ]
    for options, says in bad:
        with pytest.raises(FlexLoraError, match=says):
            prepare(checkout, tmp_path / "out", **options)
    with pytest.raises(FlexLoraError, match=r"holds no tasks/task\*\.json"):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FlexLoraError, match=r"out: exists already"):
        prepare(checkout, tmp_path / "out")


def test_prepare_then_inspect(checkout: Path, tmp_path: Path):
    prepare(checkout, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert found.training == (16, 8, 2)
    assert (found.eval, found.test, found.global_test) == ((2, 1, 1), (2, 1, 1), 9)
    assert (found.duplicates.within_training, found.duplicates.test, found.duplicates.global_test) == (0, 0, 0)
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(inspection_table(found))
    assert "Sentiment Analysis task010" in console.export_text()
