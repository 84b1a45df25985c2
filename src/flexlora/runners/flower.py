"""A federation of Flower (flwr 1.41): the server's runner over a grid, and what a site does with a message.

Needs the extra: `pip install '.[flower]'` in flexlora's clone. A message holds one `Parcel`: JSON facts in a ConfigRecord, safetensors
bytes in an ArrayRecord. From a site leave its capabilities (number of examples, rank or memory, its number), adapters,
figures of its training and its validation loss; its examples do not.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from flexlora import client, sampling, wire
from flexlora.client import Site
from flexlora.collection import Notify
from flexlora.config import Config, make_config
from flexlora.data.federation import Federation, open_federation
from flexlora.data.records import Record
from flexlora.modeling import Model
from flexlora.prompts import TokenCache
from flexlora.types import (
    ClientFailure,
    ClientInfo,
    ClientScore,
    ClientUpdate,
    EvalTask,
    FlexLoraError,
    LocalTraining,
    TrainTask,
)
from flexlora.wire import Parcel

CAPABILITIES = "query.capabilities"
POLL = 0.5
"""Seconds between two looks for answers."""
QUERY_TIMEOUT = 120.0
"""Seconds that a site is waited for, once, to say what it can do. Later answers are taken when they are there."""
DAY_HALF = 43200.0
"""Flower's own limit for a message."""
UNANSWERED = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""What Flower says of a message that nobody answered."""
GRACE = 60.0
"""Seconds by which Flower gives up later than we do."""
ON_THE_WAY = (OSError, httpx.HTTPError)
"""What Flower raises for trouble on the way; anything else comes of a reply whose pieces make no message."""


# --- messages ----------------------------------------------------------------------------------------------------------


def records(parcel: Parcel, run: str = "") -> RecordDict:
    """A parcel as Flower carries it; `run` names the run to the site, which keeps parts for it."""
    blobs = {"adapter": parcel.adapter, "base_delta": parcel.base_delta}
    arrays = {name: Array("uint8", (len(blob),), "safetensors", blob) for name, blob in blobs.items() if blob}
    return RecordDict(
        {"facts": ConfigRecord({"json": parcel.facts, "run": run}), "adapters": ArrayRecord(array_dict=arrays)}
    )


def parcel_of(content: RecordDict) -> tuple[Parcel, str]:
    """(parcel, run). Raises FlexLoraError where the records are not those of `records`."""
    facts, arrays = content.get("facts"), content.get("adapters")
    if not isinstance(facts, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise FlexLoraError("message has no facts or no adapters")
    text, run = facts.get("json"), facts.get("run")
    if not isinstance(text, str) or not isinstance(run, str):
        raise FlexLoraError("message has facts that are no text")
    blobs = {name: array.data for name, array in arrays.items()}
    return Parcel(text, blobs.get("adapter", b""), blobs.get("base_delta", b"")), run


# --- the server's side -------------------------------------------------------------------------------------------------


class NewSitesError(Exception):
    """Sites came that have no ranks yet: the round is to be begun again with them."""


@dataclass(frozen=True)
class Seat:
    """Where a client sits."""

    node: int
    info: ClientInfo


@dataclass(frozen=True)
class Question:
    """What a node was asked: how long it is waited for, and when the message lapses, both as time.monotonic()."""

    node: int
    patience: float
    lapse: float


class FlowerRunner:
    """Sends tasks to the sites over a grid. Each site is one client; its number is the `partition-id` of its node config."""

    def __init__(self, grid: Grid, config: Config, settings: LocalTraining, run: str, notify: Notify) -> None:
        self._grid, self._config, self._settings, self._run, self._notify = grid, config, settings, run, notify
        self._dtype = getattr(torch, config.wire_dtype)
        self._nodes: dict[int, tuple[int, ClientInfo] | None] = {}
        """Node -> (client, what it said), None where it said nothing that can be used."""
        self._asked: dict[str, Question] = {}
        """Message -> question that has no answer yet."""
        self._silent: set[int] = set()
        """Nodes that were waited for in vain."""
        self._seated: dict[int, int] = {}
        """Client -> node that had its seat when last looked."""
        self._doubles: set[int] = set()
        """Nodes of which a line has said that their seat is taken."""
        self._admitted: dict[int, ClientInfo] = {}
        self._unfit: dict[int, ClientInfo] = {}
        """Clients that take no part while they say this."""

    def seats(self) -> dict[int, Seat]:
        """Client -> where it sits, of the sites that are connected now; new ones are asked what they can do.

        Who sits keeps the seat: a site that comes later and states the same number is left out while the first one is there.
        """
        present = set(self._grid.get_node_ids())
        self._ask(present)
        # A site that comes back may have changed its mind.
        self._nodes = {node: said for node, said in self._nodes.items() if node in present}
        first = set(self._seated.values())
        seats: dict[int, Seat] = {}
        for node in sorted(self._nodes, key=lambda node: (node not in first, node)):
            said = self._nodes[node]
            if said is not None:
                number, info = said
                if number not in seats:
                    seats[number] = Seat(node, info)
                elif node not in self._doubles:
                    self._doubles.add(node)
                    self._note(
                        f"site {number} is connected twice; node {node} is left out: give it another partition-id"
                    )
        self._seated = {number: seat.node for number, seat in seats.items()}
        return seats

    def wait(self) -> dict[int, Seat]:
        """The seats of those that are not turned away, once `min_clients` of them can be drawn. Raises FlexLoraError where they
        do not come."""
        end = time.monotonic() + (self._config.round_timeout or DAY_HALF)
        least, share = self._config.min_clients, self._config.participation
        needed = next(n for n in itertools.count(least) if sampling.cohort(n, share) >= least)
        of_them = "" if needed == least else f" for rounds of {least}"
        told = False
        while len(seats := self._fit()) < needed:
            if not told:
                told = True
                self._note(f"waiting for sites: {len(seats)} of {needed} are connected{of_them}")
            if time.monotonic() > end:
                raise FlexLoraError(
                    f"min_clients: {len(seats)} sites are connected and {needed} are needed{of_them}; "
                    "start more SuperNodes, or lower min_clients"
                )
            time.sleep(POLL)
        return seats

    def _fit(self) -> dict[int, Seat]:
        return {number: seat for number, seat in self.seats().items() if self._unfit.get(number) != seat.info}

    def infos(self) -> dict[int, ClientInfo]:
        """What the sites say that are connected, once there are enough of them."""
        return {number: seat.info for number, seat in self.wait().items()}

    def admit(self, infos: Mapping[int, ClientInfo]) -> None:
        """These clients have ranks now, chosen after what they said."""
        self._admitted = dict(infos)

    def turn_away(self, number: int, info: ClientInfo, reason: object) -> None:
        """This client takes no part while it says this; a line says so."""
        self._unfit[number] = info
        self._note(f"site {number} takes no part: {reason}")

    def clients(self) -> Mapping[int, ClientInfo]:
        """The sites that are connected. Raises NewSitesError where one of them has no ranks yet, or says another rank."""
        found = self.infos()
        if any(self._admitted.get(number) != info for number, info in found.items()):
            raise NewSitesError
        return found

    def train(self, round: int, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task, answer in self._stream("train", tasks):
            yield answer if isinstance(answer, ClientFailure) else client.arrived(answer, task, self._dtype)

    def evaluate(self, round: int, tasks: Sequence[EvalTask]) -> Iterator[ClientScore | ClientFailure]:
        for task, answer in self._stream("evaluate", tasks):
            score = answer if isinstance(answer, ClientFailure) else client.scored(answer, task)
            # Scores are weighted by their tokens: more than its examples can have would outvote all others.
            if isinstance(score, ClientScore) and score.tokens > score.examples * self._settings.cutoff_len:
                score = ClientFailure(task.client, "rejected: its score counts more tokens than its examples can have")
            yield score

    def close(self) -> None: ...

    def _stream(self, kind: str, tasks: Sequence[Any]) -> Iterator[tuple[Any, Parcel | ClientFailure]]:
        """(task, answer) as they come."""
        seats, pending = self.seats(), {}
        timeout = self._config.round_timeout or DAY_HALF
        for task in tasks:
            if task.client not in seats:
                yield task, ClientFailure(task.client, "its site is not connected")
                continue
            parcel = wire.pack_task(task, seed=self._config.seed, dtype=self._dtype, training=self._settings)
            message = self._send(seats[task.client].node, kind, records(parcel, self._run), task.round, timeout)
            if message is None:
                yield task, ClientFailure(task.client, "its message could not be sent")
            else:
                pending[message] = task
        for message, reply in self._replies(list(pending), timeout):
            task = pending.pop(message)
            if isinstance(reply, str):
                yield task, ClientFailure(task.client, f"rejected: {reply}")
                continue
            if reply.has_error():
                reason = wire.one_line(reply.error.reason or f"error {reply.error.code}", 300)
                yield task, ClientFailure(task.client, f"its site failed: {reason}")
                continue
            try:
                yield task, parcel_of(reply.content)[0]
            except FlexLoraError as error:
                yield task, ClientFailure(task.client, f"rejected: {error}")
        for task in pending.values():
            yield task, ClientFailure(task.client, f"no answer in {timeout:g} s")

    def _send(self, node: int, kind: str, content: RecordDict, round: int, ttl: float) -> str | None:
        """The message's id; None where it was refused."""
        message = Message(content, node, kind, ttl=ttl + GRACE, group_id=str(round))
        return next(iter(self._grid.push_messages([message])), None)

    def _replies(self, messages: Sequence[str], timeout: float) -> Iterator[tuple[str, Message | str]]:
        """(id of the message, reply, or why it cannot be read) until all are there or time is up.

        One at a time: of several that are ready Flower would hold all. And it puts them together before we see them, so that a
        reply whose pieces make no message raises inside.
        """
        waiting, end = sorted(messages), time.monotonic() + timeout
        while waiting:
            for message in list(waiting):
                try:
                    reply = next(iter(self._grid.pull_messages([message])), None)
                except ON_THE_WAY:
                    raise
                except Exception as error:
                    waiting.remove(message)
                    yield message, f"its answer cannot be read ({type(error).__name__})"
                    continue
                # An error's sender is the SuperLink: ids are matched.
                if reply is not None and reply.metadata.reply_to_message_id == message:
                    waiting.remove(message)
                    yield message, reply
            if time.monotonic() >= end:
                return
            if waiting:
                time.sleep(POLL)

    def _ask(self, present: Set[int]) -> None:
        """Ask nodes that have said nothing yet what they can do, and take what they say, capped; a line says so.

        A node is waited for once. One that was silent is asked again when its question has lapsed, and not waited for.
        """
        now = time.monotonic()
        self._silent &= present
        self._asked = {m: q for m, q in self._asked.items() if q.node in present and now < q.lapse}
        asked = {question.node for question in self._asked.values()}
        for node in sorted(present - set(self._nodes) - asked):
            message = self._send(node, CAPABILITIES, records(Parcel("{}"), self._run), 0, QUERY_TIMEOUT)
            if message is not None:
                patience = 0.0 if node in self._silent else QUERY_TIMEOUT
                self._asked[message] = Question(node, now + patience, now + QUERY_TIMEOUT + GRACE)
        wait = max((question.patience for question in self._asked.values()), default=now) - time.monotonic()
        for message, reply in self._replies(list(self._asked), wait):
            node = self._asked.pop(message).node
            if not isinstance(reply, str) and reply.has_error() and reply.error.code in UNANSWERED:
                self._silent.add(node)  # the question lapsed while another node was waited for
                continue
            try:
                if isinstance(reply, str) or reply.has_error():
                    raise FlexLoraError(reply if isinstance(reply, str) else wire.one_line(reply.error.reason, 300))
                self._nodes[node] = self._capped(*stated(parcel_of(reply.content)[0].facts))
            except FlexLoraError as error:
                self._nodes[node] = None
                self._note(f"node {node} takes no part: {error}")
        for node in sorted({question.node for question in self._asked.values()} - self._silent):
            self._silent.add(node)
            self._note(f"node {node} has not said in {QUERY_TIMEOUT:g} s what it can do; it takes part once it does")

    def _capped(self, number: int, info: ClientInfo) -> tuple[int, ClientInfo]:
        sites = self._config.num_clients
        if self._config.dp_noise and sites is not None and number >= sites:
            raise FlexLoraError(f"site {number}: the noise is for the {sites} sites 0 to {sites - 1} (num_clients)")
        for name, most in (("rank", self._config.max_rank), ("examples", self._config.max_examples)):
            said = getattr(info, name)
            if said is not None and most is not None and said > most:
                self._note(f"site {number} says {name} {said}; max_{name} caps it at {most}")
                info = replace(info, **{name: most})
        return number, info

    def _note(self, text: str) -> None:
        self._notify("note", {"text": text})


