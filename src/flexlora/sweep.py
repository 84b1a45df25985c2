"""Comparisons: many runs from one file, and mean ± standard deviation over their seeds.

A sweep file holds configuration keys as any other, a `name`, and `vary`: axes with the values to cross. An item of an
axis is a value of the key that the axis is named after, or a map of keys with a `label`. With one seed, all methods get
the same ranks and the same clients in each round: both are derived from the seed alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flexlora.config import Config, alias_table, make_config, read_config
from flexlora.data.demo import write_demo
from flexlora.launch import method_of, refuse_unequal, resume, run, silent
from flexlora.ranks import read_plan
from flexlora.rundir import Run, open_run
from flexlora.standing import FREE_TO_DIFFER
from flexlora.types import FlexLoraError

NOT_COMPARED = ("name", "output_dir", "seed", "resume_from", "workers", "runner", "cache_dir")
"""Keys in which two runs may differ and still be of one kind."""


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
    given = {**read_config(path), **(over or {})}
    axes = given.pop("vary", None)
    if not isinstance(axes, dict) or not axes or not all(isinstance(v, list) and v for v in axes.values()):
        raise FlexLoraError(f"{path}: vary must be a map of keys to lists of values, e.g. method: [flexlora, raflora]")
    name = given.pop("name", None) or path.stem
    folder = make_config({k: v for k, v in given.items() if k == "output_dir"}, str(path)).output_dir / str(name)
    if not {"data", "data_path", "data-path"} & set(given):
        given["data"] = folder / "data"
    runs: dict[str, Config] = {}
    left_out: list[str] = []
    for items in itertools.product(*([choice(path, axis, item) for item in axes[axis]] for axis in axes)):
        label = "-".join(part for part, _ in items)
        keys = {k: v for _, part in items for k, v in part.items()}
        config = make_config({**given, **keys, "name": label, "output_dir": folder}, f"{path}, {label}")
        if label in runs:
            raise FlexLoraError(f"{path}: two runs are called {label}; give the items of vary different labels")
        method = method_of(config)
        try:
            refuse_unequal(config, method, read_plan(config.ranks, lora_r=config.lora_r, hidden_size=0))
        except FlexLoraError as reason:
            left_out.append(f"{label}: {reason}")
            continue
        runs[label] = config
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
    """Whether all rounds were played, or an early stop ended them."""
    lines = found.metrics
    return bool(lines) and (len(lines) >= found.config.rounds or bool(lines[-1]["stopped"]))


def play_sweep(sweep: Sweep, notify: Callable[[str, Mapping[str, Any]], None] = silent) -> list[Run]:
    """Play what is not done yet, go on with what was interrupted; all runs, in the order of the file.

    Raises FlexLoraError where a run of the folder was made with other keys.
    """
    tasks = sweep.folder / "data"
    if not tasks.exists() and any(config.data == tasks for config in sweep.runs.values()):
        write_demo(tasks)
    played: list[Run] = []
    for number, (label, config) in enumerate(sweep.runs.items(), 1):
        folder = sweep.folder / label
        notify("sweep", {"run": label, "number": number, "runs": len(sweep.runs)})
        if not (folder / "config.yaml").exists():
            played.append(run(config, notify))
            continue
        found = open_run(folder)
        refuse_other_keys(found, config)
        if not finished(found):
            found = resume(folder, config=config, notify=notify)
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


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but their seed."""

    label: str
    seeds: tuple[int, ...]
    figures: Mapping[str, tuple[float, float | None]]
    """Name -> mean and standard deviation (n − 1; None of a single run). A figure that some run lacks is left out."""


def figures(found: Run) -> dict[str, float]:
    """What one run comes to. loss: the lowest of the validation; rougeL: of the last generation; MB a round."""
    lines = found.metrics
    out: dict[str, float] = {}
    losses = [line["validation"]["loss"] for line in lines if line["validation"]]
    if losses:
        out["loss"] = min(losses)
    if found.base.get("validation", {}).get("loss") is not None:
        out["base loss"] = found.base["validation"]["loss"]
    scores = [line["eval"]["rougeL"] for line in lines if line["eval"]]
    if scores:
        out["rougeL"] = scores[-1]
    if lines:
        for way in ("up", "down"):
            travelled = sum(client[f"bytes_{way}"] for line in lines for client in line["clients"])
            out[f"MB {way}"] = travelled / len(lines) / 1e6
        out["s/round"] = sum(sum(line["seconds"].values()) for line in lines) / len(lines)
    return out


def compare(runs: Sequence[Run]) -> list[Row]:
    """One row for each kind of run, in the order in which they first come, labelled by the keys in which kinds differ."""
    kinds: dict[str, list[Run]] = {}
    keys: dict[str, dict[str, Any]] = {}
    for found in runs:
        config = {k: v for k, v in found.config.dump().items() if k not in NOT_COMPARED}
        config["method"] = found.config.method_name
        kinds.setdefault(repr(config), []).append(found)
        keys[repr(config)] = config
    differing = [k for k in next(iter(keys.values()), {}) if len({repr(c[k]) for c in keys.values()}) > 1] or ["method"]
    rows = []
    for kind, same in kinds.items():
        each = [figures(found) for found in same]
        shared = [name for name in each[0] if all(name in one for one in each)]
        rows.append(
            Row(
                ", ".join(
                    f"{keys[kind][k]}" if k in ("method", "ranks") else f"{k} {keys[kind][k]}" for k in differing
                ),
                tuple(found.config.seed for found in same),
                {name: spread([one[name] for one in each]) for name in shared},
            )
        )
    return rows


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    return mean(values), stdev(values) if len(values) > 1 else None


def shown(figure: tuple[float, float | None] | None) -> str:
    """Four digits, e.g. ``2.855 ± 0.011``."""
    if figure is None:
        return ""
    centre, deviation = figure
    digits = max(0, 3 - math.floor(math.log10(abs(centre)))) if centre else 3
    return f"{centre:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def comparison_table(rows: Sequence[Row]) -> str:
    """The rows as plain text, mean ± standard deviation over seeds."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    cells = [["", "seeds", *names]]
    cells += [[row.label, str(len(row.seeds)), *(shown(row.figures.get(name)) for name in names)] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    ]
    return "\n".join(lines) + "\n"
