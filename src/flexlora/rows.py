"""Examples as the rows of one forward pass.

Rows are padded on the right with anything: no token sees what comes after it, so there is no mask. Examples that begin
with the same tokens (a task's definition) may stand in ONE row instead, in which the beginning is computed once. A row
can be cut in two, for two cores: the second half sees the first, layer by layer.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

WORTH = 7
"""A common beginning is shared where that saves one token in so many of the row's: one row keeps cores waiting for one
another more than two rows side by side do."""
LANE = 512
"""Tokens from which a part of a pass gets a core of its own: halves side by side wait for one another once, threads
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


class Shared(NamedTuple):
    """How several sequences with a common beginning lie in one row: the beginning, then what each has of its own.

    Of a row that was cut in two, `halves` says how either half lies.
    """

    beginning: int
    """Tokens; none only where all follow others."""
    own: tuple[int, ...]
    """Tokens of each sequence after the beginning, in the order of the row."""
    before: int = 0
    """Tokens in front of the beginning, which all see and which are not in the row: the first ones of the half that leads."""
    cut_off: int = 0
    """Tokens of the first sequence that are not in the row either: the last ones of that half."""

    def parts(self) -> list[slice]:
        """Where each sequence's own tokens lie in the row."""
        ends = list(itertools.accumulate(self.own, initial=self.beginning))
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """(1, length): where each token stands in its own sequence."""
        start = self.before + self.beginning
        parts = [(self.before, self.beginning), *((start + self.cut_off * (not i), n) for i, n in enumerate(self.own))]
        return torch.cat([torch.arange(a, a + n, device=device) for a, n in parts])[None]

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(1, 1, length, before + cut_off + length) bool: which tokens (last) each token (third) sees."""
        sizes = torch.tensor([self.beginning, *self.own], device=device)
        whose = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        seen = (whose[None] == whose[:, None]) | (whose == 0)[None]
        first = (whose == 1)[:, None].expand(-1, self.cut_off)
        return torch.cat([seen.new_ones(len(whose), self.before), first, seen.tril_()], 1)[None, None]


class Rows(NamedTuple):
    """The input of one forward pass and the labels in it."""

    input_ids: Tensor
    """(rows, length)"""
    keep: Tensor
    """(n,) positions in the flattened input whose next token is a label, ascending."""
    labels: Tensor
    """(n,)"""
    shared: Shared | None = None
    """Where there is one row for all: how they lie in it."""
    weights: Tensor | None = None
    """(n,) float32: how many examples a label belongs to, where it is not one for all."""


def first_label(example: Tokens, train_on_inputs: bool) -> int:
    """Labels are the response tokens, with `train_on_inputs` all tokens but the first, which nothing predicts."""
    return 1 if train_on_inputs else max(1, example.response_start)


def label_tokens(example: Tokens, train_on_inputs: bool) -> int:
    """Number of tokens of an example that are labels."""
    return len(example.input_ids) - first_label(example, train_on_inputs)


def collate(
    examples: Sequence[Tokens], train_on_inputs: bool, device: torch.device | str = "cpu", *, beginning: int = 0
) -> Rows:
    """A row for each example; with a common `beginning`, as `common_beginning` finds it, one row for all."""
    if beginning and len(examples) > 1:
        return _one_row(examples, beginning, train_on_inputs, device)
    length = max(len(x.input_ids) for x in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    keep: list[Tensor] = []
    labels: list[Tensor] = []
    for row, x in enumerate(examples):
        ids = torch.tensor(x.input_ids, dtype=torch.long)
        input_ids[row, : len(ids)] = ids
        first = first_label(x, train_on_inputs)
        labels.append(ids[first:])
        keep.append(torch.arange(first, len(ids)) + (row * length - 1))
    ids, positions, targets = _sent(device, input_ids, torch.cat(keep), torch.cat(labels))
    return Rows(ids, positions, targets)


def _one_row(examples: Sequence[Tokens], beginning: int, train_on_inputs: bool, device: torch.device | str) -> Rows:
    """With `train_on_inputs` the beginning predicts labels that all examples have: they come first, `beginning` in number.

    That needs one more token in common, which each example has for itself: it predicts the first label of its own.
    """
    head = torch.tensor(examples[0].input_ids[: beginning + 1], dtype=torch.long)
    common = beginning if train_on_inputs else 0
    tokens, keep, labels = [head[:-1]], [torch.arange(common)], [head[1 : common + 1]]
    at = beginning
    for x in examples:
        ids = torch.tensor(x.input_ids[beginning:], dtype=torch.long)
        first = max(1, first_label(x, train_on_inputs) - beginning)
        tokens.append(ids)
        keep.append(torch.arange(first, len(ids)) + (at - 1))
        labels.append(ids[first:])
        at += len(ids)
    ids, positions, targets = _sent(device, torch.cat(tokens)[None], torch.cat(keep), torch.cat(labels))
    weights = None
    if common:
        weights = torch.ones(len(targets), device=device)
        weights[:common] = len(examples)
    shared = Shared(beginning, tuple(len(x.input_ids) - beginning for x in examples))
    return Rows(ids, positions, targets, shared, weights)


def halves(rows: Rows) -> list[Rows]:
    """One row, cut in the middle for two cores: the second half follows the first and sees of it what its tokens saw.

    As it is where there are several rows or fewer than 2 · `PAIR` tokens. One half may be without labels.
    """
    length = rows.input_ids.shape[1]
    if len(rows.input_ids) > 1 or length < 2 * PAIR:
        return [rows]
    beginning, own, *_ = rows.shared or Shared(length, ())
    cut = length // 2
    seen = min(cut, beginning)
    ends = list(itertools.accumulate(own, initial=beginning))
    whole = max(0, bisect.bisect_right(ends, cut) - 1)  # sequences in front of the cut
    cut_off = cut - ends[whole] if cut > beginning else 0
    lead = (*own[:whole], cut_off) if cut_off else own[:whole]
    follow = (own[whole] - cut_off, *own[whole + 1 :]) if own else ()
    label = int(torch.searchsorted(rows.keep, cut))
    weights = (None, None) if rows.weights is None else (rows.weights[:label], rows.weights[label:])
    return [
        Rows(rows.input_ids[:, :cut], rows.keep[:label], rows.labels[:label], Shared(seen, lead), weights[0]),
        Rows(
            rows.input_ids[:, cut:],
            rows.keep[label:] - cut,
            rows.labels[label:],
            Shared(beginning - seen, follow, seen, cut_off),
            weights[1],
        ),
    ]


def _sent(device: torch.device | str, *parts: Tensor) -> list[Tensor]:
    if torch.device(device).type == "cuda":  # pinned: the copy runs beside the work that is queued
        return [x.pin_memory().to(device, non_blocking=True) for x in parts]
    return [x.to(device) for x in parts]


def common_beginning(examples: Sequence[Tokens], train_on_inputs: bool) -> int:
    """How many leading tokens `collate` may compute only once for `examples`; 0 where that saves little.

    What is left of each example predicts its own labels: at least one token, and one before the response.
    """
    if len(examples) < 2:
        return 0
    least, most = min(x.input_ids for x in examples), max(x.input_ids for x in examples)
    common = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))
    end = common if train_on_inputs else min(common, *(x.response_start for x in examples))
    share = max(0, end - 1)
    saved = share * (len(examples) - 1)
    return share if share and saved * (WORTH + 1) >= sum(len(x.input_ids) for x in examples) else 0


def fill(examples: Sequence[Tokens], beginning: int, most: int) -> list[Sequence[Tokens]]:
    """Cut examples, in their order, into as few rows of at most `most` tokens as can be, or of one example, of like lengths."""
    sizes = [len(x.input_ids) - beginning for x in examples]

    def cuts(most: int) -> list[int]:
        """Where rows begin that hold as much as they can."""
        found, room = [], 0
        for i, own in enumerate(sizes):
            if own > room:
                found.append(i)
                room = most - beginning
            room -= own
        return found

    few = len(cuts(most))
    least = bisect.bisect_left(range(most), True, key=lambda room: len(cuts(room)) <= few)
    return [examples[a:b] for a, b in itertools.pairwise([*cuts(least), len(sizes)])]


def halved(examples: Sequence[Tokens], *, least: int | None = None) -> list[Sequence[Tokens]]:
    """Cut examples, longest first, into two parts of like padded size where there are 2 · `PAIR` tokens or more, and a part again
    where it has 2 · `least` (`LANE`) or more.

    The parts follow from the lengths alone, not from the number of cores.
    """
    sizes = [len(x.input_ids) for x in examples]
    if len(sizes) < 2 or len(sizes) * sizes[0] < 2 * (least or PAIR):
        return [examples]
    cut = min(range(1, len(sizes)), key=lambda i: max(i * sizes[0], (len(sizes) - i) * sizes[i]))
    return [part for half in (examples[:cut], examples[cut:]) for part in halved(half, least=LANE)]