def stated(facts: str) -> tuple[int, ClientInfo]:
    """(client, what it says of itself). Raises FlexLoraError where a site says nothing that can be used."""
    try:
        given = json.loads(facts)
        if not isinstance(given, dict):
            raise ValueError("no object")
        if "error" in given:
            raise FlexLoraError(wire.one_line(given["error"], 300))
        numbers = [given.get(name) for name in ("client", "examples", "rank", "memory")]
        least = (0, 1, 1, 1)
        for number, at_least in zip(numbers, least, strict=True):
            if number is not None and not (isinstance(number, int) and at_least <= number < 2**53):
                raise ValueError(f"{number!r} is no count")
        if numbers[0] is None:
            raise ValueError("it has no partition-id in its node config")
    except (ValueError, RecursionError) as error:
        raise FlexLoraError(f"its capabilities cannot be read: {error}") from None
    return numbers[0], ClientInfo(*numbers[1:])


# --- the site's side ---------------------------------------------------------------------------------------------------

client_app = ClientApp()

SITE_KEYS = ("data", "num_clients", "model", "device", "precision", "cache_dir", "trust_remote_code", "eval_batch_size")
"""Configuration keys that a site sets for itself in its node config."""
SERVER_KEYS = ("model", "lora_target_modules", "eval_batch_size")
"""Configuration keys that a site takes from the run where it does not set them."""


