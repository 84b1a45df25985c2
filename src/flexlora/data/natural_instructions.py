"""The paper's federation from a checkout of Natural Instructions (allenai/natural-instructions; arXiv 2204.07705).

One task is one client; the tasks of the official zero-shot test split are held out into `global_test.json`. FlexLoRA
(arXiv 2402.11505) samples 10 % of each task and splits it 80/10/10.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flexlora.data.federation import permutation
from flexlora.data.records import Record, parse_record, read_json, silence_is_asked
from flexlora.data.writing import Prepared, new_folder, split, write_client, write_global_test, write_manifest
from flexlora.types import FlexLoraError


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    fraction: float = 0.1,
    languages: Literal["english", "all"] = "english",
    max_clients: int | None = None,
    seed: int = 42,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Write ``{out}/{clients}/local_*_{i}.json``, `global_test.json` and `manifest.json`.

    english: the tasks of ``splits/default/train_tasks.txt`` whose input, output and instruction are English. all:
    every task that is not held out, in any language, less the English ones of ``splits/default/excluded_tasks.txt``: they
    come from the same data as a task that is held out. Of each task's n instances (less exact copies and those without
    an answer) ``fraction`` is drawn, rounded, at least one; `max_clients` draws tasks.
    Draws depend on the seed and the task's name alone: the same command gives the same bytes.
    `progress` gets (tasks done, tasks in all). Raises FlexLoraError, and leaves nothing behind, where the checkout,
    an option or a task file is not in order.
    """
    source, out = Path(source), Path(out)
    if not 0 < fraction <= 1:
        raise FlexLoraError(f"--fraction {fraction}: must be above 0 and at most 1")
    if languages not in ("english", "all"):
        raise FlexLoraError(f"--languages {languages}: choose english or all")
    if max_clients is not None and max_clients < 1:
        raise FlexLoraError(f"--max_clients {max_clients}: must be at least 1")
    train_names, test_names, leaking = _split_names(source, languages)
    english = True if languages == "english" else None
    with new_folder(out) as root:
        building = root / "building"
        building.mkdir()
        # Whether a task is English shows when it is read: tasks are tried in seeded order until enough fit.
        order = [train_names[i] for i in permutation(len(train_names), seed, "clients")] if max_clients else train_names
        total = len(test_names) + min(len(order), max_clients or len(order))
        rows: list[dict[str, Any]] = []
        excluded = 0
        for name in order:
            if len(rows) == max_clients:
                break
            # Tasks of other languages are all on that list, whatever their source: they stay.
            task = _read_task(source, name, False if name in leaking else english)
            excluded += task is None and name in leaking
            if task is None or not task.records:
                continue
            parts = split(_sample(task.records, fraction, seed, name), seed, name)
            write_client(building, len(rows), parts)
            counts = dict(zip(("training", "eval", "test"), map(len, parts), strict=True))
            rows.append({"client": len(rows), **task.source, **counts})
            if progress:
                progress(len(rows), total)
        if not rows:
            raise FlexLoraError(f"{source}: no task with usable {languages} examples: check the checkout")
        held_out: list[Record] = []
        held_rows = []
        for name in test_names:
            task = _read_task(source, name, english)
            if task is None or not task.records:
                continue
            sample = _sample(task.records, fraction, seed, name)
            held_out += sample
            held_rows.append({**task.source, "examples": len(sample)})
            if progress:
                progress(len(rows) + len(held_rows), total)
        write_global_test(building, held_out)
        building.rename(root / str(len(rows)))
        write_manifest(
            root,
            {
                "made by": "flexlora data prepare",
                "fraction": fraction,
                "languages": languages,
                "max_clients": max_clients,
                "seed": seed,
                "excluded": excluded,
                "clients": rows,
                "held out": held_rows,
            },
        )
    everything = rows + held_rows
    return Prepared(
        folder=out,
        clients=len(rows),
        examples=sum(row["training"] for row in rows),
        held_out=len(held_out),
        dropped=sum(row["copies"] + row["without answer"] for row in everything),
    )


