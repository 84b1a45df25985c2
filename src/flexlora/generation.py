"""Answers as text: of many prompts, of one as it comes, with the true answer's likelihood beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from flexlora.decoding import Decoder, has_slots
from flexlora.logits import inference, logits_at


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
    """Greedy decoding that asks for a cache at most: the tokens so far, after each new one."""
    device = next(network.parameters()).device
    ids, cache, tokens = torch.tensor([prompt], device=device), None, []
    caches = "past_key_values" in inspect.signature(network.forward).parameters
    while len(tokens) < max_new_tokens:
        where = torch.zeros_like(ids, dtype=torch.bool)
        where[:, -1] = True
        with logits_at(network, where):
            more = {"past_key_values": cache, "use_cache": True} if caches else {"use_cache": False}
            output = network(input_ids=ids, **more)
        cache = getattr(output, "past_key_values", None)
        tokens.append(int(output.logits[0, -1].argmax()))
        yield tokens
        if finished(tokens):
            return
        new = torch.tensor([tokens[-1:]], device=device)
        # Mamba and RWKV keep their state each under a name of its own: there the whole text is read again
        ids = new if cache is not None else torch.cat([ids, new], dim=1)


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
            (a sliding window, a recurrent state), prompts are decoded one by one, and without such a cache each token
            reads the whole text again.
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
