"""What comes back in a round: put into client order, checked, completed, logged, and only then aggregated."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open

from flexlora import guard, ranks, wire
from flexlora.types import ClientFailure, ClientRule, ClientUpdate, LowRank, Ranks, Sparse, TrainTask

Item = TypeVar("Item")

Notify = Callable[[str, Mapping[str, Any]], None]
"""Called as the run goes on with (event, facts): start, base, note, round, client, saved, stop, in a sweep also sweep."""


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


class Spool:
    """Updates that wait on disk for their turn; what an interrupted round left there is never read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, update: ClientUpdate) -> ClientUpdate:
        """Store the factors; the rest of the update comes back, to be given to `take`."""
        self.folder.mkdir(exist_ok=True)
        self._file(update).write_bytes(wire.encode(update.adapter))
        return replace(update, adapter={})

    def take(self, update: ClientUpdate) -> ClientUpdate:
        """The whole update; its file is gone."""
        assert update.sent is not None
        adapter = wire.complete(wire.decode(self._file(update).read_bytes()), update.sent)
        self._file(update).unlink()
        return replace(update, adapter=adapter)

    def module(self, update: ClientUpdate, module: str) -> tuple[LowRank | Sparse, LowRank | Sparse]:
        """(trained, sent) of one module of an update that waits; nothing else is read."""
        assert update.sent is not None
        origin = {module: update.sent[module]}
        with safe_open(self._file(update), framework="pt") as file:
            parts = {part: file.get_tensor(f"{module}.{part}") for part in wire.parts_of(origin[module])}
        return wire.complete({module: parts}, origin)[module], origin[module]

    def _file(self, update: ClientUpdate) -> Path:
        return self.folder / f"{update.client}.safetensors"

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def examined(
    results: Iterable[ClientUpdate | ClientFailure],
    tasks: Sequence[TrainTask],
    norms: Mapping[str, Sequence[float]],
    limits: guard.Limits,
) -> Iterator[ClientUpdate | ClientFailure]:
    """The first result of each task, checked as it arrives and completed with what was sent; nothing else passes."""
    open_tasks = {task.client: task for task in tasks}
    for result in results:
        task = open_tasks.pop(result.client, None)
        if task is None:
            continue  # an answer that nobody waits for
        if isinstance(result, ClientUpdate):
            earlier = norms.get(guard.kind(task.download.rule), ())
            result = guard.examine(result, task, norms=earlier, limits=limits)
        yield result


def in_client_order(
    results: Iterable[ClientUpdate | ClientFailure], tasks: Sequence[TrainTask], spool: Spool
) -> Iterator[ClientUpdate | ClientFailure]:
    """The results in the order of the tasks, so that the order of arrival changes no bit; early ones wait on disk."""
    waiting: dict[int, ClientUpdate | ClientFailure] = {}
    expected = iter([task.client for task in tasks])
    client = next(expected, None)

    def take(number: int) -> ClientUpdate | ClientFailure:
        result = waiting.pop(number)
        return result if isinstance(result, ClientFailure) else spool.take(result)

    for result in results:
        if result.client == client:
            yield result
            client = next(expected, None)
        else:
            waiting[result.client] = spool.put(result) if isinstance(result, ClientUpdate) else result
        while client in waiting:
            yield take(client)
            client = next(expected, None)
    while client is not None:
        yield take(client) if client in waiting else ClientFailure(client, "no answer")
        client = next(expected, None)
    spool.remove()


def accept(
    results: Iterable[ClientUpdate | ClientFailure], tasks: Sequence[TrainTask], log: RoundLog, notify: Notify
) -> Iterator[ClientUpdate]:
    """The updates among the results, in their order; both are logged."""
    for task, result in zip(tasks, results, strict=True):
        log.add(task, result)
        notify("client", {"round": task.round, "client": task.client, "record": log.records[-1]})
        if isinstance(result, ClientUpdate):
            yield result


def moderated(updates: Iterable[ClientUpdate], log: RoundLog, rule: ClientRule, spool: Spool) -> Iterator[ClientUpdate]:
    """The updates with what one client can do bounded; all of them are waited for, on disk.

    Increments are clipped to the median of their norms (and of those of dA) and weights cut to the median weight; then the
    weights become those whose weighted mean is the geometric median of the increments.
    """
    held: list[ClientUpdate] = []
    changes: list[float] = []
    for update in updates:
        changes.append(guard.A_norm(update))
        held.append(spool.put(update))
    if not held:
        return
    bound, bound_A = statistics.median(log.norms.values()), statistics.median(changes)
    cap = statistics.median(update.weight for update in held)
    held = [
        spool.put(guard.clipped(spool.take(update), bound, rule, bound_A))
        if log.norms[update.client] > bound or change > bound_A
        else update
        for update, change in zip(held, changes, strict=True)
    ]
    gram = torch.zeros((len(held), len(held)), dtype=torch.float64)
    for module in sorted({module for update in held for module in update.sent or ()}):
        holders = [i for i, update in enumerate(held) if module in (update.sent or ())]
        increments = [guard.measured(*spool.module(held[i], module), rule) for i in holders]
        gram[torch.tensor(holders)[:, None], torch.tensor(holders)] += guard.gram(increments)
    total = sum(update.weight for update in held)
    shares = guard.geometric_median(gram, [min(update.weight, cap) for update in held])
    for update, share in zip(held, shares, strict=True):
        update = replace(update, weight=share * total)
        log.moderate(update, bound)
        yield spool.take(update)
    spool.remove()


@dataclass
class RoundLog:
    """What metrics.jsonl says of a round's clients, and what they change in the rank table."""

    energy: Mapping[str, float]
    """Label of ranks -> share of ‖W‖² beyond the ranks that stand for it, of the W that was distributed."""
    kinds: Mapping[str, Ranks]
    """Label -> the ranks that stand for it."""
    records: list[dict[str, Any]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    ranks: dict[int, Ranks] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    """Client -> norm of its increment as it is aggregated."""

    def add(self, task: TrainTask, result: ClientUpdate | ClientFailure) -> None:
        label = ranks.label(task.ranks)
        record: dict[str, Any] = {"id": task.client, "ranks": label}
        if label in self.energy and task.ranks == self.kinds.get(label):
            # Relative error of the best approximation at these ranks: ‖W − P_r(W)‖ / ‖W‖.
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
        self.norms[task.client] = guard.increment_norm(result, task.download.rule)
        self.accepted.append(task.client)
        self.records.append(record)

    def moderate(self, update: ClientUpdate, bound: float) -> None:
        """Note the weight and the norm with which an update is aggregated."""
        self.norms[update.client] = min(self.norms[update.client], bound)
        record = next(r for r in self.records if r["id"] == update.client)
        share = update.metrics.get("clipped", 1.0)
        record |= {"weight": update.weight, "clipped": share}
        if share < 1:  # clipping gave the directions back that it had pruned
            self.ranks.pop(update.client, None)
            record.pop("new_ranks", None)

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
            "rejected": sum(1 for r in self.records if r.get("failed", "").startswith("rejected")),
        }
