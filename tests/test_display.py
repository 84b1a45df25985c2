"""What a run shows while it goes on: text from events, the bar, JSON lines, and following from another process."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from flexlora.config import Config
from flexlora.display import display, follow, round_text
from flexlora.rundir import Run, append_metrics


def line(round: int, **more: Any) -> dict[str, Any]:
    client = {"id": 3, "ranks": "8", "tokens": 100, "seconds": 2.0}
    return {
        "round": round,
        "train_loss": 2.5,
        "validation": {"loss": 2.25},
        "eval": {},
        "clients": [client],
        "failed": [],
        "stopped": None,
        "seconds": {"train": 1.0, "eval": 0.6},
    } | more


def events(rounds: int) -> list[tuple[str, dict[str, Any]]]:
    start = {
        "ranks": {"8": 4},
        "clients": 4,
        "method": "flexlora",
        "modules": 7,
        "model": "some/model",
        "round": 0,
        "rounds": rounds,
    }
    told: list[tuple[str, dict[str, Any]]] = [("start", start), ("base", {"validation": {"loss": 3.0}})]
    for number in range(1, rounds + 1):
        told.append(("round", {"round": number, "rounds": rounds, "clients": [3, 4], "attempt": 0}))
        told.append(("client", {"record": line(number)["clients"][0]}))
        told.append(("client", {"record": {"id": 4, "ranks": "8", "failed": "lost [its] way"}}))
        told.append(("saved", {"line": line(number, eval={"rougeL": 0.5})}))
    return [*told, ("stop", {"reason": "last round", "folder": Path("r")})]


def shown(terminal: bool, rounds: int = 2) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, color_system=None, legacy_windows=False)
    with display("auto", console) as notify:
        for event, facts in events(rounds):
            notify(event, facts)
    return file.getvalue()


def test_a_round_on_one_line() -> None:
    assert round_text(line(7)) == "round  7  train loss 2.500  validation 2.250  1 client  2 s"
    text = round_text(line(12, eval={"rougeL": 0.25}, failed=[{}], train_loss=None))
    assert text == "round 12  validation 2.250  held-out ROUGE-L 0.250  1 client  1 failed  2 s"


def test_without_a_terminal_there_is_one_plain_line_a_round() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines[0] == "4 clients (4 at 8), method flexlora, 7 modules of model"
    assert lines[1] == "base model  validation 3.000"
    assert [text for text in lines if text.startswith("round")] == [
        "round  1  train loss 2.500  validation 2.250  held-out ROUGE-L 0.500  1 client  2 s",
        "round  2  train loss 2.500  validation 2.250  held-out ROUGE-L 0.500  1 client  2 s",
    ]
    assert "client 4: lost [its] way" in lines


def test_a_sweep_says_which_run_it_plays() -> None:
    file = io.StringIO()
    with display("auto", Console(file=file, width=80)) as notify:
        notify("sweep", {"run": "hetlora-1", "number": 2, "runs": 12})
    assert file.getvalue() == "run 2 of 12: hetlora-1\n"


def test_the_bar_shows_client_speed_and_score_in_80_columns() -> None:
    text = shown(terminal=True)
    bars = [part for part in text.replace("\r", "\n").splitlines() if "tokens/s" in part]
    assert bars
    assert "round 2/2 client" in bars[-1]
    assert "50 tokens/s" in bars[-1]
    assert "left" in bars[-1]
    assert "ROUGE-L 0.500" in bars[-1]


def test_quiet_prints_nothing_and_json_one_event_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("quiet", "json"):
        with display(mode, Console()) as notify:
            for event, facts in events(1):
                notify(event, facts)
        out = capsys.readouterr().out
        if mode == "quiet":
            assert out == ""
        else:
            read = [json.loads(text) for text in out.splitlines()]
            assert [r["event"] for r in read] == [event for event, _ in events(1)]
            assert read[-1]["folder"] == "r"


def watched(folder: Path, rounds: int = 3) -> Run:
    config = Config(model="m", data=folder, rounds=rounds)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    return Run(folder)


def test_follow_shows_rounds_as_they_come_and_ends_with_the_run(tmp_path: Path) -> None:
    run = watched(tmp_path)
    append_metrics(tmp_path, line(1))

    def play() -> None:
        for number in (2, 3):
            time.sleep(0.05)
            append_metrics(tmp_path, line(number))

    worker = threading.Thread(target=play)
    worker.start()
    file = io.StringIO()
    reason = follow(run, Console(file=file, width=80), every=0.01)
    worker.join()
    assert reason == "last round"
    assert [text[:8] for text in file.getvalue().splitlines()] == ["round  1", "round  2", "round  3"]


def test_follow_ends_with_an_early_stop_or_a_silence(tmp_path: Path) -> None:
    run = watched(tmp_path, rounds=9)
    append_metrics(tmp_path, line(1))
    console = Console(file=io.StringIO())
    assert follow(run, console, every=0.001, timeout=0.003) == "no round for 0.003 s"
    append_metrics(tmp_path, line(2, stopped="enough"))
    assert follow(run, console) == "enough"
