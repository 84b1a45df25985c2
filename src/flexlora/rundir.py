"""The run folder: config.yaml, env.json, metrics.jsonl, checkpoints/, adapter/; who may write in it, and `Run`, which reads it."""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from flexlora.checkpoint import write_durably
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

    def line(self, round: int) -> dict[str, Any]:
        """The line of a round, with the held-out scores that it got when the run ended where it had none in its turn."""
        lines = self.metrics
        line = next((line for line in lines if line["round"] == round), {"round": round})
        later = next((line["eval_best"] for line in reversed(lines) if line.get("eval_best")), {})
        if later.get("round") == round and not line.get("eval"):
            return {**line, "eval": {name: score for name, score in later.items() if name != "round"}}
        return line

    @property
    def base(self) -> dict[str, Any]:
        """Scores of the base model before any training: {"validation": …, "eval": …}; {} where they were not taken."""
        return read_object(self.folder / "base.json", "remove it, and `flexlora resume` scores the base model again")

    @property
    def environment(self) -> dict[str, Any]:
        """What env.json says; {} where there is none."""
        return read_object(self.folder / "env.json", "mend or remove it")

    @property
    def contents(self) -> dict[str, Any]:
        """Fingerprints of what the run was made of when it began (`flexlora.standing.contents`); {} where there are none."""
        return read_object(self.folder / "contents.json", "put it back, or start a new run")

    @property
    def best_round(self) -> int | None:
        """The round with the lowest validation loss (with differential privacy: the last one); None before the first."""
        metrics = self.metrics
        return metrics[-1]["best_round"] if metrics else None

    @property
    def adapter(self) -> Path:
        """Folder of the best round's adapter in PEFT format."""
        return self.folder / "adapter"

    @property
    def adapter_round(self) -> int | None:
        """The round whose model `adapter/` holds; None where there is none, or it does not say."""
        try:
            return json.loads((self.adapter / "flexlora.json").read_text(encoding="utf-8"))["round"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def kept(self) -> Path:
        """Folder of the parts that never leave a client (personal methods)."""
        return self.folder / "kept"


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises FlexLoraError where there is none."""
    if not (folder / "config.yaml").is_file():
        raise FlexLoraError(
            f"{folder}: is no run folder (it has no config.yaml); give the folder that `flexlora run` named"
        )
    return Run(folder)


def refuse_taken(folder: Path) -> None:
    """Raise FlexLoraError where a run stands in the folder already."""
    if (folder / "config.yaml").exists():
        raise FlexLoraError(
            f"{folder}: a run stands there already; choose another --name, or `flexlora resume {folder}`"
        )


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none. Raises FlexLoraError with the `remedy` where the file is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise FlexLoraError(f"{path}: cannot be read ({error}); {remedy}") from None
    return found


def create_run(
    config: Config, folder: Path, environment: Mapping[str, Any], contents: Mapping[str, Any] | None = None
) -> Run:
    """Make a new run in a folder: env.json, contents.json where there are any, and config.yaml last.

    Raises FlexLoraError where a run stands there already.
    """
    refuse_taken(folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_text(folder / "env.json", json.dumps(environment, indent=2) + "\n")
        if contents is not None:
            write_text(folder / "contents.json", json.dumps(contents) + "\n")
        write_text(folder / "config.yaml", _yaml(config))
    except OSError as error:
        reason = error.strerror or error
        raise FlexLoraError(f"{folder}: cannot be written: {reason}; choose another --output_dir") from None
    return Run(folder)


def with_rounds(run: Run, rounds: int) -> Run:
    """The run, whose config.yaml asks for this many rounds from now on. The caller holds the folder."""
    if run.config.rounds == rounds:
        return run
    config = run.config.model_copy(update={"rounds": rounds})
    write_text(run.folder / "config.yaml", _yaml(config))
    return Run(run.folder)


def _yaml(config: Config) -> str:
    return yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises FlexLoraError where another one does."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise FlexLoraError(f"{folder}: another process is working on this run; wait for it or stop it") from None
    except OSError as error:
        raise FlexLoraError(
            f"{folder}: cannot be written: {error.strerror or error}; make it writable, or choose another --output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Inside, a stop says where to go on: KeyboardInterrupt(folder)."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(str(folder)) from None


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """As `stoppable`; and a disk that refuses is a line, FlexLoraError. A reader that went away (`| head`) is no such disk."""
    try:
        with stoppable(folder):
            yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FlexLoraError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; make room or writable, then "
            f"go on with `flexlora resume {folder}`"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    write_durably(temporary, text.encode())
    temporary.replace(path)


def secret(folder: Path) -> int:
    """The run's own random number, unknown to the clients, made at its first use: noise and samples that must not be
    guessed are derived from it. Whoever reads the file can take the noise away again.

    Raises FlexLoraError where it is damaged, or gone after a round was played."""
    path = folder / "secret"
    if not path.is_file():
        if read_metrics(folder):
            raise FlexLoraError(f"{path}: is gone, and the noise of this run with it; put it back, or start a new run")
        temporary = path.with_name(".secret.part")
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    text = path.read_bytes()
    if not re.fullmatch(rb"[0-9a-f]{64}", text):
        raise FlexLoraError(f"{path}: is damaged, and the noise of this run with it; start a new run")
    return int(text, 16)


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
    """The lines of metrics.jsonl up to the first one that is no round's: a crash may have cut the last one short."""
    path = folder / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("round"), int):
            break
        lines.append(line)
    return lines


def cut_metrics(folder: Path, last_round: int, *, stopped: str | None) -> None:
    """Forget the lines of rounds after `last_round`: they will be run again. The last line says whether the run `stopped` there."""
    kept = [line for line in read_metrics(folder) if line["round"] <= last_round]
    kept[-1:] = [{**line, "stopped": stopped} for line in kept[-1:]]
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
