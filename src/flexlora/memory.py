"""How much memory a client needs to train at given ranks, and the largest ranks that it can afford.

Nothing is guessed from formulas of an architecture: one forward pass of the real network runs on fake tensors, which
have shapes and no data, and what autograd keeps for the backward pass is added up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flexlora import nf4
from flexlora.likelihood import PIECE
from flexlora.modeling import Model
from flexlora.prompts import Encoded
from flexlora.ranks import RankPlan, resolve
from flexlora.rows import PAIR, Rows, halved
from flexlora.training import loss_sum
from flexlora.types import FlexLoraError, LowRank, Ranks

ADAPTER_COPIES = 3
"""What was sent, what is trained, and what is read off in the end."""

PROCESS = 420 * 2**20
"""Bytes of a Python process with torch and transformers in it, on the CPU, measured."""

LOST = 0.3
"""What the way back and gaps between blocks of the heap add to the activations, measured (benchmarks/memory.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of local training, by what they are for."""

    weights: int
    adapters: int
    """Factors in float32, with the copies of what was sent and what is sent back, and their gradients."""
    optimizer: int
    activations: int
    """What forward passes keep for the backward passes, of what trains at the same time."""
    process: int = PROCESS

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.optimizer + self.activations + self.process


@dataclass(frozen=True)
class Workload:
    """What decides the memory of local training besides model and ranks; keys as in the configuration."""

    micro_batch_size: int = 2
    cutoff_len: int = 512
    optimizer: Literal["sgd", "adamw"] = "adamw"
    dropout: float = 0.05


def training_memory(model: Model, ranks: Ranks, work: Workload) -> Memory:
    """The peak while a client trains at `ranks`: every example of `cutoff_len` tokens, each of them a label.

    `model` is one of `flexlora.modeling.empty_model`; it is bare again afterwards.
    """
    mode: Any = next(model.network.parameters()).fake_mode  # pyright: ignore[reportAttributeAccessIssue]
    with mode:
        return _training_memory(model, ranks, work)


def _training_memory(model: Model, ranks: Ranks, work: Workload) -> Memory:
    adapter = {
        module: LowRank(torch.empty(d_out, ranks[module]), torch.empty(ranks[module], d_in))
        for module, (d_out, d_in) in model.shapes.items()
        if module in ranks
    }
    model.attach(adapter, dropout=work.dropout, train=("A", "B"))
    model.network.train()
    try:
        kept = _kept(model, work)
    finally:
        model.network.eval()
        model.detach()
    factors = sum(x.numel() * 4 for pair in adapter.values() for x in pair)
    sizes = {id(p): p.numel() * p.element_size() for p in model.network.parameters()}
    unpacked = 0
    if model.packed:  # four bits and their scales, and the one weight that is unpacked at a time
        linear = [layer.weight for layer in model.packable()]
        unpacked = max(sizes[id(p)] for p in linear)
        sizes |= {id(p): round(p.numel() * nf4.BITS / 8) for p in linear}
    weights = sum(sizes.values()) + unpacked
    lanes = _at_once(model, work)
    return Memory(
        weights=weights,
        adapters=(ADAPTER_COPIES + (1 + len(lanes) if len(lanes) > 1 else 1)) * factors,
        optimizer=2 * factors if work.optimizer == "adamw" else 0,
        activations=round((1 + LOST) * kept),
    )


def _at_once(model: Model, work: Workload) -> list[int]:
    """Tokens in each of the lanes that train at the same time: two at most, as with two cores."""
    example = Encoded((0,) * work.cutoff_len, 0, 0)
    examples = [example] * work.micro_batch_size
    lanes = halved(examples) if model.side_by_side else [examples]
    if len(examples) == 1 and work.cutoff_len >= 2 * PAIR and model.side_by_side and model.shares_rows:
        return [work.cutoff_len // 2, work.cutoff_len - work.cutoff_len // 2]
    return sorted(len(x) * work.cutoff_len for x in lanes)[-2:]


def _kept(model: Model, work: Workload) -> int:
    """Bytes that autograd keeps of what is trained at the same time, and of the logits there; weights are not counted."""
    lanes = _at_once(model, work)
    tokens = sum(lanes)
    ids = torch.zeros(tokens // work.cutoff_len, work.cutoff_len, dtype=torch.long)
    # The last token of an example predicts nothing; it is left in for a round figure.
    everything = torch.arange(tokens)
    own = {x.untyped_storage()._cdata for x in model.network.parameters()} | {
        x.untyped_storage()._cdata for x in model.trainable()
    }
    held: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in own:
            held[key] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = loss_sum(model, Rows(ids, everything, torch.zeros(tokens, dtype=torch.long)))
    del loss
    vocabulary = len(model.network.get_output_embeddings().weight)
    pieces = sum(min(n, PIECE) for n in lanes) * vocabulary * 4
    return sum(x.untyped_storage().nbytes() for x in held.values()) + pieces


def type_memories(model: Model, plan: RankPlan, work: Workload) -> dict[str, Memory]:
    """Rank type -> what it needs, smallest first."""
    needed = {name: training_memory(model, resolve(rows, model.shapes)[0], work) for name, rows in plan.types.items()}
    return dict(sorted(needed.items(), key=lambda pair: pair[1].total))


def affordable(memories: Mapping[str, Memory], budget: int) -> str | None:
    """The name of the largest that fits `budget` bytes; `memories` go from small to large. None: not even the first."""
    return next((name for name in reversed(list(memories)) if memories[name].total <= budget), None)


UNITS = ("", "K", "M", "G", "T")


def read_bytes(text: Any) -> int:
    """Bytes of a size for people: 8GB, 8 GiB, 500M, 1.5g, or plain bytes. Raises FlexLoraError where it is no size.

    Units are powers of ten, as in what is printed, and of two with an i: 1 GB = 1 G = 10⁹, 1 GiB = 1 Gi = 2³⁰.
    """
    found = re.fullmatch(r"(.+?)\s*(?:([KMGT])(I?))?B?", str(text).strip().upper())
    try:
        size = float(found[1]) * (1024 if found[3] else 1000) ** UNITS.index(found[2] or "") if found else 0.0
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise FlexLoraError(f"memory: {text!r} is no size; write one as 8GB, 8GiB or 500MB")
    return int(size)
