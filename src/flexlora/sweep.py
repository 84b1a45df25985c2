"""Sweeps: many runs from one file. `flexlora.tables.report_table` compares what came out.

A sweep file holds configuration keys as any other, a `name`, and `vary`: axes with the values to cross. An item of an
axis is a value of the key that the axis is named after, or a map of keys with a `label`. With one seed, all methods get
the same ranks and the same clients in each round: both are derived from the seed alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora.checkpoint import checkpoint_rounds
from flexlora.config import Config, alias_table, make_config, new_names, read_config
from flexlora.data.demo import write_demo
from flexlora.launch import SCORED_BY, method_of, refuse_unequal, resume, run, silent
from flexlora.ranks import read_plan
from flexlora.rundir import Run, open_run
from flexlora.standing import FREE_TO_DIFFER
from flexlora.types import FlexLoraError


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for."""

    folder: Path
    """`{output_dir}/{name}`: every run has a folder in it."""
    runs: Mapping[str, Config]
    """Name of a run, e.g. flexlora-heavy_tail-1 -> its configuration, in the order of the file."""
    left_out: tuple[str, ...]
    """Combinations that cannot be, one line each with the reason."""


def read_sweep(path: Path, over: Mapping[str, Any] | None = None) -> Sweep:
    """The runs of a sweep file, all checked; `over` holds keys that win over the file's.

    Without `data` the clients get the built-in tasks of the demo, written into the sweep's folder.
    Raises FlexLoraError with a line that names the file and the key.
    """
    common = read_config(path)
    axes = common.pop("vary", None)
    if not isinstance(axes, dict) or not axes or not all(isinstance(v, list) and v for v in axes.values()):
        raise FlexLoraError(f"{path}: vary must be a map of keys to lists of values, e.g. method: [flexlora, raflora]")
    # Under new names first, so that what is narrower wins however it is spelled.
    given = new_names(common, str(path)) | new_names(over or {})
    name = str(given.pop("name", None) or path.stem)
    place = {k: v for k, v in given.items() if k == "output_dir"}
    folder = make_config({**place, "name": name}, str(path)).output_dir / name
    given.setdefault("data", folder / "data")
    runs: dict[str, Config] = {}
    left_out: list[str] = []
    for items in itertools.product(*([choice(path, axis, item) for item in axes[axis]] for axis in axes)):
        label = "-".join(part for part, _ in items)
        where = f"{path}, {label}"
        keys = {k: v for _, part in items for k, v in new_names(part, where).items()}
        config = make_config({**given, **keys, "name": label, "output_dir": folder}, where)
        # What is said of memory for all runs is for the item auto of an axis of ranks.
        if keys.get("ranks", "auto") != "auto" and "client_memory" not in keys:
            config = config.model_copy(update={"client_memory": {}})
        if label in runs:
            raise FlexLoraError(f"{path}: two runs are called {label}; give the items of vary different labels")
        # The sizes of types do not matter here, only whether they differ; auto may give any of those of random.
        ranks = "random" if config.ranks == "auto" else config.ranks
        try:
            method, plan = method_of(config), read_plan(ranks, lora_r=config.lora_r, hidden_size=0)
        except FlexLoraError as error:
            raise FlexLoraError(f"{where}: {error}") from None
        try:
            refuse_unequal(config, method, plan)
        except FlexLoraError as reason:
            left_out.append(f"{label}: {reason}")
            continue
        runs[label] = config
    if not runs:
        raise FlexLoraError(f"{path}: nothing is left to play: {left_out[0]}")
    return Sweep(folder, runs, tuple(left_out))


def choice(path: Path, axis: str, item: Any) -> tuple[str, dict[str, Any]]:
    """One item of an axis: its label and the keys that it sets."""
    if isinstance(item, dict) and "label" in item:
        keys = {k: v for k, v in item.items() if k != "label"}
        label = str(item["label"])
    elif isinstance(item, (dict, list)) or item is None or axis not in alias_table():
        raise FlexLoraError(f"{path}: vary, {axis}: {item!r} is no value of a key; give a map of keys with a label")
    else:
        label, keys = str(item), {axis: item}
    return label.replace("/", "-").replace(":", "-"), keys


def finished(found: Run) -> bool:
    """Whether all rounds were played, or an early stop ended them, and the last one was saved: its line comes before its
    checkpoint. A run whose checkpoints are all gone was finished before somebody made room.
    """
    lines = found.metrics
    ended = bool(lines) and (len(lines) >= found.config.rounds or bool(lines[-1]["stopped"]))
    there = checkpoint_rounds(found.checkpoints)
    # Cut off in its first round, a run has a line and an empty folder.
    return ended and (lines[-1]["round"] in there or (not there and len(lines) > 1))


def play_sweep(sweep: Sweep, notify: Callable[[str, Mapping[str, Any]], None] = silent) -> list[Run]:
    """Play what is not done yet, go on with what was interrupted; all runs, in the order of the file.

    The base model is scored once for all runs that score it alike.

    Raises FlexLoraError where a run of the folder was made with other keys.
    """
    tasks = sweep.folder / "data"
    if not tasks.exists() and any(config.data == tasks for config in sweep.runs.values()):
        write_demo(tasks)
    played: list[Run] = []
    bases: dict[str, Mapping[str, Any]] = {}
    for number, (label, config) in enumerate(sweep.runs.items(), 1):
        folder = sweep.folder / label
        notify("sweep", {"run": label, "number": number, "runs": len(sweep.runs)})
        key = repr([getattr(config, name) for name in SCORED_BY])
        if not (folder / "config.yaml").exists():
            found = run(config, notify, base=bases.get(key))
        else:
            found = open_run(folder)
            refuse_other_keys(found, config)
            if not finished(found):
                found = resume(folder, config=config, notify=notify)
        if found.base.get("eval"):
            bases[key] = found.base["eval"]
        played.append(found)
    return played


def refuse_other_keys(found: Run, config: Config) -> None:
    was, now = found.config.dump(), config.dump()
    other = [key for key in now if key not in FREE_TO_DIFFER and now[key] != was.get(key)]
    if other or now["rounds"] != was["rounds"]:
        key = [*other, "rounds"][0]
        raise FlexLoraError(
            f"{found.folder}: was run with {key} {was.get(key)!r}, the sweep says {now[key]!r}; "
            "give the sweep another name, or remove that folder"
        )
