"""Scores of a model on records: loss on the response, ROUGE-L and exact match of what it generates.

ROUGE-L: Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1; computed by `rouge-score`
as the evaluation of Natural Instructions does (arXiv 2204.07705): Porter stemming, the best of several references.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import nn

from flexlora.attention import can_share
from flexlora.batching import Chunk, plan
from flexlora.cores import each
from flexlora.decoding import has_slots
from flexlora.generation import generate, generate_and_read, stream
from flexlora.likelihood import token_nll
from flexlora.logits import bare_head, inference, likeliest_tokens, logits_at, pass_tokens, said, side_by_side
from flexlora.prompts import Encoded, Record, Template, encode_all, encode_prompts, end_of_turn, extract_response
from flexlora.rows import collate, label_tokens

__all__ = ["Loss", "Scores", "exact_match", "generate", "loss", "rouge_l", "score", "stops", "stream"]

RELEASE_PAD_LABEL = 1829
"""The token that the FlexLoRA release puts where a label is padding, before it decodes labels."""


@dataclass(frozen=True)
class Loss:
    """Negative log likelihood (nats) of the label tokens, one entry for each example in the order given."""

    sums: list[float]
    """Sum over the example's label tokens."""
    tokens: list[int]
    """Number of its label tokens."""

    @property
    def mean(self) -> float:
        """Over all label tokens; NaN where there are none."""
        return sum(self.sums) / tokens if (tokens := sum(self.tokens)) else float("nan")


