"""What a run shows while it goes on: a progress bar on a terminal, a line a round elsewhere, JSON lines, or nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexlora.collection import Notify

Mode = Literal["auto", "quiet", "json"]


def round_text(line: Mapping[str, Any]) -> str:
    """One round of metrics.jsonl on one line for people."""
    parts = [f"round {line['round']}"]
    if line["train_loss"] is not None:
        parts.append(f"train loss {line['train_loss']:.3f}")
    if line["validation"]:
        parts.append(f"validation loss {line['validation']['loss']:.3f}")
    if line["eval"]:
        parts.append(f"held-out ROUGE-L {line['eval']['rougeL']:.3f}")
    parts.append(
        ", ".join(f"{c['id']}@{c['ranks']}" for c in line["clients"][:8]) + (" …" if len(line["clients"]) > 8 else "")
    )
    if line["failed"]:
        parts.append(f"{len(line['failed'])} failed")
    parts.append(f"{sum(line['seconds'].values()):.0f} s")
    return "  ".join(parts)


class Display:
    """Turns a run's events into lines and a progress bar on a rich console."""

    def __init__(self, console: Console, progress: Progress | None) -> None:
        self.console, self.progress = console, progress
        self.bar = progress.add_task("starting", total=None) if progress else None
        self.tokens, self.seconds = 0.0, 0.0

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        getattr(self, f"on_{event}", lambda facts: None)(facts)

    def show(self, **change: Any) -> None:
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, **change)

    def on_note(self, facts: Mapping[str, Any]) -> None:
        self.console.print(facts["text"], style="dim", markup=False, highlight=False)

    def on_start(self, facts: Mapping[str, Any]) -> None:
        held = ", ".join(f"{count} at {label}" for label, count in facts["ranks"].items())
        self.console.print(
            f"{facts['clients']} clients ({held}), method {facts['method']}, {facts['modules']} modules of {facts['model']}",
            markup=False,
            highlight=False,
        )
        if facts["round"]:
            self.console.print(f"going on after round {facts['round']}")
        self.show(description="scoring the base model")

    def on_base(self, facts: Mapping[str, Any]) -> None:
        loss = facts.get("validation", {}).get("loss")
        if loss is not None:
            self.console.print(f"base model  validation loss {loss:.3f}", highlight=False)

    def on_round(self, facts: Mapping[str, Any]) -> None:
        self.rounds, self.number, self.asked = facts["rounds"], facts["round"], len(facts["clients"])
        self.answered = 0
        self.show(
            description=f"round {facts['round']}/{facts['rounds']}",
            total=facts["rounds"] * self.asked,
            completed=(facts["round"] - 1) * self.asked,
        )

    def on_client(self, facts: Mapping[str, Any]) -> None:
        record = facts["record"]
        self.answered += 1
        if "failed" in record:
            self.console.print(
                f"client {record['id']}: {record['failed']}", style="yellow", markup=False, highlight=False
            )
        self.tokens += record.get("tokens") or 0
        self.seconds += record.get("seconds") or 0
        rate = f"  {self.tokens / self.seconds:.0f} tokens/s" if self.seconds else ""
        self.show(
            description=f"round {self.number}/{self.rounds}  client {record['id']} at rank {record['ranks']}{rate}",
            completed=(self.number - 1) * self.asked + self.answered,
        )

    def on_saved(self, facts: Mapping[str, Any]) -> None:
        self.console.print(round_text(facts["line"]), markup=False, highlight=False)

    def on_stop(self, facts: Mapping[str, Any]) -> None:
        if facts["reason"] != "last round":
            self.console.print(f"stopped early: {facts['reason']}", markup=False)


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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield Display(console, progress)
    else:
        yield Display(console, None)
