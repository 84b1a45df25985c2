"""A federation on disk, in the layout of the FlexLoRA release.

    {data}/{num_clients}/local_training_{i}.json   what client i trains on
                         local_eval_{i}.json       its part of the validation sample
                         local_test_{i}.json       its own test set
                         global_test.json          tasks that no client trains on (optional; here or in {data}/)

Opening one lists the folder and reads no example; files are read when a client is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.data.records import Record, read_records
from flexlora.randomness import derive
from flexlora.types import FlexLoraError

KINDS = ("training", "eval", "test")
GLOBAL_TEST = "global_test.json"
_FILE = re.compile(r"local_(training|eval|test)_(0|[1-9]\d*)\.json")


def permutation(n: int, seed: int, *purpose: str | int) -> list[int]:
    """0 … n-1 in an order that follows from the seed alone, on every machine and Python."""
    return sorted(range(n), key=lambda i: derive(seed, *purpose, i))


def spread(records: Sequence[Record], most: int | None) -> list[Record]:
    """At most `most` records, evenly spaced over all of them, so that every task keeps its share; None: all."""
    if most is None or most >= len(records):
        return list(records)
    return [records[i * len(records) // most] for i in range(most)]


class Federation:
    """The data of all clients; made by `open_federation`."""

    def __init__(self, folder: Path, sizes: dict[str, dict[int, int]], global_test: Path | None) -> None:
        self.folder = folder
        self.clients = tuple(sorted(sizes["training"]))
        self._sizes = sizes
        self._global_test = global_test
        self._read: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.clients)

    def train(self, client: int) -> list[Record]:
        """Training examples of one client, at least one."""
        return self._records("training", client)

    def eval(self, client: int) -> list[Record]:
        """Validation examples of one client; [] where there are none."""
        return self._records("eval", client)

    def test(self, client: int) -> list[Record]:
        """Test examples of one client; [] where there are none."""
        return self._records("test", client)

    def _records(self, kind: str, client: int) -> list[Record]:
        if client not in self._sizes["training"]:
            raise FlexLoraError(f"{self.folder}: has no client {client}: clients are 0 to {len(self) - 1}")
        if client not in self._sizes[kind]:
            return []
        name = f"local_{kind}_{client}.json"
        records = read_records(self.folder / name, allow_empty=kind != "training")
        self._note(name, self.folder / name)
        return records

    def global_test(self) -> list[Record]:
        """Examples of tasks that no client trains on; [] where the file is absent."""
        if self._global_test is None:
            return []
        records = read_records(self._global_test)
        self._note(GLOBAL_TEST, self._global_test)
        return records

    def validation_sample(self, examples: int, seed: int) -> list[Record]:
        """At most `examples` records of all clients' eval files: always the same for one seed.

        One record a client, clients in seeded order, then a second one each, and so on: with more clients than
        `examples`, only that many files are read. Raises FlexLoraError where no client has an eval example.
        """
        order = permutation(len(self), seed, "validation", "clients")
        shuffled: dict[int, list[Record]] = {}
        sample: list[Record] = []
        turn = 0
        while len(sample) < examples:
            before = len(sample)
            for client in (self.clients[place] for place in order):
                if len(sample) == examples:
                    break
                if client not in shuffled:
                    records = self.eval(client)
                    places = permutation(len(records), seed, "validation", client)
                    shuffled[client] = [records[place] for place in places]
                if turn < len(shuffled[client]):
                    sample.append(shuffled[client][turn])
            if len(sample) == before:
                break
            turn += 1
        if not sample and examples > 0:
            raise FlexLoraError(
                f"{self.folder}: no client has an eval example for validation and early stop: "
                "add local_eval_{client}.json with examples for some clients"
            )
        return sample

    def fingerprint(self) -> dict[str, Any]:
        """JSON-ready: the size of every file, and the SHA-256 of those that this process has read so far."""
        sizes = {kind: [self._sizes[kind].get(client, -1) for client in self.clients] for kind in KINDS}
        size = -1 if self._global_test is None else self._global_test.stat().st_size
        return {"clients": len(self), "sizes": sizes, "global_test": size, "sha256": dict(sorted(self._read.items()))}

    def check_unchanged(self, fingerprint: Mapping[str, Any]) -> None:
        """Compare with an earlier `fingerprint`. Raises FlexLoraError that names the first file that differs."""
        now = self.fingerprint()
        if now["clients"] != fingerprint["clients"]:
            raise FlexLoraError(
                f"{self.folder}: has {now['clients']} clients, the run began with {fingerprint['clients']}: "
                "give the run's own data back or start a new run"
            )
        changed = [
            f"local_{kind}_{client}.json"
            for kind in KINDS
            for client, was, is_now in zip(self.clients, fingerprint["sizes"][kind], now["sizes"][kind], strict=True)
            if was != is_now
        ]
        if now["global_test"] != fingerprint["global_test"]:
            changed.append(GLOBAL_TEST)
        for name, digest in fingerprint["sha256"].items():
            path = self._global_test if name == GLOBAL_TEST else self.folder / name
            if name not in changed and path is not None and _sha256(path) != digest:
                changed.append(name)
        if changed:
            others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise FlexLoraError(
                f"{self.folder / changed[0]}: changed since the run began{others}: "
                "give the run's own data back or start a new run"
            )
        # What the run read before stays in the next fingerprint, whichever files this process reads.
        self._read = {**fingerprint["sha256"], **self._read}

    def _note(self, name: str, path: Path) -> None:
        if name not in self._read:
            self._read[name] = _sha256(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_federation(path: str | Path, num_clients: int | None = None) -> Federation:
    """Open ``{path}/{num_clients}``, or `path` itself where it holds the client files.

    num_clients None: the only federation in the folder. Raises FlexLoraError, one line, for a folder that is not
    there or made for another number of clients, for a missing client and for an empty file.
    """
    folder = _client_folder(Path(path), num_clients)
    sizes = _list(folder)
    count = num_clients if num_clients is not None else len(sizes["training"])
    for client in range(count):
        if client not in sizes["training"]:
            raise FlexLoraError(
                f"{folder / f'local_training_{client}.json'}: missing: clients are numbered 0 to {count - 1} "
                "without a gap; restore the file or set --num_clients"
            )
    if len(sizes["training"]) != count:
        raise FlexLoraError(
            f"{folder}: holds {len(sizes['training'])} clients, not {count}: set --num_clients {len(sizes['training'])}"
        )
    for kind in KINDS:
        for client in sorted(sizes[kind]):
            name = f"local_{kind}_{client}.json"
            if client >= count:
                raise FlexLoraError(f"{folder / name}: there is no client {client} of {count}: remove the file")
            if sizes[kind][client] == 0:
                raise FlexLoraError(f"{folder / name}: the file is empty: write a JSON list of records")
        if 0 < len(sizes[kind]) < count:
            missing = next(client for client in range(count) if client not in sizes[kind])
            raise FlexLoraError(
                f"{folder / f'local_{kind}_{missing}.json'}: missing while other clients have one: restore it or write []"
            )
    places = (folder / GLOBAL_TEST, folder.parent / GLOBAL_TEST)
    return Federation(folder, sizes, next((place for place in places if place.is_file()), None))


def _client_folder(path: Path, num_clients: int | None) -> Path:
    if not path.is_dir():
        raise FlexLoraError(
            f"{path}: no such folder: set --data to a folder with {{num_clients}}/local_training_*.json"
        )
    if any(entry.name.startswith("local_training_") for entry in os.scandir(path)):
        return path
    inner = sorted(
        int(entry.name)
        for entry in os.scandir(path)
        if re.fullmatch(r"[1-9]\d*", entry.name) and entry.is_dir() and _list(Path(entry.path))["training"]
    )
    if not inner:
        wanted = "{num_clients}" if num_clients is None else str(num_clients)
        raise FlexLoraError(f"{path}: holds no {wanted}/local_training_0.json: set --data to a federation's folder")
    found = ", ".join(map(str, inner))
    if num_clients is None:
        if len(inner) > 1:
            raise FlexLoraError(f"{path}: holds federations of {found} clients: choose one with --num_clients")
        return path / str(inner[0])
    if num_clients not in inner:
        raise FlexLoraError(
            f"{path}: holds no federation of {num_clients} clients but of {found}: set --num_clients {inner[0]}"
        )
    return path / str(num_clients)


def _list(folder: Path) -> dict[str, dict[int, int]]:
    """Kind -> client -> bytes, from one pass over the folder."""
    sizes: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
    for entry in os.scandir(folder):
        match = _FILE.fullmatch(entry.name)
        if match:
            sizes[match[1]][int(match[2])] = entry.stat().st_size
    return sizes