def loss(
    network: nn.Module,
    examples: Sequence[Encoded],
    *,
    batch_size: int,
    train_on_inputs: bool = False,
) -> Loss:
    """Loss of each example: on its response, or with `train_on_inputs` on all tokens after the first.

    At most `batch_size` examples (fewer where they are long) are read together, with what they all begin with in front of
    them only once, and two such rows at once where there are two cores; logits are computed at label positions only. Memory
    does not grow with the number of examples.
    """
    nll, count = [0.0] * len(examples), [label_tokens(x, train_on_inputs) for x in examples]
    device = next(network.parameters()).device

    def read(chunk: Chunk) -> None:
        members = [examples[i] for i in chunk.members]
        # where the beginning has labels, the token after it must be common too
        beginning = max(0, chunk.prefix - train_on_inputs) if len(members) > 1 else 0
        rows = collate(members, train_on_inputs, device, beginning=beginning)
        with torch.inference_mode():
            states, head = said(network, rows)
            found = token_nll(states, rows.labels, head)
        common = beginning if train_on_inputs else 0  # labels inside the beginning, which all have
        own = found[common:].split([count[i] - common for i in chunk.members])
        for i, part in zip(chunk.members, own, strict=True):
            nll[i] = (found[:common].sum() + part.sum()).item()

    with inference(network):
        chunks = _chunks(network, examples, batch_size, train_on_inputs)
        cores = torch.get_num_threads()
        # Found out while nothing else passes through the network; where its logits are not bare a row makes them all.
        alike = side_by_side(network) and bare_head(network) is not None
        lanes = min(2, len(chunks), cores) if alike else 1
        longest_first = sorted(chunks, key=lambda x: -sum(len(examples[i].input_ids) for i in x.members))
        each(read, longest_first, lanes, threads=max(1, cores // max(1, lanes)))
    return Loss(nll, count)


def _read(network: nn.Module, examples: Sequence[Encoded], batch_size: int) -> tuple[Loss, list[list[int]]]:
    """The loss on the response, and the likeliest next token at every position of every example."""
    nll, count = [0.0] * len(examples), [label_tokens(x, False) for x in examples]
    likeliest: list[list[int]] = [[] for _ in examples]
    device = next(network.parameters()).device
    with inference(network):
        for batch in _batches([len(e.input_ids) for e in examples], batch_size, pass_tokens(network)):
            rows = collate([examples[i] for i in batch], False, device)
            with logits_at(network, rows.keep) as hidden:
                logits = network(input_ids=rows.input_ids, use_cache=False).logits[0]
            each = token_nll(logits, rows.labels).split([count[i] for i in batch])
            for i, part, best in zip(batch, each, likeliest_tokens(network, hidden[0]), strict=True):
                nll[i], likeliest[i] = part.sum().item(), best[: len(examples[i].input_ids)]
    return Loss(nll, count), likeliest


def _chunks(network: nn.Module, examples: Sequence[Encoded], batch_size: int, train_on_inputs: bool) -> Sequence[Chunk]:
    """What to read together; a beginning is shared up to one token before the first label that not all have."""
    most = pass_tokens(network)
    if not can_share(network):
        return [Chunk(0, tuple(b)) for b in _batches([len(e.input_ids) for e in examples], batch_size, most)]
    ends = [len(e.input_ids) if train_on_inputs else max(1, e.response_start) for e in examples]
    return plan(
        [e.input_ids[:end] for e, end in zip(examples, ends, strict=True)],
        batch_size,
        [e.input_ids[end:] for e, end in zip(examples, ends, strict=True)],
        most,
    )


def _batches(lengths: Sequence[int], batch_size: int, most: int) -> list[list[int]]:
    """Indices in batches of like length: at most `batch_size`, at most `most` tokens with padding, at least one."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and len(batches[-1]) < batch_size and (len(batches[-1]) + 1) * lengths[i] <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class _UnicodeWords:
    """Words of any script; a character of a script without spaces is a word (rouge-score's own drops all but ASCII).

    Marks (vowel signs, accents) and the zero-width joiners are no letters to Python, yet part of the word they stand in.
    """

    # CJK ideographs, kana, Thai, Lao, Khmer, Myanmar: written without spaces between words
    _alone = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")

    def tokenize(self, text: str) -> list[str]:
        words, inside = [], False
        for c in _composed(text).lower():
            alone = bool(self._alone.match(c))
            goes_on = inside and (unicodedata.category(c)[0] == "M" or c in "\u200c\u200d")
            part = not alone and (c.isalnum() or goes_on)
            if part and inside:
                words[-1] += c
            elif part or alone:
                words.append(c)
            inside = part
        return words


@cache
def _scorers() -> tuple[Any, Any]:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True), RougeScorer(["rougeL"], tokenizer=_UnicodeWords())


def _beyond_ascii(text: str) -> bool:
    return any(c.isalnum() and not c.isascii() for c in _composed(text))


def rouge_l(references: Sequence[str], prediction: str) -> float:
    """ROUGE-L F-measure in [0, 1], the best over `references`.

    Against a reference of ASCII letters only, `rouge-score` as it is, with Porter stemming. Against any other, words of
    every script count, unstemmed: the package's own tokenizer would drop them.
    """
    ascii_only, any_script = _scorers()
    return max(
        (any_script if _beyond_ascii(reference) else ascii_only).score(reference, prediction)["rougeL"].fmeasure
        for reference in references
    )


def _normal(text: str) -> str:
    return " ".join(_composed(text).lower().translate(str.maketrans("", "", string.punctuation)).split())


def _composed(text: str) -> str:
    """The same text whichever way its accents are written."""
    return unicodedata.normalize("NFC", text)


def exact_match(references: Sequence[str], prediction: str) -> bool:
    """Whether the prediction is one of the references but for case, ASCII punctuation, white space and how accents are encoded.

    A reference of punctuation only (a sign, a face) has to be met as it is.
    """
    return any(
        _normal(prediction) == _normal(reference) if _normal(reference) else prediction.strip() == reference.strip()
        for reference in references
    )


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): a row of the table is one integer."""
    match: dict[str, int] = {}
    for i, word in enumerate(a):
        match[word] = match.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        hit = row & match.get(word, 0)
        row = (row + hit | row - hit) & full
    return len(a) - row.bit_count()


def _rouge_teacher_forced(tokenizer: Any, examples: Sequence[Encoded], likeliest: Sequence[Sequence[int]]) -> float:
    """ROUGE-L as the FlexLoRA release logs it (`fed_utils/client.py`), a number to compare with its logs only.

    The prediction is the likeliest token at each position of prompt and answer, given the true tokens before it, and
    stands one place early; the label is prompt and answer, padded to the longest of all examples (a multiple of 8)
    with token 1829, and the padding counts. No stemming. What depends on how the release batches (predictions at
    padding inside a batch) is left out.
    """
    from rouge_score.tokenize import tokenize

    longest = -(-max(len(e.input_ids) for e in examples) // 8) * 8
    scores: list[float] = []
    for example, best in zip(examples, likeliest, strict=True):
        padding = [min(RELEASE_PAD_LABEL, len(tokenizer) - 1)] * (longest - len(example.input_ids))
        label, guess = (
            tokenize(tokenizer.decode(ids, skip_special_tokens=True), None)
            for ids in ([*example.input_ids, *padding], list(best))
        )
        scores.append(2 * lcs(label, guess) / (len(label) + len(guess)) if label and guess else 0.0)
    return fmean(scores)


@dataclass(frozen=True)
class Scores:
    """Scores over all records. ROUGE-L and exact match lie in [0, 1], the loss is in nats a token."""

    examples: int
    rougeL: float  # noqa: N815 (the name in metrics.jsonl)
    """Mean over examples."""
    rougeL_by_task: float  # noqa: N815
    """Mean over categories of their means."""
    exact_match: float
    loss: float
    """On the response, over all its tokens."""
    rougeL_teacher_forced: float  # noqa: N815
    """What the release calls ROUGE-L: not a score of generated text."""
    per_category: dict[str, dict[str, float]]
    """For each category: examples, rougeL, exact_match, loss."""
    predictions: list[dict[str, Any]]
    """For each record, in order: category, instruction, input, references, prediction, rougeL, exact_match, loss, tokens."""

    def summary(self) -> dict[str, Any]:
        """Everything but the predictions, as plain data."""
        data = asdict(self)
        del data["predictions"]
        return data


def stops(template: Template, tokenizer: Any) -> tuple[str, ...]:
    """Where an answer ends: the template's stop strings, and the token that ends a turn in training."""
    return (*template.stop, tokenizer.convert_ids_to_tokens(end_of_turn(template, tokenizer)[-1]))


def score(
    network: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    template: Template,
    *,
    cutoff_len: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Generate an answer to every record, greedily, and compare it with the references; the loss beside it.

    Args:
        records: at least one.
        cutoff_len: tokens of prompt and answer at most; a longer prompt loses its middle.
        max_new_tokens: length of a generated answer at most.
        progress: called with the number of records whose answer is done, and of all.
    """
    examples = encode_all(records, template, tokenizer, cutoff_len)
    prompts = encode_prompts(records, template, tokenizer, cutoff_len, max_new_tokens)
    ending = {"max_new_tokens": max_new_tokens, "stop": stops(template, tokenizer), "progress": progress}
    if has_slots(network):
        # One reading serves both, but where a prompt is cut more for the answer to come than for the true one.
        alone = [i for i, e in enumerate(examples) if list(e.input_ids[: e.response_start]) != prompts[i]]
        answers = [() if i in alone else e.input_ids[e.response_start :] for i, e in enumerate(examples)]
        texts, sums, likeliest = generate_and_read(
            network, tokenizer, prompts, answers, batch_size=batch_size, **ending
        )
        tokens = [len(answer) for answer in answers]
    else:
        alone = list(range(len(examples)))
        sums, tokens, likeliest = [0.0] * len(alone), [0] * len(alone), [[0]] * len(alone)
        texts = generate(network, tokenizer, prompts, batch_size=batch_size, **ending)
    rest, rest_likeliest = _read(network, [examples[i] for i in alone], batch_size)
    for k, i in enumerate(alone):
        sums[i], tokens[i], likeliest[i] = rest.sums[k], rest.tokens[k], rest_likeliest[k]
    measured = Loss(sums, tokens)
    predictions: list[dict[str, Any]] = []
    for record, text, nll, tokens in zip(records, texts, measured.sums, measured.tokens, strict=True):
        prediction = extract_response(template, text)
        references = list(record.references) or [record.output]
        predictions.append(
            {
                "category": record.category or "",
                "instruction": record.instruction,
                "input": record.input,
                "references": references,
                "prediction": prediction,
                "rougeL": rouge_l(references, prediction),
                "exact_match": exact_match(references, prediction),
                "loss": nll / tokens if tokens else float("nan"),
                "tokens": tokens,
            }
        )
    per_category: dict[str, dict[str, float]] = {}
    for category in sorted({p["category"] for p in predictions}):
        members = [i for i, p in enumerate(predictions) if p["category"] == category]
        part = Loss([measured.sums[i] for i in members], [measured.tokens[i] for i in members])
        per_category[category] = {
            "examples": len(members),
            "rougeL": fmean(predictions[i]["rougeL"] for i in members),
            "exact_match": fmean(predictions[i]["exact_match"] for i in members),
            "loss": part.mean,
        }
    return Scores(
        examples=len(predictions),
        rougeL=fmean(p["rougeL"] for p in predictions),
        rougeL_by_task=fmean(c["rougeL"] for c in per_category.values()),
        exact_match=fmean(p["exact_match"] for p in predictions),
        loss=measured.mean,
        rougeL_teacher_forced=_rouge_teacher_forced(tokenizer, examples, likeliest),
        per_category=per_category,
        predictions=predictions,
    )
