"""Local training: what one client does in one round.

The loss of an optimiser step is the negative log likelihood summed over the label tokens of its batch, divided by the
number of label tokens of the WHOLE batch, so that neither micro-batches nor padding change it. The learning rate goes
linearly up over `warmup` steps and linearly down to zero over the rest, inside this local run, and gradients are
clipped to norm 1: the defaults of `transformers.Trainer`, as are AdamW's (betas .9 and .999, eps 1e-8, no decay).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexlora.adapted import Factors, dropout_from
from flexlora.cores import each
from flexlora.likelihood import negative_log_likelihood
from flexlora.modeling import Model, scaling
from flexlora.prefix import Prefix
from flexlora.randomness import derive, generator
from flexlora.types import Adapter, ClientUpdate, LocalTraining, LowRank, TrainTask

MAX_GRAD_NORM = 1.0
GROUP = 8
"""Batches that group_by_length sorts together: lengths are alike inside a batch, order and company stay random."""

MIN_SAVED = 64
"""Tokens that a shared prefix must save in a batch: it costs one more pass through the layers."""

LANE = 512
"""Tokens from which a part of a micro-batch gets a core of its own: halves side by side wait for one another once, threads
inside every operation some thousand times."""
PAIR = 96
"""Tokens from which there are at least two such parts: their products are slower, but still better than waiting."""


class Tokens(Protocol):
    """One tokenised example, as `flexlora.prompts.Encoded`."""

    @property
    def input_ids(self) -> tuple[int, ...]: ...
    @property
    def response_start(self) -> int: ...
    @property
    def cut(self) -> int: ...


class MicroBatch(NamedTuple):
    """Examples of one forward pass, padded on the right: no token sees the padding, so there is no mask."""

    input_ids: Tensor
    """(examples, length)"""
    keep: Tensor
    """(n,) positions in the flattened input whose next token is a label, ascending."""
    labels: Tensor
    """(n,)"""


def collate(
    examples: Sequence[Tokens], train_on_inputs: bool, device: torch.device | str = "cpu", *, skip: int = 0
) -> MicroBatch:
    """Labels are the response tokens, with `train_on_inputs` all tokens but the first, which nothing predicts.

    The first `skip` tokens of every example are left out: a prefix that `shared_prefix` found.
    """
    length = max(len(x.input_ids) for x in examples) - skip
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    keep: list[Tensor] = []
    labels: list[Tensor] = []
    for row, x in enumerate(examples):
        ids = torch.tensor(x.input_ids[skip:], dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        first = 1 if train_on_inputs else max(1, x.response_start - skip)
        labels.append(ids[first:])
        keep.append(torch.arange(first, len(ids)) + (row * length - 1))
    parts = (input_ids, torch.cat(keep), torch.cat(labels))
    if torch.device(device).type == "cuda":  # pinned: the copy runs beside the work that is queued
        return MicroBatch(*(x.pin_memory().to(device, non_blocking=True) for x in parts))
    return MicroBatch(*(x.to(device) for x in parts))


def shared_prefix(examples: Sequence[Tokens], train_on_inputs: bool) -> int:
    """How many leading tokens need computing only once for all of `examples`; 0 where that saves little.

    What is left of each example predicts its own labels: at least one token, and one before the response.
    """
    least, most = min(x.input_ids for x in examples), max(x.input_ids for x in examples)
    common = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    end = common if train_on_inputs else min(common, *(x.response_start for x in examples))
    share = max(0, end - 1)
    return share if share * (len(examples) - 1) >= MIN_SAVED else 0


def halved(examples: Sequence[Tokens], *, skip: int = 0, least: int | None = None) -> list[Sequence[Tokens]]:
    """Cut examples, longest first, into two parts of like padded size where there are 2 · `PAIR` tokens or more, and a part again
    where it has 2 · `least` (`LANE`) or more.

    The parts follow from the lengths alone, not from the number of cores. The first `skip` tokens do not count.
    """
    sizes = [len(x.input_ids) - skip for x in examples]
    if len(sizes) < 2 or len(sizes) * sizes[0] < 2 * (least or PAIR):
        return [examples]
    cut = min(range(1, len(sizes)), key=lambda i: max(i * sizes[0], (len(sizes) - i) * sizes[i]))
    return [part for half in (examples[:cut], examples[cut:]) for part in halved(half, skip=skip, least=LANE)]


def label_tokens(example: Tokens, train_on_inputs: bool) -> int:
    return len(example.input_ids) - (1 if train_on_inputs else max(1, example.response_start))


def loss_sum(model: Model, batch: MicroBatch, prefix: Prefix | None = None) -> Tensor:
    """Negative log likelihood in nats, summed over the labels of one micro-batch."""
    logits = model.logits(batch.input_ids, batch.keep, prefix)
    return negative_log_likelihood(logits, batch.labels)


def batches(lengths: Sequence[int], training: LocalTraining, seed: int) -> list[list[int]]:
    """Which examples each optimiser step sees, epoch after epoch; the last batch of an epoch may be smaller."""
    size, steps = training.batch_size, []
    for epoch in range(training.epochs):
        draw = generator(seed, "order", epoch)
        order = torch.randperm(len(lengths), generator=draw).tolist()
        if training.group_by_length:
            span = GROUP * size
            order = [
                i for a in range(0, len(order), span) for i in sorted(order[a : a + span], key=lambda i: -lengths[i])
            ]
        cuts = [order[a : a + size] for a in range(0, len(order), size)]
        if training.group_by_length:
            cuts = [cuts[j] for j in torch.randperm(len(cuts), generator=draw).tolist()]
        steps += cuts
    return steps


def learning_rate(step: int, steps: int, training: LocalTraining) -> float:
    """Rate of optimiser step `step` (from 0) of `steps`: transformers' linear schedule with warm-up."""
    if step < training.warmup:
        return training.learning_rate * step / training.warmup
    return training.learning_rate * max(0, steps - step) / max(1, steps - training.warmup)


