"""What travels between server and client: JSON facts and safetensors messages, nothing else. Bytes are counted by length.

A `Parcel` is one message in either direction, the same through a pipe, to a Ray actor and in a Flower message. Nothing
in it is trusted: whatever does not fit what was asked for is a FlexLoraError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flexlora.methods.slora import mask
from flexlora.types import (
    Adapter,
    ClientFailure,
    ClientRule,
    ClientScore,
    ClientUpdate,
    Download,
    EvalTask,
    FlexLoraError,
    LocalTraining,
    LowRank,
    Sparse,
    TrainTask,
    printable,
)

PARTS = ("A", "B", "values")

LARGEST = 2**24
"""Rows or columns that a task may speak of: what is made of their number must have an end, whoever sends it."""

METRICS = (
    "train_loss",
    "first_loss",
    "last_loss",
    "examples",
    "steps",
    "tokens",
    "label_tokens",
    "cut",
    "cut_examples",
    "seconds",
)
"""What a client may say of its training; other names are dropped on arrival."""


def parts_of(x: LowRank | Sparse) -> dict[str, Tensor]:
    """The parts of one module's factors that can travel; a sparse index never does."""
    return {"values": x.values} if isinstance(x, Sparse) else {"B": x.B, "A": x.A}


def encode(adapter: Adapter, parts: Iterable[str] = PARTS, *, dtype: torch.dtype | None = None) -> bytes:
    """A safetensors message of the named parts, tensors called `{module}.{part}`, cast to `dtype` where one is given."""
    wanted = set(parts)
    tensors = {
        f"{module}.{part}": (tensor if dtype is None else tensor.to(dtype)).contiguous()
        for module, x in adapter.items()
        for part, tensor in parts_of(x).items()
        if part in wanted
    }
    return save({name: t.clone() for name, t in tensors.items()})


def decode(message: bytes) -> dict[str, dict[str, Tensor]]:
    """module -> part -> tensor. Raises FlexLoraError where the message is no safetensors file or names no part."""
    try:
        tensors = load(message)
    # Sizes that no tensor can have pass the format where another one is zero; torch then has its own words for it.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FlexLoraError(f"message is not safetensors: {one_line(error, 200)}") from None
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if not module or part not in PARTS:
            raise FlexLoraError(f"message has a tensor named {name!r}; names end in .A, .B or .values")
        modules.setdefault(module, {})[part] = tensor
    return modules


def complete(
    received: Mapping[str, Mapping[str, Tensor]], sent: Adapter, parts: Iterable[str] = PARTS
) -> dict[str, LowRank | Sparse]:
    """The adapter of a message, with the parts that did not travel filled in from what was sent; float32.

    In the order of what was sent; of the message only the named parts are taken. Raises FlexLoraError for a module that
    was not sent, a part that is missing, factors that are no matrices, more numbers than were sent, and types that do not
    travel.
    """
    wanted = set(parts)
    for module in received:
        if module not in sent:
            raise FlexLoraError(f"message has a module that was not sent: {module!r}")
    adapter: dict[str, LowRank | Sparse] = {}
    for module, origin in sent.items():
        if module not in received:
            continue
        taken = {}
        for part, tensor in received[module].items():
            if tensor.dtype not in (torch.float32, torch.bfloat16):
                raise FlexLoraError(f"message has numbers of type {tensor.dtype} in {module}")
            # Before it is copied: in half precision it would grow.
            like = getattr(origin, part, None)
            if like is None or tensor.numel() > like.numel():
                raise FlexLoraError(f"message has more numbers in {module} than it was sent")
            if part in wanted:
                taken[part] = tensor.float()
        if isinstance(origin, Sparse):
            if "values" not in taken:
                raise FlexLoraError(f"message has no values of {module}")
            adapter[module] = Sparse(taken["values"], origin.index, origin.shape)
        else:
            B, A = taken.get("B", origin.B), taken.get("A", origin.A)
            if B.dim() != 2 or A.dim() != 2:
                raise FlexLoraError(f"message has factors of {module} that are no matrices")
            if {"A", "B"} <= set(taken) and B.shape[1] != A.shape[0]:
                raise FlexLoraError(f"message has factors of {module} of ranks {B.shape[1]} and {A.shape[0]}")
            # A client that pruned its rank sends fewer directions: the first ones.
            rank = min(B.shape[1], A.shape[0])
            adapter[module] = LowRank(B[:, :rank], A[:rank])
    return adapter


