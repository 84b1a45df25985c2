"""Greedy decoding of many prompts at once, on the processor's terms: little padding, no prompt token read twice.

Rows of a batch are independent: each holds its keys and values in its own slots, the token at position p in slot p.
So a row that has finished leaves at once, another takes its place, and prompts that begin alike (the chat preamble,
the instruction of one task) have their common beginning read once and copied. The tokens are those of greedy
`network.generate`, one prompt at a time, up to rounding where two tokens are equally likely.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

FORWARD_COST = 32
"""What one forward pass costs beyond its tokens, in tokens: measured on two cores with 135 M parameters."""
READ_TOKENS = 2048
"""Tokens of one reading pass at most (or one row): bounds activations and logits."""


@contextmanager
def inference(network: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; every module's mode is put back afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def logits_at(network: nn.Module, where: Tensor) -> Iterator[list[Tensor]]:
    """Have the next forward pass compute logits at the positions of `where` only, a bool mask (b, t).

    The logits then have shape (1, where.sum(), vocabulary). Yields a list that receives all hidden states (b, t, d).
    """
    hidden: list[Tensor] = []

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(args[0])
        return (args[0][where][None], *args[1:])

    hook = _head(network).register_forward_pre_hook(select)
    try:
        yield hidden
    finally:
        hook.remove()


def _head(network: nn.Module) -> nn.Module:
    return network.get_output_embeddings()  # pyright: ignore[reportCallIssue, reportReturnType]


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
    return (
        set(layers) == {"full_attention"}
        and (not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True))
        and not getattr(config, "alibi", False)
        and not getattr(network, "_is_stateful", False)
        and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
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
    """New tokens so far, without the one that ends the text."""


@dataclass(frozen=True)
class Chunk:
    """Prompts that are read in one pass, after their common beginning."""

    prefix: int
    """Tokens that all of them begin with, and the neighbours of their group too."""
    members: tuple[int, ...]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def cheapest_cuts(count: int, longest: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut 0..count into pieces [i, j) of at most `longest` so that the sum of `cost(i, j)` is smallest."""
    best, start = [0.0], [0]
    for end in range(1, count + 1):
        total, first = min((best[i] + cost(i, end), i) for i in range(max(0, end - longest), end))
        best.append(total)
        start.append(first)
    pieces: list[tuple[int, int]] = []
    while count:
        pieces.append((start[count], count))
        count = start[count]
    return pieces[::-1]


def plan(prompts: Sequence[Sequence[int]], batch_size: int) -> list[Chunk]:
    """Which prompts to read together, in which order: the fewest tokens, padding and passes counted."""
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    length = [len(prompts[i]) for i in order]
    shared = [0] + [common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    total = [0]
    for n in length:
        total.append(total[-1] + n)

    def prefix(i: int, j: int) -> int:
        """Common beginning of the sorted prompts i to j-1; one token at least stays for the reading of each."""
        return min(*shared[i + 1 : j], *(n - 1 for n in length[i:j])) if j - i > 1 else 0

    def group_cost(i: int, j: int) -> float:
        once = prefix(i, j)
        return total[j] - total[i] - (j - i - 1) * once + (2 if once else 1) * FORWARD_COST

    chunks: list[Chunk] = []
    for i, j in cheapest_cuts(len(order), 4 * batch_size, group_cost):
        once = prefix(i, j)
        members = sorted(order[i:j], key=lambda k: len(prompts[k]))
        rest = [len(prompts[k]) - once for k in members]

        def chunk_cost(a: int, b: int, rest: Sequence[int] = rest) -> float:
            tokens = (b - a) * rest[b - 1]
            return tokens + FORWARD_COST if tokens <= READ_TOKENS or b - a == 1 else float("inf")

        chunks += [Chunk(once, tuple(members[a:b])) for a, b in cheapest_cuts(len(members), batch_size, chunk_cost)]
    return chunks


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
    ) -> None:
        """`finished` sees a row's new tokens after each one; True takes the row out."""
        self.network, self.prompts, self.finished = network, prompts, finished
        self.max_new_tokens = max_new_tokens
        self.rows: list[Row] = []
        self.batch_size = min(batch_size, len(prompts))
        # one more row holds the beginning that a group of prompts shares
        self.slots = _Slots(self.batch_size + 1, max(map(len, prompts)) + max_new_tokens)
        self.device = next(network.parameters()).device
        self.dtype = next(network.parameters()).dtype
        self.begun: Sequence[int] = ()

    def _forward(self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int], keep: bool) -> list[int]:
        """Read `tokens` of rows first, first+1, … from positions `starts` on; the next token of each where `keep`."""
        longest = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(longest, device=self.device)
        width = max(starts) + longest
        slot = torch.arange(width, device=self.device)
        mask = torch.zeros(len(tokens), 1, longest, width, dtype=self.dtype, device=self.device)
        mask.masked_fill_((slot > positions[:, :, None])[:, None], torch.finfo(self.dtype).min)
        where = torch.zeros_like(ids, dtype=torch.bool)
        last = torch.tensor([len(row) - 1 for row in tokens], device=self.device)
        where[torch.arange(len(tokens), device=self.device), last] = True
        if not keep:
            where[1:] = False
        with logits_at(self.network, where):
            logits = self.network(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.slots.at(first, positions, width),
                use_cache=True,
            ).logits
        return logits[0].argmax(-1).tolist()

    def admit(self, chunk: Chunk) -> list[Row]:
        """Read the prompts of `chunk` into free rows; returns the rows that finish with their first token."""
        first, prefix, spare = len(self.rows), chunk.prefix, self.batch_size
        prompts = [self.prompts[i] for i in chunk.members]
        begun = common(self.begun, prompts[0][:prefix])
        if begun < prefix:
            self._forward(spare, [prompts[0][begun:prefix]], [begun], keep=False)
            self.begun = prompts[0][:prefix]
        if prefix:
            self.slots.copy(spare, slice(first, first + len(prompts)), prefix)
        new = self._forward(first, [p[prefix:] for p in prompts], [prefix] * len(prompts), keep=True)
        self.rows += [Row(i, len(self.prompts[i]), -1) for i in chunk.members]
        return self._take(first, new)

    def step(self) -> list[Row]:
        """One more token for each row; returns the rows that are done, which have left."""
        new = self._forward(0, [[row.last] for row in self.rows], [row.length for row in self.rows], keep=True)
        for row in self.rows:
            row.length += 1
        return self._take(0, new)

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