def train_client(
    model: Model,
    task: TrainTask,
    examples: Sequence[Tokens],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ClientUpdate:
    """Train the adapter of `task` on a client's examples; the model is bare again afterwards.

    `progress` is called with (steps done, steps) after every optimiser step. The result depends on the task alone:
    order and dropout come from its seed, and the global random state is left as it was. Raises ValueError where there
    is no example or no label token.
    """
    start = time.perf_counter()
    training, rule = task.training, task.download.rule
    labels = [label_tokens(x, training.train_on_inputs) for x in examples]
    if not sum(labels):
        raise ValueError(f"client {task.client} has no training example with a label token")
    scales = {
        m: scaling(training.alpha, len(x.A), training.scaling)
        for m, x in task.download.adapter.items()
        if isinstance(x, LowRank)
    }
    model.attach(
        task.download.adapter,
        base_delta=task.download.base_delta,
        scaling=scales,
        dropout=training.dropout,
        train=rule.train,
    )
    steps = batches([len(x.input_ids) for x in examples], training, task.seed)
    tails = _Tails(model.factors(), rule.prune) if rule.prune else None
    optimizer = _optimizer(model.trainable(), training)
    losses: list[float] = []
    try:
        with _seeded(model, derive(task.seed, "dropout")):
            for step, chosen in enumerate(steps):
                count = sum(labels[i] for i in chosen)
                if count:
                    losses.append(
                        _backward(model, [examples[i] for i in chosen], count, training, derive(task.seed, step))
                    )
                if tails:
                    tails.penalty().backward()
                _step(optimizer, learning_rate(step, len(steps), training))
                if progress:
                    progress(step + 1, len(steps))
        adapter = model.read()
        if tails:
            adapter = tails.cut(adapter)
    finally:
        model.detach()
    metrics = {
        "train_loss": sum(losses) / len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "examples": len(examples),
        "steps": len(steps),
        "tokens": training.epochs * sum(len(x.input_ids) for x in examples),
        "label_tokens": training.epochs * sum(labels),
        "cut": sum(x.cut for x in examples),
        "cut_examples": sum(x.cut > 0 for x in examples),
        "seconds": time.perf_counter() - start,
    }
    return ClientUpdate(task.client, float(len(examples)), adapter, scaling=scales, metrics=metrics)


def _backward(model: Model, chosen: Sequence[Tokens], count: int, training: LocalTraining, seed: int) -> float:
    """Add the gradients of one batch, micro-batch after micro-batch of like lengths; returns its loss.

    What all examples of the batch begin with (a task's definition) is computed once, forward and backward; with
    dropout they share its draw there.
    """
    chosen = sorted(chosen, key=lambda x: -len(x.input_ids))
    inputs, device = training.train_on_inputs, model.device
    total = torch.zeros((), device=device)
    share = shared_prefix(chosen, inputs) if model.shares_prefix and len(chosen) > 1 else 0
    prefix = prefix_loss = None
    if share:
        ids = torch.tensor(chosen[0].input_ids[: share + 1], device=device)
        keep = torch.arange(share if inputs else 0, device=device)
        prefix, logits = model.read_prefix(ids[:-1], keep)
        if inputs:
            prefix_loss = negative_log_likelihood(logits, ids[1:]) * (len(chosen) / count)
            total += prefix_loss.detach()
    for a in range(0, len(chosen), training.micro_batch_size):
        micro = chosen[a : a + training.micro_batch_size]
        lanes = [
            _Lane(collate(lane, inputs, device, skip=share), generator(seed, "dropout", a, i))
            for i, lane in enumerate(halved(micro, skip=share) if model.side_by_side else [micro])
        ]
        total += _add_gradients(model, [x for x in lanes if len(x.batch.labels)], prefix, count)
    if prefix:
        prefix.backward(prefix_loss)
    return total.item()


class _Lane(NamedTuple):
    batch: MicroBatch
    draws: torch.Generator
    """What dropout on a processor draws from: lanes may run side by side."""


def _add_gradients(model: Model, lanes: Sequence[_Lane], prefix: Prefix | None, count: int) -> Tensor:
    """Add to the gradients those of one micro-batch, lane by lane, side by side where there are cores; returns its loss.

    They are summed in the order of the lanes, so that it does not matter by one bit which is done first.
    """

    def loss_of(lane: _Lane) -> Tensor:
        with dropout_from(lane.draws):
            return loss_sum(model, lane.batch, prefix) / count

    total, cores = torch.zeros((), device=model.device), torch.get_num_threads()
    if min(cores, len(lanes)) < 2:
        for lane in lanes:
            loss = loss_of(lane)
            loss.backward()
            total += loss.detach()
        return total
    leaves = [*model.trainable(), *(prefix.leaves if prefix else ())]

    def gradients(lane: _Lane) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        loss = loss_of(lane)
        return loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)

    for loss, found in each(gradients, lanes, threads=max(1, cores // len(lanes))):
        total += loss
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)
    return total


def _optimizer(parameters: list[Tensor], training: LocalTraining) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=training.learning_rate)
    return torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0, fused=True)


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    (group,) = optimizer.param_groups
    torch.nn.utils.clip_grad_norm_(group["params"], MAX_GRAD_NORM)
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _seeded(model: Model, seed: int) -> Iterator[None]:
    """Training mode, with the global generators at `seed` and restored afterwards: dropout takes no generator."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.network.train()
        try:
            yield
        finally:
            model.network.eval()


class _Tails:
    """HetLoRA's self-pruning (arXiv 2401.06432): the directions from ⌊γr⌋ on are penalised and dropped if they fade.

    The product of norms is of PEFT's lora_B, without the scaling; the choice whether it shrank does not depend on it.
    """

    def __init__(self, factors: Mapping[str, Factors], prune: tuple[float, float, int]) -> None:
        self.weight, gamma, self.smallest = prune
        self.factors = {m: (x, int(gamma * len(x.A) + 1e-9)) for m, x in factors.items() if len(x.A)}
        with torch.no_grad():
            self.before = self._products()

    def _products(self) -> dict[str, Tensor]:
        return {m: x.B[:, k:].norm() * x.A[k:].norm() for m, (x, k) in self.factors.items()}

    def penalty(self) -> Tensor:
        """λ Σ ‖B[:, ⌊γr⌋:]‖_F ‖A[⌊γr⌋:, :]‖_F over the modules."""
        return self.weight * torch.stack(list(self._products().values())).sum()

    def cut(self, adapter: Adapter) -> Adapter:
        """`adapter` with r ← max(smallest, ⌊γr⌋) in the modules whose product is smaller than before training."""
        with torch.no_grad():
            after = self._products()
        result = dict(adapter)
        for module, (factors, k) in self.factors.items():
            x = adapter[module]
            assert isinstance(x, LowRank)
            if after[module] < self.before[module]:
                r = min(len(factors.A), max(self.smallest, k))
                result[module] = LowRank(x.B[:, :r].clone(), x.A[:r].clone())
        return result
