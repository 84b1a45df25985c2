"""Where commands write: whole or not at all, and one line where the disk refuses; whose code they run; what they say comes next."""

from __future__ import annotations

import errno
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import flexlora
from console import Command, Done, refused
from flexlora import client, modeling, saved, trained
from flexlora.config import Config
from flexlora.data import writing
from flexlora.data.demo import write_demo
from flexlora.data.tables import read_table
from flexlora.launch import run as play
from flexlora.rundir import Run, resumable
from flexlora.runners import flower_folder
from flexlora.sampling import participants
from flexlora.saved import load_adapter
from flexlora.trained import export, open_trained
from flexlora.types import ClientRule, Download, FlexLoraError, LocalTraining, LowRank, TrainTask
from tiny import tiny_federation, tiny_model

ROWS = "".join(f'{{"instruction": "Say {i}.", "output": "{i}"}}\n' for i in range(40))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("outputs")
    return {
        "model": str(tiny_model(folder / "M")), "data": tiny_federation(folder / "D", 3, train=4, eval=2, test=1),
        "participation": 1.0, "rounds": 1, "eval_every": 0, "cutoff_len": 128, "validation_examples": 4, "output_dir": folder,
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(settings: dict[str, Any]) -> Run:
    return play(Config(**settings, name="done"))


@pytest.fixture(scope="module")
def personal(settings: dict[str, Any]) -> Run:
    return play(Config(**settings, name="personal", method="fedsa", ranks="homo"))


@contextmanager
def small_disk(largest: int) -> Iterator[None]:
    """No file can be larger than this many bytes: the disk refuses in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(folder: Path) -> dict[str, bytes]:
    """Of every file, by its path; times and random keys are no part of it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def writers(done: Run, tmp_path: Path) -> dict[str, list[object]]:
    """The commands that write a folder; it is the last word."""
    table = tmp_path / "rows.jsonl"
    table.write_text(ROWS)
    return {
        "export": ["export", done.folder, "--out"],
        "merge": ["export", done.folder, "--merge", "--out"],
        "partition": ["data", "partition", table, "--clients", 2, "--out"],
        "init": ["flower", "init"],
    }


WRITERS = ("export", "merge", "partition", "init")


# --- the disk refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing_and_the_command_can_be_given_again(
    writers: dict[str, list[object]], name: str, command: Command, tmp_path: Path
) -> None:
    if name == "init":
        pytest.importorskip("flwr")
    out = tmp_path / "new" / "out"
    with small_disk(300):
        stopped = command(*writers[name], out)
    option = "flower init" if name == "init" else "--out"
    refused(stopped, f"{option} {out}: cannot be written (", "File too large", "make room or choose another folder")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    again = command(*writers[name], out)
    assert again.code == 0, again.error
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert len(content(out)) > 2


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_cannot_be_is_refused_before_any_work(
    writers: dict[str, list[object]], name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "init":
        pytest.importorskip("flwr")
    monkeypatch.setattr(trained, "_chosen", lambda *_: pytest.fail("worked"))
    monkeypatch.setattr(flower_folder, "certificates", lambda *_: pytest.fail("worked"))
    for out in (tmp_path / "rows.jsonl" / "x", tmp_path / ("x" * 300), tmp_path / "rows.jsonl"):
        refused(command(*writers[name], out), f"{out}: ", "choose another folder")
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_stop_leaves_nothing(
    writers: dict[str, list[object]], name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "init":
        pytest.importorskip("flwr")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for module, function in ((saved, "_save_about"), (flower_folder, "site_key"), (writing, "write_records")):
        monkeypatch.setattr(module, function, stop)
    assert command(*writers[name], tmp_path / "out").code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_empty_folder_is_filled_wherever_it_is_mounted_or_linked(
    done: Run, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(export(done, tmp_path / "expected"))
    assert set(expected) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "flexlora.json"}
    for out in ("here", "there"):
        (tmp_path / out).mkdir()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.chdir(tmp_path / "here")
    node = (tmp_path / "here").stat().st_ino
    for out in (".", "../link"):
        assert command("export", done.folder, "--out", out).code == 0
    assert (tmp_path / "here").stat().st_ino == node
    assert content(tmp_path / "here") == content(tmp_path / "there") == expected
    refused(command("export", done.folder, "--out", "."), "--out .: exists already")


def test_the_folder_of_a_federation_names_where_it_stands(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    assert command("flower", "init", tmp_path / "fed").code == 0
    for name in ("README.md", "home/config.toml", "app/pyproject.toml"):
        text = (tmp_path / "fed" / name).read_text()
        assert str(tmp_path / "fed") in text
        assert "/.fed-" not in text


def test_what_an_export_cannot_do_leaves_no_folder(done: Run, command: Command, tmp_path: Path) -> None:
    refused(command("export", done.folder, "--client", 9, "--out", tmp_path / "new" / "out"), "client 9")
    assert not list(tmp_path.iterdir())


def test_tasks_that_cannot_be_written_name_the_option_that_said_where(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(FlexLoraError, match=r"--output_dir .*runs/demo-1/data: cannot be made \(Not a directory\)"):
        write_demo(tmp_path / "runs" / "demo-1" / "data")


def test_a_table_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "rows.jsonl"
    table.write_text(ROWS)

    def closed(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(FlexLoraError, match=r"rows.jsonl: cannot be read \(Permission denied\): check the path"):
        read_table(table)


# --- a reader that goes away --------------------------------------------------------------------------------------------


def test_a_closed_pipe_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), resumable(tmp_path):
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(FlexLoraError, match="cannot be written: No space left"), resumable(tmp_path):
        raise OSError(28, "No space left on device")


def test_a_run_whose_reader_went_away_says_nothing_of_disks(settings: dict[str, Any], tmp_path: Path) -> None:
    keys = settings | {"output_dir": tmp_path, "name": "r", "rounds": 3}
    words = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
    with subprocess.Popen(
        [sys.executable, "-m", "flexlora", "run", *words, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        while '"event": "base"' not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "cannot be written" not in said


# --- whose code runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(done: Run, tmp_path: Path) -> Run:
    """A run folder whose configuration has a model's code run."""
    folder = Path(shutil.copytree(done.folder, tmp_path / "theirs"))
    keys = yaml.safe_load((folder / "config.yaml").read_text()) | {"trust_remote_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(keys))
    return Run(folder)


@pytest.mark.parametrize(
    "words", [("generate", "--prompt", "x"), ("evaluate", "--data", "D"), ("export", "--merge", "--out", "O")]
)
def test_a_folder_from_somebody_else_runs_no_code_unasked(
    theirs: Run,
    settings: dict[str, Any],
    words: tuple[str, ...],
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trusted: list[bool] = []
    load = modeling._tokenizer
    monkeypatch.setattr(modeling, "_tokenizer", lambda source, trust: trusted.append(trust) or load(source, False))
    places = {"D": settings["data"], "O": tmp_path / "out"}
    call = [words[0], theirs.folder, *(places.get(word, word) for word in words[1:])]
    if words[0] == "evaluate":
        call += ["--split", "test", "--examples", 1, "--max_new_tokens", 2]
    refused(command(*call), f"{theirs.folder / 'config.yaml'}: trust_remote_code", "say --trust_remote_code")
    assert trusted == []
    assert not (tmp_path / "out").exists()
    asked = command(*call, "--trust_remote_code")
    assert asked.code == 0, asked.error
    assert trusted == [True]


def test_what_loads_no_model_asks_nobody(theirs: Run, done: Run, command: Command, tmp_path: Path) -> None:
    assert command("inspect", theirs.folder).code == 0
    assert command("report", theirs.folder).code == 0
    out = export(theirs, tmp_path / "out")
    assert load_adapter(out).keys() == load_adapter(done.adapter).keys()


def test_code_is_off_for_adapters_and_models_and_can_be_asked_for(done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted: list[bool] = []
    load = modeling._tokenizer
    monkeypatch.setattr(modeling, "_tokenizer", lambda source, trust: trusted.append(trust) or load(source, False))
    for target in (done.folder, done.adapter, done.config.model):
        open_trained(str(target))
        open_trained(str(target), {"trust_remote_code": True})
    assert trusted == [False, True] * 3


# --- what is said next --------------------------------------------------------------------------------------------------


def next_of(done: Done) -> list[str]:
    found = re.search(r"next: flexlora (.*)", done.said)
    assert found, done
    return found[1].split()


def test_the_step_after_a_report_works(
    done: Run, personal: Run, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_of(command("report", done.folder)) == ["inspect", str(done.folder)]
    words = next_of(command("report", personal.folder))
    assert words[0] == "export"
    assert command(*words).code == 0
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(("clients", "share"), [(1, 1.0), (3, 1.0), (20, 0.2), (39, 0.1), (40, None)])
def test_the_step_after_a_look_at_data_trains_more_than_one_client(
    clients: int, share: float | None, command: Command, tmp_path: Path
) -> None:
    data = tiny_federation(tmp_path / "D", clients, train=1, eval=1, test=1)
    words = next_of(command("data", "inspect", data))
    assert words[:5] == ["run", "--data", str(data), "--num_clients", str(clients)]
    assert words[5:] == ([] if share is None else ["--participation", f"{share:g}"])
    drawn = participants(range(clients), share or Config().participation, seed=1, round=1)
    assert len(drawn) >= min(2, clients)


def test_an_evaluation_names_options_that_it_has(settings: dict[str, Any], command: Command, tmp_path: Path) -> None:
    words = ("evaluate", settings["model"], "--data", settings["data"], "--predictions", tmp_path / "p.jsonl")
    refused(command(*words, "--max_new_tokens", 512), "within cutoff_len 512: lower max_new_tokens")
    table = tmp_path / "rows.jsonl"
    table.write_text(ROWS)
    assert command("data", "partition", table, "--clients", 2, "--out", tmp_path / "P").code == 0
    refused(command("evaluate", settings["model"], "--data", tmp_path / "P"), "global_test.json", "--split test")


# --- figures that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["learning_rate", "lora_alpha", "dp_clip", "max_norm", "norm_factor", "prune_lambda", "round_timeout"]
)
@pytest.mark.parametrize("value", ["inf", "nan", ".inf"])
def test_infinity_is_no_value_of_a_key(command: Command, key: str, value: str) -> None:
    refused(command("run", "--data", "D", f"--{key}", value), f"flexlora: {key}: ")


def test_help_is_true_of_lengths_and_passes(command: Command) -> None:
    said = " ".join(command("run", "--help").said.replace("│", " ").split())
    assert "the result only through dropout" in said
    assert "where the answer alone is longer" in said


def test_what_a_client_keeps_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {"m": LowRank(torch.ones(4, 2), torch.ones(2, 3))}
    task = TrainTask(3, 1, {"m": 2}, Download(adapter, {}, ClientRule(keep=("B",))), LocalTraining(), 0)
    site: Any = SimpleNamespace(kept=tmp_path)
    client.keep(site, task, adapter)
    kept = tmp_path / "1" / "round-0003.safetensors"
    assert list(kept.parent.iterdir()) == [kept]

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(client, "write_durably", full)
    with pytest.raises(OSError, match="No space left"):
        client.keep(site, replace(task, round=4), adapter)
    assert list(kept.parent.iterdir()) == [kept]


def test_what_users_import_is_listed() -> None:
    assert {"Config", "run", "resume", "Run"} <= set(dir(flexlora))
