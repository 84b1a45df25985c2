"""The default runner: every client of the round in this process, one after the other, on one base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from flexlora import client
from flexlora.client import Site
from flexlora.processor import give_back
from flexlora.types import ClientFailure, ClientInfo, ClientScore, ClientUpdate, EvalTask, LocalTraining, TrainTask


class LocalRunner:
    """Trains and evaluates at one `Site`."""

    def __init__(self, site: Site, clients: Sequence[int], settings: LocalTraining) -> None:
        self.site = site
        self.settings = settings
        self._clients = {number: ClientInfo() for number in clients}

    def clients(self) -> Mapping[int, ClientInfo]:
        return self._clients

    def train(self, round: int, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in tasks:
            yield client.train(self.site, task)
        give_back()

    def evaluate(self, round: int, tasks: Sequence[EvalTask]) -> Iterator[ClientScore | ClientFailure]:
        for task in tasks:
            yield client.evaluate(self.site, task, self.settings)

    def close(self) -> None:
        self.site.model.detach()