def cast(adapter: Adapter, dtype: torch.dtype) -> dict[str, LowRank | Sparse]:
    """The adapter as it arrives after travelling in `dtype`: rounded, and float32 again."""
    if dtype == torch.float32:
        return dict(adapter)
    return {
        module: x._replace(values=x.values.to(dtype).float())
        if isinstance(x, Sparse)
        else LowRank(x.B.to(dtype).float(), x.A.to(dtype).float())
        for module, x in adapter.items()
    }


def size(adapter: Adapter, parts: Iterable[str] = PARTS, *, dtype: torch.dtype | None = None) -> int:
    """Length in bytes of the message that `encode` makes."""
    return len(encode(adapter, parts, dtype=dtype))


# --- parcels -----------------------------------------------------------------------------------------------------------


class Parcel(NamedTuple):
    """One message between server and client."""

    facts: str
    """A JSON object."""
    adapter: bytes = b""
    """A safetensors message, or nothing."""
    base_delta: bytes = b""
    """A safetensors message, or nothing."""


def downward(rule: ClientRule) -> tuple[str, ...]:
    """Parts that travel to a client: not those that it keeps, which start from zero there."""
    return tuple(part for part in PARTS if part not in rule.keep)


def bytes_down(download: Download, dtype: torch.dtype) -> int:
    """Length of the safetensors messages that carry a download."""
    base = size(download.base_delta, dtype=dtype) if download.base_delta else 0
    return size(download.adapter, downward(download.rule), dtype=dtype) + base


