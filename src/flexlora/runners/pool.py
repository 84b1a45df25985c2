"""A runner over a pool: several slots, each with its own base model, that take the clients of a round as they get free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from flexlora import client, wire
from flexlora.config import Config
from flexlora.types import (
    ClientFailure,
    ClientInfo,
    ClientScore,
    ClientUpdate,
    EvalTask,
    LocalTraining,
    TrainTask,
)
from flexlora.wire import Parcel

ATTEMPTS = 2
"""How often a client is tried whose slot dies."""


class Slot(Protocol):
    """One process with a base model."""

    def send(self, parcel: Parcel) -> None:
        """Give it a task; it has none now. Raises LostError where it is dead."""
        ...

    def receive(self) -> Parcel:
        """Its answer. Raises LostError where it died."""
        ...

    def close(self) -> None: ...


class LostError(Exception):
    """A slot died."""


@dataclass(frozen=True)
class Recipe:
    """What a slot needs to open its site."""

    config: Config
    kept: Path
    threads: int
    """torch threads of one slot."""


class PoolRunner:
    """Clients of a round streamed over slots; a slot that dies is replaced and its client done again once."""

    def __init__(
        self,
        start: Callable[[int], Slot],
        wait: Callable[[Sequence[Any]], Sequence[Any]],
        *,
        slots: int,
        clients: Sequence[int],
        config: Config,
        settings: LocalTraining,
    ) -> None:
        """start: opens slot number i. wait: those of the slots that have an answer or died, at least one."""
        self._start, self._wait = start, wait
        self._slots: list[Slot] = []
        self._clients = {number: ClientInfo() for number in clients}
        self._seed, self._dtype = config.seed, getattr(torch, config.wire_dtype)
        self._settings = settings
        try:
            for number in range(slots):
                self._slots.append(start(number))
        except BaseException:
            self.close()
            raise

    def clients(self) -> Mapping[int, ClientInfo]:
        return self._clients

    def train(self, round: int, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task, answer in self._stream(tasks):
            yield answer if isinstance(answer, ClientFailure) else client.arrived(answer, task, self._dtype)

    def evaluate(self, round: int, tasks: Sequence[EvalTask]) -> Iterator[ClientScore | ClientFailure]:
        for task, answer in self._stream(tasks):
            yield answer if isinstance(answer, ClientFailure) else client.scored(answer, task)

    def _stream(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, Parcel | ClientFailure]]:
        """(task, answer), as they come; tasks are packed when a slot is free for them."""
        waiting = deque((task, 1) for task in tasks)
        idle = list(range(len(self._slots)))
        busy: dict[int, tuple[Any, int]] = {}
        try:
            while waiting or busy:
                while waiting and idle:
                    number = idle.pop(0)
                    busy[number] = waiting.popleft()
                    parcel = wire.pack_task(
                        busy[number][0], seed=self._seed, dtype=self._dtype, training=self._settings
                    )
                    # Where it is dead, its answer will not come either: that is where it is dealt with.
                    with suppress(LostError):
                        self._slots[number].send(parcel)
                ready = self._wait([self._slots[number] for number in busy])
                for number in [n for n in busy if self._slots[n] in ready]:
                    task, attempt = busy.pop(number)
                    try:
                        answer: Parcel | ClientFailure = self._slots[number].receive()
                    except LostError as error:
                        self._replace(number)
                        if attempt < ATTEMPTS:
                            waiting.appendleft((task, attempt + 1))
                            idle.append(number)
                            continue
                        answer = ClientFailure(task.client, f"its worker died {ATTEMPTS} times ({error})")
                    idle.append(number)
                    yield task, answer
        finally:
            # Left in the middle: what these slots would still say belongs to no task any more.
            if self._slots:  # else the pool is closed
                for number in busy:
                    self._replace(number)

    def _replace(self, number: int) -> None:
        self._slots[number].close()
        self._slots[number] = self._start(number)

    def close(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots = []
