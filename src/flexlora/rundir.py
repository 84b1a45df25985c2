"""The run folder: config.yaml, env.json, metrics.jsonl, checkpoints/, adapter/; who may write in it, and `Run`, which reads it."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from flexlora.config import Config, make_config, read_config
from flexlora.types import FlexLoraError


@dataclass(frozen=True)
class Run:
    """A run on disk, finished or not."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        return make_config(read_config(self.folder / "config.yaml"), str(self.folder / "config.yaml"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary a round, ascending: see docs/run-folder.md."""
        return read_metrics(self.folder)

    @property
    def base(self) -> dict[str, Any]:
        """Scores of the base model before any training: {"validation": …, "eval": …}; {} where they were not taken."""
        path = self.folder / "base.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def best_round(self) -> int | None:
        """The round with the lowest validation loss; None before the first."""
        scored = [(m["validation"]["loss"], m["round"]) for m in self.metrics if m["validation"]]
        return min(scored)[1] if scored else None

    @property
    def adapter(self) -> Path:
        """Folder of the best round's adapter in PEFT format."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises FlexLoraError where there is none."""
    if not (folder / "config.yaml").is_file():
        raise FlexLoraError(
            f"{folder}: is no run folder (it has no config.yaml); give the folder that `flexlora run` named"
        )
    return Run(folder)


def create_run(config: Config, folder: Path, environment: Mapping[str, Any]) -> Run:
    """Make a new run folder with config.yaml and env.json. Raises FlexLoraError where a run stands there already."""
    if (folder / "config.yaml").exists():
        raise FlexLoraError(
            f"{folder}: a run stands there already; choose another --name, or `flexlora resume {folder}`"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
        write_text(folder / "env.json", json.dumps(environment, indent=2) + "\n")
        write_text(folder / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))
    except OSError as error:
        reason = error.strerror or error
        raise FlexLoraError(f"{folder}: cannot be written: {reason}; choose another --output_dir") from None
    return Run(folder)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises FlexLoraError where another one does."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FlexLoraError(f"{folder}: another process is working on this run; wait for it or stop it") from None
    except OSError as error:
        raise FlexLoraError(f"{folder}: cannot be written: {error.strerror or error}; make it writable") from None
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Add one round's line to metrics.jsonl and flush it to the disk."""
    try:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise FlexLoraError(
            f"{folder / 'metrics.jsonl'}: cannot be written: {error.strerror or error}; make room or writable, then "
            f"go on with `flexlora resume {folder}`"
        ) from None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut short by a crash is left out."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def cut_metrics(folder: Path, last_round: int) -> None:
    """Forget the lines of rounds after `last_round`: they will be run again."""
    kept = [line for line in read_metrics(folder) if line["round"] <= last_round]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def environment(**facts: Any) -> dict[str, Any]:
    """What env.json records: versions and the machine's kind, and the facts given."""
    versions = {}
    for package in ("flexlora", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        **facts,
    }


def remove_run(folder: Path) -> None:
    """Remove a run folder that was made and never used."""
    shutil.rmtree(folder, ignore_errors=True)
