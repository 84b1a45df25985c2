"""Greedy decoding of many prompts at once, on the processor's terms: little padding, no prompt token read twice.

Rows of a batch are independent: each holds its keys and values in its own slots, the token at position p in slot p.
So a row that has finished leaves at once, another takes its place, and prompts that begin alike (the chat preamble,
the instruction of one task) have their common beginning read once and copied. The tokens are those of greedy
`network.generate` without logits processors, one prompt at a time, up to rounding where two tokens are equally likely.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flexlora import attention
from flexlora.batching import Chunk, common, plan
from flexlora.likelihood import token_nll
from flexlora.logits import likeliest_tokens, logits_at, pass_tokens


class _Slots(Cache):
    """Keys and values of the rows in flight, (row, head, slot, d) for each layer."""

    def __init__(self, rows: int, length: int) -> None:
        super().__init__(layers=[])
        self.rows, self.length = rows, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def at(self, first: int, positions: Tensor, width: int) -> _Slots:
        """Aim the next forward pass at rows first, first+1, …: their tokens have `positions` (b, t) < `width`."""
        self._rows = slice(first, first + len(positions))
        self._index = torch.arange(first, first + len(positions), device=positions.device)[:, None]
        self._positions, self._width = positions, width
        return self

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self.keys):
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                store.append(states.new_zeros(self.rows, states.shape[1], self.length, states.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self._index, :, self._positions] = key_states.transpose(1, 2)
        values[self._index, :, self._positions] = value_states.transpose(1, 2)
        return keys[self._rows, :, : self._width], values[self._rows, :, : self._width]

    def copy(self, source: int, target: slice, width: int) -> None:
        """Copy the first `width` slots of row `source` to the rows of `target`."""
        for store in (*self.keys, *self.values):
            store[target, :, :width] = store[source, :, :width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._width

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._width, 0


def has_slots(network: nn.Module) -> bool:
    """Whether `network` attends to everything before a token and takes positions and a mask for each row."""
    config = network.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    neo_layers = getattr(config, "attention_layers", None) or ["global"]  # GPT-Neo's name and words for them
    return (
        set(layers) == {"full_attention"}
        and set(neo_layers) == {"global"}
        and (not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True))
        and not getattr(config, "alibi", False)
        and not getattr(network, "_is_stateful", False)
        and getattr(config, "_attn_implementation", None) in (attention.NAME, "sdpa", "eager")
        and {"position_ids", "past_key_values"} <= set(inspect.signature(network.forward).parameters)
    )


@dataclass
class Row:
    """One prompt on its way."""

    index: int
    """Place among the prompts."""
    length: int
    """Tokens in its slots."""
    last: int
    """Token to read next."""
    tokens: list[int] = field(default_factory=list)
    """New tokens so far, with the one that ends the text."""
    nll: float = 0.0
    """Of the true answer, summed, where it was read."""
    likeliest: list[int] = field(default_factory=list)
    """The likeliest next token at each position of prompt and true answer, where it was read."""


class Decoder:
    """Reads prompts into free rows and moves all rows on by one token: greedy, at most `batch_size` rows at once."""

    def __init__(
        self,
        network: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        batch_size: int,
        finished: Callable[[list[int]], bool],
        answers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`finished` sees a row's new tokens after each one; True takes the row out.

        With `answers` each prompt is read together with its true answer, whose likelihood and the likeliest token at
        each position go into the `Row`; decoding then overwrites the answer's slots.
        """
        self.network, self.prompts, self.finished, self.answers = network, prompts, finished, answers
        self.max_new_tokens, self.batch_size = max_new_tokens, min(batch_size, len(prompts))
        self.rows: list[Row] = []
        behind = [max_new_tokens] * len(prompts) if answers is None else [max(max_new_tokens, len(a)) for a in answers]
        # one more row holds the beginning that a group of prompts shares
        length = max(len(p) + n for p, n in zip(prompts, behind, strict=True))
        self.slots = _Slots(self.batch_size + 1, length)
        self.device = next(network.parameters()).device
        self.dtype = next(network.parameters()).dtype
        self.begun: list[int] = []
        """The tokens in the shared row."""
        self.begun_likeliest: list[int] = []

    def _read(
        self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int], keep: Sequence[range]
    ) -> tuple[Tensor, Tensor]:
        """Read `tokens` of rows first, first+1, … from positions `starts` on.

        Returns the logits (n, vocabulary) at the places `keep` of each row's tokens, and all hidden states.
        """
        longest = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(longest, device=self.device)
        # padding may reach beyond the last slot: it shares that slot, which a row fills before it looks at it
        positions.clamp_(max=self.slots.length - 1)
        width = min(max(starts) + longest, self.slots.length)
        slot = torch.arange(width, device=self.device)
        mask = torch.zeros(len(tokens), 1, longest, width, dtype=self.dtype, device=self.device)
        mask.masked_fill_((slot > positions[:, :, None])[:, None], torch.finfo(self.dtype).min)
        where = torch.zeros_like(ids, dtype=torch.bool)
        for row, places in enumerate(keep):
            where[row, places.start : places.stop] = True
        with logits_at(self.network, where) as hidden:
            logits = self.network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.slots.at(first, positions, width),
                use_cache=True,
            ).logits
        return logits[0], hidden[0]

    def _begin(self, beginning: Sequence[int]) -> None:
        """Have the shared row hold `beginning`, reading only what it does not hold yet."""
        held = common(self.begun, beginning)
        if held < len(beginning):
            _, hidden = self._read(self.batch_size, [beginning[held:]], [held], [range(1)])
            self.begun = list(beginning)
            if self.answers is not None:
                self.begun_likeliest[held:] = likeliest_tokens(self.network, hidden)[0]

    def admit(self, chunk: Chunk) -> list[Row]:
        """Read the prompts of `chunk` into free rows; returns the rows that finish with their first token."""
        first, prefix, count = len(self.rows), chunk.prefix, len(chunk.members)
        prompts = [self.prompts[i] for i in chunk.members]
        answers = [self.answers[i] for i in chunk.members] if self.answers is not None else [()] * count
        if prefix:
            self._begin(prompts[0][:prefix])
            self.slots.copy(self.batch_size, slice(first, first + count), prefix)
        # the last prompt token foretells the first new token and the first of the answer
        keep = [range(at := len(p) - prefix - 1, at + max(1, len(a))) for p, a in zip(prompts, answers, strict=True)]
        tokens = [[*p[prefix:], *a] for p, a in zip(prompts, answers, strict=True)]
        logits, hidden = self._read(first, tokens, [prefix] * count, keep)
        new: list[int] = []
        for row, part in enumerate(logits.split([len(places) for places in keep])):
            new.append(int(part[0].argmax()))
            self.rows.append(Row(chunk.members[row], len(prompts[row]), new[-1]))
            if answers[row]:
                self.rows[-1].nll = token_nll(part, torch.tensor(answers[row], device=self.device)).sum().item()
        if self.answers is not None:
            best = likeliest_tokens(self.network, hidden)
            for row, tokens_of_row in enumerate(tokens):
                likeliest = self.begun_likeliest[:prefix] + best[row][: len(tokens_of_row)]
                self.rows[first + row].likeliest = likeliest
        return self._take(first, new)

    def step(self) -> list[Row]:
        """One more token for each row; returns the rows that are done, which have left."""
        tokens, starts = [[row.last] for row in self.rows], [row.length for row in self.rows]
        logits, _ = self._read(0, tokens, starts, [range(1)] * len(self.rows))
        for row in self.rows:
            row.length += 1
        return self._take(0, logits.argmax(-1).tolist())

    def _take(self, first: int, new: Sequence[int]) -> list[Row]:
        done: list[Row] = []
        for place in reversed(range(first, first + len(new))):
            row = self.rows[place]
            row.last = new[place - first]
            row.tokens.append(row.last)
            if self.finished(row.tokens) or len(row.tokens) >= self.max_new_tokens:
                done.append(row)
                end = self.rows.pop()
                if end is not row:  # the last row moves into the gap, so that rows stay together
                    self.rows[place] = end
                    self.slots.copy(len(self.rows), slice(place, place + 1), end.length)
        return done

    def run(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Row]:
        """All prompts to their end; rows come as they finish."""
        waiting = deque(plan(self.prompts, self.batch_size, self.answers, pass_tokens(self.network)))
        done = 0
        while waiting or self.rows:
            room = self.batch_size - len(self.rows)
            finished = self.admit(waiting.popleft()) if waiting and len(waiting[0].members) <= room else self.step()
            yield from finished
            done += len(finished)
            if progress and finished:
                progress(done, len(self.prompts))