def pack_task(
    task: TrainTask | EvalTask, *, seed: int, dtype: torch.dtype, training: LocalTraining | None = None
) -> Parcel:
    """A task on its way to a client.

    seed: the run's, from which the client derives the places of sparse values. training: settings by which an `EvalTask`
    is scored.
    """
    download, rule = task.download, task.download.rule
    facts: dict[str, Any] = {
        "round": task.round,
        "client": task.client,
        "shapes": {
            module: list(x.shape) if isinstance(x, Sparse) else [x.B.shape[0], x.A.shape[1]]
            for module, x in download.adapter.items()
        },
        "rule": asdict(rule),
        "mask_seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if isinstance(task, TrainTask):
        facts |= {"kind": "train", "ranks": dict(task.ranks), "seed": task.seed, "base": task.base}
        facts["needed"] = list(task.needed)
        facts["training"] = asdict(task.training)
    else:
        assert training is not None
        facts |= {"kind": "evaluate", "examples": task.examples, "training": asdict(training)}
    return Parcel(
        json.dumps(facts),
        encode(download.adapter, downward(rule), dtype=dtype),
        encode(download.base_delta, dtype=dtype) if download.base_delta else b"",
    )


def unpack_task(parcel: Parcel) -> tuple[TrainTask | EvalTask, LocalTraining, torch.dtype]:
    """(task, how to train or score it, type in which the answer travels). Raises FlexLoraError for anything else."""
    try:
        facts = json.loads(parcel.facts)
        rule = _rule(facts["rule"])
        received = decode(parcel.adapter)
        adapter: dict[str, LowRank | Sparse] = {}
        for module, (rows, columns) in facts["shapes"].items():
            if not all(type(size) is int and 0 < size <= LARGEST for size in (rows, columns)):
                raise ValueError(f"{module} cannot have {rows!r} rows and {columns!r} columns")
            got = {part: t.float() for part, t in received[module].items()}
            if "values" in got:
                index = mask(facts["mask_seed"], module, (rows, columns), len(got["values"]))
                adapter[module] = Sparse(got["values"], index, (rows, columns))
            else:
                rank = len(got["A"]) if "A" in got else got["B"].shape[1]
                B, A = got.get("B", torch.zeros(rows, rank)), got.get("A", torch.zeros(rank, columns))
                adapter[module] = LowRank(B, A)
        base = decode(parcel.base_delta) if parcel.base_delta else {}
        base_delta = {module: LowRank(got["B"].float(), got["A"].float()) for module, got in base.items()}
        download = Download(adapter, base_delta, rule)
        training = LocalTraining(**facts["training"])
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[facts["dtype"]]
        number, client = int(facts["round"]), int(facts["client"])
        if facts["kind"] == "evaluate":
            return EvalTask(number, client, download, int(facts["examples"])), training, dtype
        needed = tuple(int(round) for round in facts["needed"])
        task = TrainTask(number, client, facts["ranks"], download, training, facts["seed"], facts["base"], needed)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise FlexLoraError(
            f"the task cannot be read ({type(error).__name__}: {error}); install the server's version of flexlora"
        ) from None
    return task, training, dtype


def _rule(facts: Mapping[str, Any]) -> ClientRule:
    prune = facts["prune"]
    lists = {name: tuple(facts[name]) for name in ("train", "send", "keep")}
    return ClientRule(**lists, prune=None if prune is None else (prune[0], prune[1], prune[2]))


def pack_update(update: ClientUpdate, rule: ClientRule, dtype: torch.dtype) -> Parcel:
    """What leaves a client after training: the parts that the rule sends, a weight, and figures."""
    facts = {
        "kind": "update",
        "client": update.client,
        "weight": update.weight,
        "round": update.round,
        "base": update.base,
        "metrics": dict(update.metrics),
    }
    return Parcel(json.dumps(facts), encode(update.adapter, rule.send, dtype=dtype))


def pack_score(score: ClientScore) -> Parcel:
    return Parcel(json.dumps({"kind": "score", **asdict(score)}))


def pack_failure(failure: ClientFailure) -> Parcel:
    return Parcel(json.dumps({"kind": "failure", **asdict(failure)}))


def unpack_update(parcel: Parcel, task: TrainTask) -> ClientUpdate | ClientFailure:
    """The update as it arrives at the server, parts that did not travel filled in. Raises FlexLoraError for anything else."""
    facts = _answer(parcel, "update")
    if isinstance(facts, str):
        return ClientFailure(task.client, facts)
    rule = task.download.rule
    given = facts.get("metrics")
    metrics = {n: v for n, v in given.items() if n in METRICS and _number(v)} if isinstance(given, dict) else {}
    if not _number(facts.get("weight")):
        raise FlexLoraError("its weight is not a number")
    number, base = facts.get("round"), facts.get("base")
    return ClientUpdate(
        task.client,
        float(facts["weight"]),
        complete(decode(parcel.adapter), task.download.adapter, rule.send),
        sent=task.download.adapter,
        metrics={**metrics, "bytes_up": len(parcel.adapter)},
        round=number if isinstance(number, int) else -1,
        base=base if isinstance(base, str) else "",
    )


def unpack_score(parcel: Parcel, task: EvalTask) -> ClientScore | ClientFailure:
    """A score as it arrives at the server. Raises FlexLoraError for anything else."""
    facts = _answer(parcel, "score")
    if isinstance(facts, str):
        return ClientFailure(task.client, facts)
    figures: list[Any] = [facts.get(name) for name in ("loss_sum", "tokens", "examples")]
    loss, tokens, examples = figures
    counts = isinstance(tokens, int) and isinstance(examples, int) and 0 <= examples <= task.examples
    if not (all(map(_number, figures)) and counts and tokens >= 0 and 0 <= loss < math.inf):
        raise FlexLoraError("its score is not made of finite numbers that fit what was asked")
    return ClientScore(task.client, float(loss), tokens, examples)


def _answer(parcel: Parcel, kind: str) -> dict[str, Any] | str:
    """The facts of an answer of this kind, or the reason why the client has none, on one line."""
    try:
        facts = json.loads(parcel.facts)
    except (ValueError, RecursionError):
        raise FlexLoraError("its answer is not JSON") from None
    if not isinstance(facts, dict) or facts.get("kind") not in (kind, "failure"):
        raise FlexLoraError(f"its answer is no {kind}")
    if facts["kind"] == "failure":
        return one_line(facts.get("reason"))
    return facts


def one_line(text: Any, most: int = 500) -> str:
    """What somebody else says, on one line of `most` characters."""
    return printable(" ".join(str(text).split()))[:most]


def _number(x: Any) -> bool:
    return isinstance(x, float) or (isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**53)
