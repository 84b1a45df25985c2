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
from typing import NamedTuple

import torch
from torch import Tensor

from flexlora.adapted import Factors, dropout_from
from flexlora.attention import Between
from flexlora.cores import each
from flexlora.likelihood import negative_log_likelihood
from flexlora.logits import bare_head, said
from flexlora.modeling import Model, scalings
from flexlora.randomness import derive, generator
from flexlora.rows import LANE, Rows, Tokens, collate, common_beginning, fill, halved, halves, label_tokens
from flexlora.types import Adapter, ClientUpdate, LocalTraining, LowRank, TrainTask

MAX_GRAD_NORM = 1.0
GROUP = 8
"""Batches that group_by_length sorts together: lengths are alike inside a batch, order and company stay random."""


def loss_sum(model: Model, rows: Rows, between: Between | None = None) -> Tensor:
    """Negative log likelihood in nats, summed over the labels of one pass, or of one half of a row."""
    states, head = said(model.network, rows, between)
    return negative_log_likelihood(states, rows.labels, rows.weights, head)


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
    scales = scalings(task.download.adapter, training.alpha, training.scaling)
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
        # Found out while nothing else passes through the network.
        bare_head(model.network)
        cut = model.halves_rows
        with _seeded(model, derive(task.seed, "dropout")):
            for step, chosen in enumerate(steps):
                count = sum(labels[i] for i in chosen)
                if count:
                    batch = [examples[i] for i in chosen]
                    losses.append(_backward(model, batch, count, training, derive(task.seed, step), cut))
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


def _backward(
    model: Model, chosen: Sequence[Tokens], count: int, training: LocalTraining, seed: int, cut: bool
) -> float:
    """Add the gradients of one batch, pass after pass; returns its loss.

    Where the examples begin alike (a task's definition), as many as fit into micro_batch_size · cutoff_len tokens share a
    row, and dropout's draw for the beginning; no more than micro_batch_size examples of their own would hold, or one lane, and
    no more than two lanes (a mask is of the row's length squared). Otherwise micro_batch_size examples of like lengths go together.
    Where there are two cores each takes half of the examples, or, where rows may be `cut`, half of what is one row. Dropout draws the
    same on one core.
    """
    chosen = sorted(chosen, key=lambda x: -len(x.input_ids))
    inputs, most = training.train_on_inputs, training.micro_batch_size
    beginning = common_beginning(chosen, inputs) if model.shares_rows else 0
    if beginning:
        asked_for = max(most * len(chosen[0].input_ids), LANE)
        room = min(most * training.cutoff_len, asked_for, max(training.cutoff_len, 2 * LANE))
        passes = [[part] for part in fill(chosen, beginning, room)]
    else:
        cuts = [chosen[a : a + most] for a in range(0, len(chosen), most)]
        passes = [halved(x) if model.side_by_side else [x] for x in cuts]
    total = torch.zeros((), device=model.device)
    for a, parts in enumerate(passes):
        rows = [collate(part, inputs, model.device, beginning=beginning) for part in parts]
        rows = [x for x in rows if len(x.labels)]
        pair = halves(rows[0]) if len(rows) == 1 and cut else rows
        draws = [generator(seed, "dropout", a, i) for i in range(len(pair))]
        if len(pair) > len(rows) and torch.get_num_threads() < 2:
            lanes = [_Lane(rows[0], draws[0], draws[1])]
        else:
            lanes = [_Lane(x, draw) for x, draw in zip(pair, draws, strict=True)]
        total += _add_gradients(model, lanes)
    # Only now: what goes back through a network in float16 would be too small for it.
    for leaf in model.trainable():
        if leaf.grad is not None:
            leaf.grad.div_(count)
    return total.item() / count


class _Lane(NamedTuple):
    rows: Rows
    draws: torch.Generator
    """What dropout on a processor draws from: lanes may run side by side."""
    second: torch.Generator | None = None
    """What the second half of a row draws from that could be cut and is not."""


def _add_gradients(model: Model, lanes: Sequence[_Lane]) -> Tensor:
    """Add to the gradients those of one pass, lane by lane, side by side where there are cores; returns its summed loss.

    They are summed in the order of the lanes, so that it does not matter by one bit which is done first. Halves of a row need two
    cores, as they wait for each other.
    """
    between = Between() if any(x.rows.shared and x.rows.shared.before for x in lanes) else None

    def loss_of(lane: _Lane) -> Tensor:
        with dropout_from(lane.draws, lane.second, lane.rows.input_ids.shape[1]):
            return loss_sum(model, lane.rows, between)

    total, cores = torch.zeros((), device=model.device), torch.get_num_threads()
    if min(cores, len(lanes)) < 2:
        for lane in lanes:
            loss = loss_of(lane)
            loss.backward()
            total += loss.detach()
        return total
    leaves = model.trainable()

    def gradients(lane: _Lane) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        try:
            loss = loss_of(lane)
            found = loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)
            if between and lane is lanes[-1]:
                between.end(RuntimeError("the second half of a row had no gradient for the first"))
            return found
        except BaseException as error:
            if between:
                between.end(error)
            raise

    try:
        done = each(gradients, lanes, threads=max(1, cores // len(lanes)), stop=between.end if between else None)
    finally:
        if between:
            between.forget()
    for loss, found in done:
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
