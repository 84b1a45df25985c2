"""Writing a federation: a folder appears complete or not at all, and the same input gives the same bytes."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flexlora.data.federation import GLOBAL_TEST, KINDS, permutation
from flexlora.data.records import Record, to_json
from flexlora.types import FlexLoraError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` and `partition` wrote."""

    folder: Path
    """Holds ``{clients}/`` and the manifest: give it to --data."""
    clients: int
    examples: int
    """Training examples of all clients."""
    held_out: int
    """Examples of global_test.json."""
    dropped: int
    """Source examples left out for an empty answer, or as copies of another."""


@contextmanager
def new_folder(out: Path, option: str = "--out") -> Iterator[Path]:
    """A temporary folder that becomes `out` at the end, or fills it where it is empty; after an error nothing of it is left.

    Raises FlexLoraError, which names the option, where something stands in `out` or the disk refuses.
    """
    try:
        empty = out.is_dir() and not any(out.iterdir())
        if not empty and (out.exists() or out.is_symlink()):
            raise FlexLoraError(f"{option} {out}: exists already: choose another folder or remove it")
        # An empty folder may be a mounted disk or the current one, which cannot be replaced.
        place = out if empty else next(folder for folder in out.absolute().parents if folder.exists())
        temporary = place / f".{out.name}-{secrets.token_hex(8)}"
        temporary.mkdir()  # not by mkdtemp, whose folders nobody else may read
    except OSError as error:
        raise FlexLoraError(f"{option} {out}: cannot be made ({error.strerror}): choose another folder") from None
    try:
        yield temporary
        if empty:
            for part in temporary.iterdir():
                part.rename(out / part.name)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.rename(out)
    except BrokenPipeError:  # whoever read the output went away
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FlexLoraError(
            f"{option} {out}: cannot be written ({reason}): make room or choose another folder"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """A JSON list, one record a line."""
    lines = ",\n".join(json.dumps(to_json(record), ensure_ascii=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n" if records else "[]\n", encoding="utf-8", newline="\n")


def write_client(folder: Path, client: int, parts: Sequence[Sequence[Record]]) -> None:
    """The training, eval and test file of one client."""
    for kind, records in zip(KINDS, parts, strict=True):
        write_records(folder / f"local_{kind}_{client}.json", records)


def write_global_test(folder: Path, records: Sequence[Record]) -> None:
    """Nothing where there are no held-out examples: the file is optional."""
    if records:
        write_records(folder / GLOBAL_TEST, records)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    text = json.dumps(manifest, ensure_ascii=False, indent=1, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def split(records: Sequence[Record], seed: int, *purpose: str | int) -> tuple[list[Record], list[Record], list[Record]]:
    """80 % training, 10 % eval, 10 % test, in seeded order.

    Of n records, round(n / 10) each go to eval and test, at least one each where three or more are there; all others,
    and at least one, to training.
    """
    shuffled = [records[place] for place in permutation(len(records), seed, "split", *purpose)]
    held = max(1, (len(shuffled) + 5) // 10) if len(shuffled) >= 3 else 0
    return shuffled[2 * held :], shuffled[:held], shuffled[held : 2 * held]
