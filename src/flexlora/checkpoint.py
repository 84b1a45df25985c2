"""One serializer for the state of every method: safetensors for the tensors, JSON for the rest, nothing pickled.

A checkpoint is a folder `round-0003/{state.safetensors,state.json}` that is complete or absent: it is written under a
temporary name, flushed to disk and renamed. `state.json` carries the hash of the tensors and of itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from flexlora.types import FlexLoraError

FORMAT = 1


class DamagedError(Exception):
    """A checkpoint that is half-written, altered or not of this run; the message says which file and why."""


def _is_record(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))


def _fields(record: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(record):
        return {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    return record._asdict()


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def flatten(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """A JSON tree and the tensors that it names. Raises TypeError for what the contract of `Method` does not allow."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach().cpu().contiguous()
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:  # safetensors wants each on its own
                tensor = tensor.clone()
            seen.add(storage.data_ptr())
            tensors[path] = tensor
            return {"tensor": path}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if _is_record(type(value)):
            fields = {name: walk(part, f"{path}/{name}") for name, part in _fields(value).items()}
            return {"class": _class_name(type(value)), "fields": fields}
        if isinstance(value, Mapping):
            return {"map": [[key, walk(part, f"{path}/{key}")] for key, part in value.items()]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [walk(part, f"{path}/{i}") for i, part in enumerate(value)]}
        raise TypeError(f"{path}: a state cannot hold {type(value).__name__}")

    return walk(value, ""), tensors


def _known_classes(prototype: Any) -> dict[str, type]:
    """Classes that a checkpoint may name: those that the prototype reaches, and those that stand beside them."""
    known: dict[str, type] = {}

    def walk(value: Any) -> None:
        kind = type(value)
        if _is_record(kind):
            if _class_name(kind) not in known:
                for near in vars(sys.modules[kind.__module__]).values():
                    if isinstance(near, type) and _is_record(near):
                        known[_class_name(near)] = near
                known[_class_name(kind)] = kind
            for part in _fields(value).values():
                walk(part)
        elif isinstance(value, Mapping):
            for part in value.values():
                walk(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                walk(part)

    walk(prototype)
    return known


def restore(tree: Any, tensors: Mapping[str, Tensor], prototype: Any) -> Any:
    """The inverse of `flatten`; only classes that `prototype` vouches for are made. Raises DamagedError otherwise."""
    known = _known_classes(prototype)

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "tensor" in node:
            return tensors[node["tensor"]]
        if "map" in node:
            return {key: walk(part) for key, part in node["map"]}
        if "list" in node:
            return [walk(part) for part in node["list"]]
        if "tuple" in node:
            return tuple(walk(part) for part in node["tuple"])
        return known[node["class"]](**{name: walk(part) for name, part in node["fields"].items()})

    try:
        return walk(tree)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"its state does not fit the method: {error}") from None


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk. Raises OSError as the system gives it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (a rename inside it) to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_files(folder: Path) -> None:
    """Flush every file of a folder, and the folder, to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one. After a crash either one or the other stands there, or
    neither does and the older one waits beside it: see `recover_folder`."""
    old = _old(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Undo a `replace_folder` that was cut off between its two renames, and remove what any other one left."""
    old = _old(final)
    if old.is_dir() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def checkpoint_folder(checkpoints: Path, round: int) -> Path:
    return checkpoints / f"round-{round:04d}"


def checkpoint_rounds(checkpoints: Path) -> list[int]:
    """Rounds that have a checkpoint folder, ascending; whether one is whole shows when it is read."""
    # Not by glob, which passes over a folder that it may not read.
    there = checkpoints.iterdir() if checkpoints.is_dir() else ()
    rounds = [p.name.removeprefix("round-") for p in there if p.name.startswith("round-") and p.is_dir()]
    return sorted(int(r) for r in rounds if r.isdecimal())


def write_checkpoint(checkpoints: Path, round: int, state: Any, progress: Mapping[str, Any]) -> Path:
    """Write `round-NNNN` whole or not at all. Raises FlexLoraError where the disk refuses; earlier ones stay untouched."""
    final = checkpoint_folder(checkpoints, round)
    temporary = checkpoints / f".round-{round:04d}.part"
    tree, tensors = flatten(state)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # from where the tensors are: as bytes they would be there twice more
        save_file(tensors, temporary / "state.safetensors")
        with (temporary / "state.safetensors").open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record = {"format": FORMAT, "round": round, "sha256": digest, "progress": progress, "state": tree}
        text = json.dumps({**record, "digest": _digest(record)})
        write_durably(temporary / "state.json", text.encode())
        sync_folder(temporary)
        replace_folder(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise FlexLoraError(
            f"{final}: cannot be written: {reason}; make room or writable, then go on with "
            f"`flexlora resume {checkpoints.parent}`"
        ) from None
    return final


def read_checkpoint(folder: Path, prototype: Any) -> tuple[Any, dict[str, Any]]:
    """(state, progress) of a checkpoint folder. Raises DamagedError where a file is missing, cut short or altered."""
    try:
        record = json.loads((folder / "state.json").read_text())
        blob = (folder / "state.safetensors").read_bytes()
        digest = record.pop("digest")
        if record["format"] != FORMAT:
            raise DamagedError(f"{folder}: has format {record['format']}, this version reads {FORMAT}")
        if digest != _digest(record):
            raise DamagedError(f"{folder / 'state.json'}: does not match its hash")
        if hashlib.sha256(blob).hexdigest() != record["sha256"]:
            raise DamagedError(f"{folder / 'state.safetensors'}: does not match its hash")
        tensors, tree, progress = load_tensors(blob), record["state"], record["progress"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"{folder}: cannot be read: {error}") from None
    return restore(tree, tensors, prototype), progress


def remove_checkpoints(checkpoints: Path, keep: set[int]) -> None:
    """Remove every checkpoint but those of the rounds in `keep`, and what an interrupted write left."""
    for round in checkpoint_rounds(checkpoints):
        if round not in keep:
            shutil.rmtree(checkpoint_folder(checkpoints, round))
    for left in checkpoints.glob(".round-*"):
        shutil.rmtree(left, ignore_errors=True)


def remove_kept(kept: Path, keep: set[int]) -> None:
    """Of the parts that clients kept (`{client}/round-NNNN.safetensors`), leave what the rounds in `keep` go on from.

    That is, for each round, a client's newest file up to it.
    """
    for folder in kept.iterdir() if kept.is_dir() else ():
        thin_out(folder, keep)


def thin_out(folder: Path, keep: Collection[int]) -> None:
    """`remove_kept` for one client's folder."""
    needed = {kept_up_to(folder, round) for round in keep}
    for round in _kept_rounds(folder):
        file = kept_file(folder, round)
        if file not in needed and round <= max(keep):
            file.unlink()


def kept_file(folder: Path, round: int) -> Path:
    """What a client, whose folder it is, keeps from a round."""
    return folder / f"round-{round:04d}.safetensors"


def kept_up_to(folder: Path, round: int) -> Path | None:
    """A client's newest `kept_file` up to a round; None where it had kept nothing by then."""
    rounds = [r for r in _kept_rounds(folder) if r <= round]
    return kept_file(folder, max(rounds)) if rounds else None


def _kept_rounds(folder: Path) -> list[int]:
    rounds = [path.stem.removeprefix("round-") for path in folder.glob("round-*.safetensors")]
    return [int(r) for r in rounds if r.isdecimal()]
