"""What comes back in a round: put into client order, checked, completed, logged, and only then aggregated."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from flexlora import guard, ranks, wire
from flexlora.types import ClientFailure, ClientUpdate, LowRank, Ranks, TrainTask

Item = TypeVar("Item")

Notify = Callable[[str, Mapping[str, Any]], None]
"""Called as the run goes on with (event, facts): start, note, round, client, saved, stop."""


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


def timed(items: Iterable[Item], watch: Stopwatch, phase: str) -> Iterator[Item]:
    """The items, with the time spent waiting for each booked under `phase`."""
    iterator = iter(items)
    while True:
        begin = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            spent = time.perf_counter() - begin
            watch.seconds[phase] = watch.seconds.get(phase, 0.0) + spent
            watch.seconds["train_inside"] = watch.seconds.get("train_inside", 0.0) + spent
        yield item


def in_client_order(
    results: Iterable[ClientUpdate | ClientFailure], tasks: Sequence[TrainTask], spool: Path
) -> Iterator[ClientUpdate | ClientFailure]:
    """The results in the order of the tasks, so that the order of arrival changes no bit; early ones wait on disk."""
    sent = {task.client: task.download.adapter for task in tasks}
    waiting: dict[int, ClientUpdate | ClientFailure] = {}
    expected = iter(sent)
    client = next(expected, None)

    def take(number: int) -> ClientUpdate | ClientFailure:
        result = waiting.pop(number)
        if isinstance(result, ClientFailure):
            return result
        path = spool / f"{number}.safetensors"
        adapter = wire.complete(wire.decode(path.read_bytes()), sent[number])
        path.unlink()
        return replace(result, adapter=adapter)

    for result in results:
        if result.client == client:
            yield result
            client = next(expected, None)
        elif result.client in sent and result.client not in waiting:
            if isinstance(result, ClientUpdate):
                spool.mkdir(exist_ok=True)
                (spool / f"{result.client}.safetensors").write_bytes(wire.encode(result.adapter))
                result = replace(result, adapter={})
            waiting[result.client] = result
        while client in waiting:
            yield take(client)
            client = next(expected, None)
    while client is not None:
        yield take(client) if client in waiting else ClientFailure(client, "no answer")
        client = next(expected, None)
    shutil.rmtree(spool, ignore_errors=True)


def accept(
    results: Iterable[ClientUpdate | ClientFailure],
    tasks: Sequence[TrainTask],
    log: RoundLog,
    norms: Sequence[float],
    max_examples: int | None,
    notify: Notify,
) -> Iterator[ClientUpdate]:
    """The updates that may be aggregated: checked against their task, completed with what was sent, logged."""
    for task, result in zip(tasks, results, strict=True):
        if isinstance(result, ClientUpdate):
            result = replace(result, sent=task.download.adapter)
            result = guard.examine(result, task, norms=norms, max_examples=max_examples)
        log.add(task, result)
        notify("client", {"round": task.round, "client": task.client, "record": log.records[-1]})
        if isinstance(result, ClientUpdate):
            yield result


@dataclass
class RoundLog:
    """What metrics.jsonl says of a round's clients, and what they change in the rank table."""

    energy: Mapping[str, float]
    """Label of each distinct ranks -> share of ‖W‖² beyond them, of the W that was distributed."""
    records: list[dict[str, Any]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    ranks: dict[int, Ranks] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)

    def add(self, task: TrainTask, result: ClientUpdate | ClientFailure) -> None:
        label = ranks.label(task.ranks)
        record: dict[str, Any] = {"id": task.client, "ranks": label}
        if label in self.energy:
            # Relative error of what was sent: ‖W − P_r(W)‖ / ‖W‖.
            record["truncation"] = max(0.0, self.energy[label]) ** 0.5
        if isinstance(result, ClientFailure):
            self.records.append({**record, "failed": result.reason})
            return
        got = dict(result.metrics)
        record |= {
            "examples": int(got.pop("examples", result.weight)),
            "weight": result.weight,
            "loss": got.pop("train_loss", None),
            "seconds": got.pop("seconds", None),
            "bytes_up": int(got.pop("bytes_up", 0)),
            "bytes_down": int(got.pop("bytes_down", 0)),
            **got,
        }
        trained = {m: x.A.shape[0] for m, x in result.adapter.items() if isinstance(x, LowRank)}
        if trained and trained != dict(task.ranks):
            self.ranks[task.client] = trained
            record["new_ranks"] = ranks.label(trained)
        self.norms.append(guard.increment_norm(result))
        self.accepted.append(task.client)
        self.records.append(record)

    def reasons(self) -> list[str]:
        return [f"client {r['id']}: {r['failed']}" for r in self.records if "failed" in r]

    def line(self) -> dict[str, Any]:
        good = [r for r in self.records if "failed" not in r]
        losses = [(r["loss"], r["weight"]) for r in good if r["loss"] is not None]
        total = sum(w for _, w in losses)
        return {
            "train_loss": sum(x * w for x, w in losses) / total if total else None,
            "clients": good,
            "failed": [r for r in self.records if "failed" in r],
        }
