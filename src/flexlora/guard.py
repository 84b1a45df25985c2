"""Checks on what a client sent, before anything is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from flexlora import lowrank
from flexlora.types import ClientFailure, ClientUpdate, LowRank, Sparse, TrainTask

MEMORY = 256
"""Norms of accepted increments that are remembered."""


def increment(update: ClientUpdate) -> dict[str, LowRank | Sparse]:
    """What the client changed: trained minus sent, factored, exact."""
    assert update.sent is not None
    changed: dict[str, LowRank | Sparse] = {}
    for module, x in update.adapter.items():
        origin = update.sent[module]
        if isinstance(x, Sparse) or isinstance(origin, Sparse):
            assert isinstance(x, Sparse)
            assert isinstance(origin, Sparse)
            changed[module] = x._replace(values=x.values - origin.values)
        else:
            changed[module] = lowrank.stack([x, origin], [1.0, -1.0])
    return changed


def increment_norm(update: ClientUpdate) -> float:
    """Frobenius norm of the increment over all modules."""
    squares = [
        x.values.double().square().sum() if isinstance(x, Sparse) else lowrank.norm(x).square()
        for x in increment(update).values()
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def examine(
    update: ClientUpdate, task: TrainTask, *, norms: Sequence[float], max_examples: int | None
) -> ClientUpdate | ClientFailure:
    """The update, its weight capped at max_examples, or the reason why it is rejected."""
    sent = task.download.adapter
    if set(update.adapter) != set(sent):
        return ClientFailure(task.client, "rejected: other modules than it was sent")
    for module, x in update.adapter.items():
        origin = sent[module]
        tensors = tuple(t for t in x if isinstance(t, torch.Tensor) and t.is_floating_point())
        if type(x) is not type(origin):
            return ClientFailure(task.client, f"rejected: {module} has another form than it was sent")
        if isinstance(x, LowRank) and isinstance(origin, LowRank):
            rank = x.A.shape[0]
            if (
                rank > origin.A.shape[0]
                or x.A.shape != (rank, origin.A.shape[1])
                or x.B.shape != (origin.B.shape[0], rank)
            ):
                shapes = f"{tuple(x.B.shape)} and {tuple(x.A.shape)}"
                return ClientFailure(
                    task.client, f"rejected: {module} has shapes {shapes}, not those of its assignment"
                )
        elif isinstance(x, Sparse) and isinstance(origin, Sparse) and x.values.shape != origin.values.shape:
            return ClientFailure(task.client, f"rejected: {module} has {tuple(x.values.shape)} values")
        if not all(bool(torch.isfinite(t).all()) for t in tensors):
            return ClientFailure(task.client, f"rejected: {module} has values that are not finite")
    if not 0 < update.weight < float("inf"):
        return ClientFailure(task.client, f"rejected: weight {update.weight} is not a positive number")
    if max_examples is not None and update.weight > max_examples:
        return replace(update, weight=float(max_examples))
    return update
