"""Greedy decoding of many prompts at once, on the processor's terms: little padding, no prompt token read twice.

Rows of a batch are independent: each holds its keys and values in its own slots, the token at position p in slot p.
So a row that has finished leaves at once, another takes its place, and prompts that begin alike (the chat preamble,
the instruction of one task) have their common beginning read once and copied. The tokens are those of greedy
`network.generate`, one prompt at a time, up to rounding where two tokens are equally likely.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

FORWARD_COST = 32
"""What one forward pass costs beyond its tokens, in tokens: measured on two cores with 135 M parameters."""
READ_TOKENS = 2048
"""Tokens of one reading pass at most (or one row): bounds activations."""
LOGITS = 2**27
"""Logits of one pass at most (512 MB in float32), or those of one row."""
PIECE = 256
"""Positions whose logits are looked at together."""


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


def pass_tokens(network: nn.Module) -> int:
    """Tokens of one reading pass at most."""
    return max(1, min(READ_TOKENS, LOGITS // int(_head(network).weight.shape[0])))  # pyright: ignore


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood (n,) in float64 of `labels` (n,) under `logits` (n, vocabulary)."""
    pieces = zip(logits.split(PIECE), labels.split(PIECE), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none").double() for x, y in pieces])


def likeliest_tokens(network: nn.Module, hidden: Tensor) -> list[list[int]]:
    """The likeliest next token at every position of the output layer's input (b, t, d), logits held piece by piece."""
    best = [_head(network).forward(piece).argmax(-1) for piece in hidden.flatten(0, 1).split(PIECE)]
    return torch.cat(best).view(hidden.shape[:2]).tolist()


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
    """New tokens so far, with the one that ends the text."""
    nll: float = 0.0
    """Of the true answer, summed, where it was read."""
    likeliest: list[int] = field(default_factory=list)
    """The likeliest next token at each position of prompt and true answer, where it was read."""


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


def plan(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    answers: Sequence[Sequence[int]] | None = None,
    most: int = READ_TOKENS,
) -> list[Chunk]:
    """Which prompts to read together, in which order: the fewest tokens, padding and passes counted.

    `answers` are read behind their prompts; `most` tokens, with padding, go into one pass.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    length = [len(prompts[i]) for i in order]
    shared = [0] + [common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    total = [0, *accumulate(length)]

    def prefix(i: int, j: int) -> int:
        """Common beginning of the sorted prompts i to j-1; one token at least stays for the reading of each."""
        return min(*shared[i + 1 : j], *(n - 1 for n in length[i:j])) if j - i > 1 else 0

    def group_cost(i: int, j: int) -> float:
        once = prefix(i, j)
        return total[j] - total[i] - (j - i - 1) * once + (2 if once else 1) * FORWARD_COST

    chunks: list[Chunk] = []
    for i, j in cheapest_cuts(len(order), 4 * batch_size, group_cost):
        once = prefix(i, j)
        rest = {k: len(prompts[k]) - once + (len(answers[k]) if answers else 0) for k in order[i:j]}
        members = sorted(rest, key=lambda k: (rest[k], k))

        def pass_cost(a: int, b: int, rest: Mapping[int, int] = rest, members: Sequence[int] = members) -> float:
            tokens = (b - a) * rest[members[b - 1]]
            return tokens + FORWARD_COST if tokens <= most or b - a == 1 else float("inf")

        chunks += [Chunk(once, tuple(members[a:b])) for a, b in cheapest_cuts(len(members), batch_size, pass_cost)]
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
        for row in decoder.run(progress):
            texts[row.index] = ending.text(row.tokens)
    return texts


def generate_and_read(
    network: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], list[float], list[list[int]]]:
    """As `generate`, and while a prompt is read, its true answer too: the prompt's tokens pass the network once.

    Needs `has_slots(network)`. Returns texts; the answers' summed negative log likelihood (nats); and the likeliest
    next token at each position of prompt + answer.
    """
    texts, nll, likeliest = [""] * len(prompts), [0.0] * len(prompts), [[]] * len(prompts)
    if not prompts:
        return texts, nll, likeliest
    ending = _Ending(network, tokenizer, stop)
    with inference(network):
        decoder = Decoder(
            network,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            finished=ending,
            answers=answers,
        )
        for row in decoder.run(progress):
            texts[row.index], nll[row.index], likeliest[row.index] = ending.text(row.tokens), row.nll, row.likeliest
    return texts, nll, likeliest


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