@dataclass(frozen=True)
class _Task:
    records: list[Record]
    source: dict[str, Any]
    """Rows of the manifest: task, file, sha256, instances, copies, without answer."""


def _split_names(source: Path, languages: str) -> tuple[list[str], list[str], set[str]]:
    """Tasks to train on, tasks to hold out, and what would leak the second into the first where it is English."""
    tasks = source / "tasks"
    there = {path.stem for path in tasks.glob("task*.json")}
    if not there:
        raise FlexLoraError(f"--source {source}: holds no tasks/task*.json: give a natural-instructions checkout")
    lists = {}
    for part in ("train", "test") if languages == "english" else ("train", "test", "excluded"):
        path = source / "splits" / "default" / f"{part}_tasks.txt"
        try:
            lists[part] = list(dict.fromkeys(path.read_text(encoding="utf-8").split()))
        except (OSError, UnicodeDecodeError):
            raise FlexLoraError(f"{path}: missing or not text: give a complete natural-instructions checkout") from None
        for name in lists[part]:
            if name not in there and part != "excluded":
                raise FlexLoraError(f"{tasks / name}.json: missing though {path.name} lists it: complete the checkout")
    both = set(lists["train"]) & set(lists["test"])
    if both:
        raise FlexLoraError(f"{source}/splits/default: {min(both)} is in both lists: mend train_tasks.txt")
    train = lists["train"] if languages == "english" else there - set(lists["test"])
    return sorted(train, key=_number), sorted(lists["test"], key=_number), set(lists.get("excluded", ()))


def _number(name: str) -> tuple[int, str]:
    digits = re.match(r"task(\d+)", name)
    return (int(digits[1]) if digits else 0, name)


def _read_task(source: Path, name: str, english: bool | None) -> _Task | None:
    """None: not all in English where that is wanted (True), or in English where that is not (False)."""
    path = source / "tasks" / f"{name}.json"
    data = read_json(path)
    if not isinstance(data, dict):
        raise FlexLoraError(f"{path}: is not a JSON object: restore it from the repository")
    if english is not None and english != _in_english(data):
        return None
    definition, instances = data.get("Definition"), data.get("Instances")
    if isinstance(definition, list) and all(isinstance(line, str) for line in definition):
        definition = "\n".join(definition)
    if not isinstance(definition, str) or not definition.strip():
        raise FlexLoraError(f"{path}: Definition is no text: restore the file from the repository")
    if not isinstance(instances, list):
        raise FlexLoraError(f"{path}: Instances is no list: restore the file from the repository")
    categories = data.get("Categories") or ["Misc."]
    category = categories if isinstance(categories, str) else str(categories[0])
    category = f"{category} {name.split('_')[0]}"
    records: dict[tuple[str, tuple[str, ...]], Record] = {}
    silent = 0
    for number, instance in enumerate(instances, start=1):
        if not isinstance(instance, dict):
            raise FlexLoraError(f"{path}: instance {number} is no object: restore the file from the repository")
        output = instance.get("output")
        if output is None:
            raise FlexLoraError(f"{path}: instance {number} has no output: restore the file from the repository")
        answers = output if isinstance(output, list) else [output]
        if not silence_is_asked(definition):
            answers = [a for a in answers if not isinstance(a, str) or a.strip()]
        if not answers:
            silent += 1
            continue
        item = {"instruction": definition, "input": instance.get("input"), "output": answers, "category": category}
        record = parse_record(f"{path}: instance {number}", item)
        records.setdefault((record.input, record.references), record)
    return _Task(
        records=list(records.values()),
        source={
            "task": name,
            "file": f"tasks/{name}.json",
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "instances": len(instances),
            "copies": len(instances) - silent - len(records),
            "without answer": silent,
        },
    )


def _in_english(data: Mapping[str, Any]) -> bool:
    spoken = (data.get(key, "English") for key in ("Input_language", "Output_language", "Instruction_language"))
    return all(language in ("English", ["English"]) for language in spoken)


def _sample(records: Sequence[Record], fraction: float, seed: int, name: str) -> list[Record]:
    count = max(1, int(fraction * len(records) + 0.5))
    return [records[place] for place in permutation(len(records), seed, "sample", name)[:count]]
