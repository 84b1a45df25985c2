"""What a run shows while it goes on: a progress bar on a terminal, a line a round elsewhere, JSON lines, or nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from flexlora.collection import Notify
from flexlora.rundir import Run

Mode = Literal["auto", "quiet", "json"]


def round_text(line: Mapping[str, Any]) -> str:
    """One round of metrics.jsonl on one line for people."""
    parts = [f"round {line['round']:>2}"]
    if line["train_loss"] is not None:
        parts.append(f"train loss {line['train_loss']:.3f}")
    if line["validation"]:
        parts.append(f"validation {line['validation']['loss']:.3f}")
    if line["eval"]:
        parts.append(f"held-out ROUGE-L {line['eval']['rougeL']:.3f}")
    count = len(line["clients"])
    parts.append(f"{count} client{'s' * (count != 1)}")
    if line["failed"]:
        parts.append(f"{len(line['failed'])} failed")
    parts.append(f"{sum(line['seconds'].values()):.0f} s")
    return "  ".join(parts)


def score_text(scores: Mapping[str, Any]) -> str:
    """Validation loss and held-out ROUGE-L of base.json or of a line of metrics.jsonl; "" where it has neither."""
    parts = []
    if scores.get("validation"):
        parts.append(f"validation {scores['validation']['loss']:.3f}")
    if scores.get("eval"):
        parts.append(f"ROUGE-L {scores['eval']['rougeL']:.3f}")
    return "  ".join(parts)


class Display:
    """Turns a run's events into lines and, on a terminal, a progress bar with round, client, tokens/s, time left, score."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self.console, self.progress = console, progress
        self.bar = progress.add_task("starting", total=None, rate="", score="") if progress else None
        self.tokens, self.seconds = 0.0, 0.0
        self.cut: set[int] = set()
        """Clients of which it was said that prompts were cut."""

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        getattr(self, f"on_{event}", lambda facts: None)(facts)

    def show(self, **change: Any) -> None:
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, **change)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def on_note(self, facts: Mapping[str, Any]) -> None:
        self.say(facts["text"], "dim")

    def on_sweep(self, facts: Mapping[str, Any]) -> None:
        self.say(f"run {facts['number']} of {facts['runs']}: {facts['run']}", "bold")

    def on_start(self, facts: Mapping[str, Any]) -> None:
        held = ", ".join(f"{count} at {label}" for label, count in facts["ranks"].items())
        model = Path(facts["model"]).name or facts["model"]
        self.say(
            f"{facts['clients']} clients ({held}), method {facts['method']}, {facts['modules']} modules of {model}"
        )
        if facts["round"] >= facts["rounds"]:
            self.say(f"all {facts['rounds']} rounds are played: --rounds {facts['rounds'] + 1} or more would go on")
        elif facts["round"]:
            self.say(f"going on after round {facts['round']}")
        # Rounds that an earlier process played took none of this one's time: they are not in the bar's total.
        self.done = facts["round"]
        self.show(description="scoring the base model")

    def on_base(self, facts: Mapping[str, Any]) -> None:
        if text := score_text(facts):
            self.say(f"base model  {text}")
            self.show(score=text.split("  ")[-1])

    def on_round(self, facts: Mapping[str, Any]) -> None:
        self.rounds, self.number, self.asked = facts["rounds"], facts["round"], len(facts["clients"])
        self.answered = 0
        self.show(
            description=f"round {facts['round']}/{facts['rounds']}",
            total=(facts["rounds"] - self.done) * self.asked,
            completed=(facts["round"] - 1 - self.done) * self.asked,
        )

    def on_client(self, facts: Mapping[str, Any]) -> None:
        record = facts["record"]
        self.answered += 1
        if "failed" in record:
            self.say(f"client {record['id']}: {record['failed']}", "yellow")
        if record.get("cut_examples") and record["id"] not in self.cut:
            self.cut.add(record["id"])
            cut, examples = int(record["cut_examples"]), record["examples"]
            self.say(f"client {record['id']}: {cut} of {examples} prompts were cut to fit cutoff_len", "dim")
        self.tokens += record.get("tokens") or 0
        self.seconds += record.get("seconds") or 0
        self.show(
            description=f"round {self.number}/{self.rounds} client {record['id']}@{record['ranks']}",
            completed=(self.number - 1 - self.done) * self.asked + self.answered,
            rate=f"{self.tokens / self.seconds:.0f} tokens/s" if self.seconds else "",
        )

    def on_saved(self, facts: Mapping[str, Any]) -> None:
        self.say(round_text(facts["line"]))
        # The newest score: ROUGE-L in the rounds that have it, else the validation loss.
        self.show(score=score_text(facts["line"]).split("  ")[-1])

    def on_stop(self, facts: Mapping[str, Any]) -> None:
        if facts["reason"] != "last round":
            self.say(f"stopped early: {facts['reason']}")


def progress_bar(console: Console) -> Progress:
    """The bar of `Display`; it fits 80 columns."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]}", style="dim"),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
        TextColumn("left", style="dim"),
        TextColumn("{task.fields[score]}"),
    )
    # Rounds differ in length: the speed is that of the last half hour, not of the last seconds.
    return Progress(*columns, console=console, transient=True, expand=True, speed_estimate_period=1800)


@contextmanager
def display(mode: Mode, console: Console) -> Iterator[Notify]:
    """The observer of a run for a mode: `auto` bars and lines, `quiet` nothing, `json` one event a line on stdout."""
    if mode == "quiet":
        yield lambda event, facts: None
    elif mode == "json":

        def emit(event: str, facts: Mapping[str, Any]) -> None:
            plain = {k: str(v) if isinstance(v, Path) else v for k, v in facts.items()}
            print(json.dumps({"event": event, "time": round(time.time(), 3), **plain}), flush=True)

        yield emit
    elif console.is_terminal:
        with progress_bar(console) as progress:
            yield Display(console, progress)
    else:
        yield Display(console, None)


def follow(run: Run, console: Console, *, every: float = 1.0, timeout: float | None = None) -> str:
    """Show a run's rounds as another process plays them; returns why it ended.

    Looks at metrics.jsonl every so many seconds, and gives up where no round came for `timeout` seconds. Ctrl-C ends it.
    """
    seen, silent = 0, 0.0
    base = False
    with progress_bar(console) if console.is_terminal else nullcontext() as progress:
        shown = Display(console, progress)
        shown.show(description=f"waiting for round 1/{run.config.rounds}", total=run.config.rounds)
        while True:
            if not base and run.base:
                base = True
                shown.on_base(run.base)
            lines = run.metrics
            for line in lines[seen:]:
                shown.on_saved({"line": line})
            silent = 0.0 if len(lines) > seen else silent + every
            # A run that was taken up again from an older checkpoint forgets the rounds after it.
            seen = len(lines)
            number = lines[-1]["round"] if lines else 0
            if lines and lines[-1]["stopped"]:
                return lines[-1]["stopped"]
            if number >= run.config.rounds:
                return "last round"
            if timeout is not None and silent > timeout:
                return f"no round for {timeout:g} s"
            shown.show(description=f"round {number + 1}/{run.config.rounds}", completed=number)
            time.sleep(every)