class OwnData:
    """The data of one site, whatever number the federation gives it."""

    def __init__(self, federation: Federation, own: int) -> None:
        self.federation, self.own = federation, own

    def train(self, client: int) -> list[Record]:
        return self.federation.train(self.own)

    def eval(self, client: int) -> list[Record]:
        return self.federation.eval(self.own)


def site_config(context: Context) -> Config:
    """The site's configuration: its node config before the run's."""
    node, run = context.node_config, context.run_config
    values: dict[str, Any] = {name: run[name] for name in SERVER_KEYS if name in run}
    values |= {name: node[name] for name in SITE_KEYS if name in node}
    # Only in a simulation, where there is one machine, does the run say where the data are.
    if "num-partitions" in node and "data" not in node and "data" in run:
        values["data"] = run["data"]
    return make_config(values, "node config")


def own_data(config: Config, partition: int) -> OwnData:
    """The site's own folder, or its part of a simulation's."""
    if config.data is None:
        raise FlexLoraError("data: no folder given; add data='/path' to --node-config")
    federation = open_federation(config.data, config.num_clients)
    return OwnData(federation, 0 if len(federation) == 1 else partition)


def kept_folder(context: Context, run: str) -> Path:
    """Where the parts stay that never leave this site: `keep` of the node config, or Flower's home."""
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr") / "flexlora-kept"
    if not re.fullmatch(r"[0-9a-f]{1,64}", run):
        raise FlexLoraError("the run has no proper name; install the server's version of flexlora")
    return Path(str(context.node_config.get("keep", home))) / run


