"""A whole federation in this process: the app's two sides over a grid that hands messages straight to the sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from federation import own_folder
from flexlora import Config, run
from flexlora.federate import serve
from flexlora.rundir import Run, read_metrics
from flexlora.runners import flower
from flexlora.runners.flower import client_app

RANKS = (2, 3, 8, 5)


def in_this_process(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Flower's objects work without its processes, and nobody waits."""
    monkeypatch.setenv("FLWR_HOME", str(home))
    monkeypatch.setattr(flower, "POLL", 0.0)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class SitesGrid:
    """Nodes with their node configs; a message is answered at once. Remembers every message of both ways."""

    def __init__(self, home: Path, run_config: dict[str, Any]) -> None:
        self.home, self.run_config = home, run_config
        self.nodes: dict[int, dict[str, Any]] = {}
        self.sent: list[Message] = []
        self.replies: dict[str, Message | Exception] = {}
        self.looks: dict[str, int] = {}
        self.answered: list[Message] = []
        self.before: Callable[[Message], bool] = lambda message: True
        """Called with each message that a site gets; False: the site dies of it."""
        self.instead: Callable[[Message], Message | Exception | None] = lambda reply: reply
        """Called with each reply; None: it never comes, an error: Flower raises it."""

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name = f"m{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            node = message.metadata.dst_node_id
            if node not in self.nodes or not self.before(message):
                self.nodes.pop(node, None)
                self.replies[name] = Message(Error(2, "the node is\nunavailable"), reply_to=message)
            else:
                context = Context(1, node, self.nodes[node], RecordDict(), self.run_config)
                self.answered.append(client_app(message, context))
                reply = self.instead(self.answered[-1])
                if reply is not None:
                    self.replies[name] = reply
            ids.append(name)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> Iterable[Message]:
        (name,) = ids  # of several that are ready Flower would hold all
        # The last one first, every other one at the second look: the order of arrival must not matter.
        self.looks[name] = self.looks.get(name, 0) + 1
        if name not in self.replies or (self.looks[name] == 1 and int(name[1:]) % 2):
            return []
        reply = self.replies.pop(name)
        if isinstance(reply, Exception):
            raise reply
        return [reply]


class Town:
    """Four sites with folders of their own, and the run that they take part in."""

    def __init__(self, tiny: tuple[Path, Path], folder: Path, **keys: Any) -> None:
        self.folder, self.data = folder, tiny[1]
        self.keys: dict[str, Any] = {
            "model": str(tiny[0]),
            "output_dir": str(folder / "runs"),
            "name": "federation",
            "method": "flexlora",
            "ranks": "homo",
            "rounds": 2,
            "participation": 1.0,
            "learning_rate": 0.01,
            "lora_dropout": 0.1,
            "early_stop": False,
            "min_clients": 1,
            "round_timeout": 60.0,
            **keys,
        }
        self.grid = SitesGrid(folder, self.keys)
        self.notes: list[str] = []

    def join(self, *sites: int, **config: Any) -> None:
        for site in sites:
            own = self.folder / f"own-{site}"
            if not own.exists():
                own_folder(self.data, 4, site, own)
            self.grid.nodes[1000 - site] = {"partition-id": site, "data": str(own), "rank": RANKS[site], **config}

    def serve(self, on: Callable[[str, Any], None] = lambda event, facts: None, **keys: Any) -> Run:
        def notify(event: str, facts: Any) -> None:
            if event == "note":
                self.notes.append(facts["text"])
            on(event, facts)

        grid: Any = self.grid
        return serve(grid, {**self.keys, **keys}, notify)

    def local(self, tiny: tuple[Path, Path], **keys: Any) -> Run:
        """The same run with every client in this process."""
        types = {f"r{rank}": rank for rank in RANKS}
        table = {site: f"r{rank}" for site, rank in enumerate(RANKS)}
        values = {
            **self.keys,
            "ranks": {"types": types, "clients": table},
            "data": tiny[1],
            "name": "local",
            "eval_every": 0,
            **keys,
        }
        return run(Config(**values))


def state_of(done: Run, round: int) -> bytes:
    return (done.checkpoints / f"round-{round:04d}" / "state.safetensors").read_bytes()


def participants(done: Run) -> list[list[int]]:
    return [[c["id"] for c in line["clients"]] for line in read_metrics(done.folder)]