class _Ending:
    """When a text ends: at a token that ends it, or at the first stop string."""

    def __init__(self, network: nn.Module, tokenizer: Any, stop: Sequence[str]) -> None:
        settings = getattr(network, "generation_config", None)
        ends = [tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)]
        self.tokens = {e for end in ends if end is not None for e in (end if isinstance(end, list) else [end])}
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # a special token is no text once decoded: as a stop string it ends the text by its number
        self.tokens |= {special[text] for text in stop if text in special}
        self.stop = [text for text in stop if text and text not in special]
        # each token adds a byte at least; a few more for the ones that decode to nothing
        self.tail = max((len(text.encode()) for text in self.stop), default=0) + 8
        self.tokenizer = tokenizer

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def __call__(self, tokens: list[int]) -> bool:
        if tokens[-1] in self.tokens:
            return True
        return bool(self.stop) and any(text in self.decode(tokens[-self.tail :]) for text in self.stop)

    def text(self, tokens: Sequence[int]) -> str:
        """The text before its ending."""
        kept = tokens[:-1] if tokens and tokens[-1] in self.tokens else tokens
        text = self.decode(kept)
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]


def _one_by_one(
    network: nn.Module, prompt: Sequence[int], max_new_tokens: int, finished: Callable[[list[int]], bool]
) -> Iterator[list[int]]:
    """Greedy decoding that asks for nothing but a cache: the tokens so far, after each new one."""
    device = next(network.parameters()).device
    ids, cache, tokens = torch.tensor([prompt], device=device), None, []
    while len(tokens) < max_new_tokens:
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, -1] = True
        with logits_at(network, where):
            output = network(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        yield tokens
        if finished(tokens):
            return
        ids = torch.tensor([tokens[-1:]], device=device)


def generate(
    network: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The greedy continuation of each prompt, as text without the tokens or the stop string that ended it.

    Args:
        network: a causal language model of transformers; where it has more than full attention over a plain cache
            (a sliding window, a recurrent state), prompts are decoded one by one.
        prompts: token ids, not empty.
        batch_size: rows decoded at once, at most.
        stop: the text ends before the first of them; a special token's name ends it by its number.
        progress: called with the number of prompts that have finished, and of all.
    """
    texts = [""] * len(prompts)
    if not prompts or max_new_tokens < 1:
        return texts
    ending = _Ending(network, tokenizer, stop)
    with inference(network):
        if not has_slots(network):
            for index, prompt in enumerate(prompts):
                *_, tokens = _one_by_one(network, prompt, max_new_tokens, ending)
                texts[index] = ending.text(tokens)
                if progress:
                    progress(index + 1, len(prompts))
            return texts
        decoder = Decoder(network, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, finished=ending)
        waiting = deque(plan(prompts, decoder.batch_size))
        while waiting or decoder.rows:
            if waiting and len(decoder.rows) + len(waiting[0].members) <= decoder.batch_size:
                done = decoder.admit(waiting.popleft())
            else:
                done = decoder.step()
            for row in done:
                texts[row.index] = ending.text(row.tokens)
            if progress and done:
                finished = len(prompts) - len(decoder.rows) - sum(len(chunk.members) for chunk in waiting)
                progress(finished, len(prompts))
    return texts


def stream(
    network: nn.Module, tokenizer: Any, prompt: Sequence[int], *, max_new_tokens: int, stop: Sequence[str] = ()
) -> Iterator[str]:
    """Pieces of the greedy continuation as they come; joined they are what `generate` returns."""
    ending = _Ending(network, tokenizer, stop)
    shown, tokens = "", []
    with inference(network):
        for tokens in _one_by_one(network, prompt, max_new_tokens, ending):
            text = ending.text(tokens)
            # hold back what the next token may change: half a character, the beginning of a stop string
            held = max(
                (k for s in ending.stop for k in range(1, len(s)) if text.endswith(s[:k])),
                default=len(text) - len(text.rstrip("\ufffd")),
            )
            text = text[: len(text) - held]
            if text.startswith(shown) and text != shown:
                yield text[len(shown) :]
                shown = text
    text = ending.text(tokens)
    if text != shown:
        yield text[len(shown) :]