MODEL_KEYS = ("model", "lora_target_modules", "cache_dir", "device", "precision", "trust_remote_code")


def model_of(config: Config) -> Model:
    """The base model; loaded once a process, which a simulation uses for one message after the other."""
    keys = config.dump()
    return _model(json.dumps({name: keys[name] for name in MODEL_KEYS}))


@lru_cache(maxsize=1)
def _model(keys: str) -> Model:
    return client.load(Config(**json.loads(keys)))


def discreet(error: BaseException) -> str:
    """What the server is told of an error: our own errors name files and places, any other may quote the data.

    So may ours where a chat template refused: its reason is the template's own.
    """
    from jinja2 import TemplateError

    if isinstance(error, FlexLoraError) and not isinstance(error.__cause__, TemplateError):
        return client.reason(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}; its site's log says more"


def answer(message: Message, context: Context) -> Message:
    """Perform the parcel in a message. Whatever fails is answered: what Flower would say of an exception quotes it."""
    try:
        parcel, run = parcel_of(message.content)
        config = site_config(context)
        partition = int(context.node_config["partition-id"])
        site = Site(
            model_of(config),
            own_data(config, partition),
            TokenCache(),
            kept_folder(context, run),
            config.eval_batch_size,
            says=discreet,
        )
        reply = client.perform(site, parcel)
    except Exception as error:
        reply = wire.pack_failure(ClientFailure(-1, discreet(error)))
    return Message(records(reply), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    return answer(message, context)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return answer(message, context)


@client_app.query("capabilities")
def capabilities(message: Message, context: Context) -> Message:
    """What this site can do, from its node config and the number of its examples."""
    node = context.node_config
    try:
        if "partition-id" not in node:
            raise FlexLoraError("partition-id: missing; add partition-id=N to --node-config")
        partition = int(node["partition-id"])
        examples = len(own_data(site_config(context), partition).train(partition))
        facts: dict[str, Any] = {"client": partition, "examples": examples}
        facts |= {name: node[name] for name in ("rank", "memory") if name in node}
    except Exception as error:
        facts = {"error": discreet(error)}
    return Message(records(Parcel(json.dumps(facts))), reply_to=message)
