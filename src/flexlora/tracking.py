"""A run in TensorBoard, Weights & Biases, MLflow or trackio, through accelerate's trackers: `--track`, off by default."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexlora.collection import Notify
from flexlora.rundir import Run
from flexlora.types import FlexLoraError

PROJECT = "flexlora"
"""Name of the project or experiment in which the runs stand."""

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def refuse_missing(names: Sequence[str]) -> None:
    """Raise FlexLoraError where a tracker is unknown or not installed: before a run begins."""
    for name in names:
        if name not in TRACKERS:
            raise FlexLoraError(f"track: {name!r} is no tracker; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise FlexLoraError(f"track: {name} is not installed; pip install {name}")


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one line of metrics.jsonl or of base.json, flat, under names that every tracker takes."""
    found: dict[str, Any] = {"train/loss": line.get("train_loss")}
    scores = ("rougeL", "loss", "exact_match")
    for part, keys in {"validation": ("loss",), "eval": scores, "eval_best": ("round", *scores)}.items():
        found |= {f"{part}/{key}": (line.get(part) or {}).get(key) for key in keys}
    for part in ("energy", "seconds"):
        found |= {f"{part}/{key}": value for key, value in (line.get(part) or {}).items()}
    if "clients" in line:
        found["clients/answered"], found["clients/failed"] = len(line["clients"]), len(line["failed"])
        for key in ("bytes_up", "bytes_down"):
            found[f"traffic/{key}"] = sum(client[key] for client in line["clients"])
    return {re.sub(r"[^A-Za-z0-9_./ -]", "_", k): float(v) for k, v in found.items() if v is not None}


@contextmanager
def tracked(names: Sequence[str], notify: Notify) -> Iterator[Notify]:
    """`notify`, and beside it a record of each run in every tracker named; steps are rounds, 0 the base model.

    A tracker that breaks while a run goes on is left out from there on, with a note: no run ends for it.
    Raises FlexLoraError as `refuse_missing` does.
    """
    refuse_missing(names)
    open_trackers: list[Any] = []

    def each(call: str, *values: Any, **more: Any) -> None:
        for tracker in tuple(open_trackers):
            try:
                getattr(tracker, call)(*values, **more)
            except Exception as error:
                open_trackers.remove(tracker)
                reason = " ".join(str(error).split())
                notify("note", {"text": f"{tracker.name} takes no more figures of this run: {reason}"})

    def finish() -> None:
        each("finish")
        open_trackers.clear()

    def observe(event: str, facts: Mapping[str, Any]) -> None:
        notify(event, facts)
        if event == "start":
            finish()
            run = Run(facts["folder"])
            open_trackers.extend(_tracker(name, run.folder) for name in names)
            each("start")
            # Trackers take plain values, and one of them shows no more than 500 characters.
            plain = {
                k: v if isinstance(v, bool | int | float | str) else json.dumps(v)[:500]
                for k, v in run.config.dump().items()
            }
            each("store_init_configuration", plain)
        elif event == "base":
            each("log", figures(facts), step=0)
        elif event == "saved":
            each("log", figures(facts["line"]), step=facts["line"]["round"])

    try:
        yield observe if names else notify
    finally:
        finish()


def _tracker(name: str, folder: Path) -> Any:
    from accelerate import PartialState, tracking

    PartialState(cpu=True)  # its trackers write log lines of their own, which need this
    title = folder.resolve().name
    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", folder)
    if name == "wandb":
        return tracking.WandBTracker(PROJECT, name=title, dir=str(folder))
    if name == "mlflow":
        return tracking.MLflowTracker(PROJECT, run_name=title)
    return tracking.TrackioTracker(PROJECT, name=title)
