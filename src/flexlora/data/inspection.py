"""What is in a federation: sizes, categories, skew, lengths, truncation, and test examples that were trained on."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexlora.data.federation import open_federation
from flexlora.data.records import Record
from flexlora.prompts import Template, encode_all
from flexlora.types import FlexLoraError

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Lengths:
    """Token counts of the training examples with the prompt template, before any cut."""

    template: str
    cutoff_len: int
    lengths: tuple[int, ...]
    """Ascending."""
    response_median: int
    cut: int
    """Examples longer than the cutoff."""
    cut_tokens: int
    """Tokens that the cutoff leaves out of them."""
    answers_cut: int
    """Of these examples, those whose answer alone is longer than the cutoff."""

    def quantile(self, share: float) -> int:
        return self.lengths[min(len(self.lengths) - 1, int(share * len(self.lengths)))]


@dataclass(frozen=True)
class Duplicates:
    """Examples with the same instruction and input (or conversation) as an example that some client trains on."""

    within_training: int
    """Training examples less different ones."""
    eval: int
    test: int
    global_test: int


@dataclass(frozen=True)
class Inspection:
    folder: Path
    training: tuple[int, ...]
    """Training examples by client."""
    eval: tuple[int, ...]
    test: tuple[int, ...]
    global_test: int
    categories: tuple[Counter[str], ...]
    """Category -> training examples, by client."""
    global_categories: Counter[str]
    """Category -> examples of global_test."""
    skew: float
    """Mean over clients of the total variation distance between the client's categories and all clients' together:
    0 where all are alike, towards 1 where each has its own."""
    duplicates: Duplicates
    lengths: Lengths | None
    """None where no tokenizer was given."""

    @property
    def clients(self) -> int:
        return len(self.training)

    def category_totals(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for own in self.categories:
            totals.update(own)
        return totals


def inspect(
    data: str | Path,
    *,
    num_clients: int | None = None,
    tokenizer: Any = None,
    template: Template | None = None,
    cutoff_len: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Read every file of a federation and count. Token lengths need `tokenizer` and `template`.

    Reads a client at a time; memory holds 16 bytes a training example and its length. `progress` gets
    (clients done, clients). Raises FlexLoraError as `open_federation` and `read_records` do.
    """
    if (tokenizer is None) != (template is None):
        raise FlexLoraError("token lengths need both a tokenizer and a prompt template: give --model")
    federation = open_federation(data, num_clients)
    seen: set[bytes] = set()
    sizes: dict[str, list[int]] = {"training": [], "eval": [], "test": []}
    categories: list[Counter[str]] = []
    tally = _Tally(tokenizer, template, cutoff_len) if template is not None else None
    for done, client in enumerate(federation.clients, start=1):
        records = federation.train(client)
        sizes["training"].append(len(records))
        categories.append(Counter(record.category for record in records))
        seen.update(map(_key, records))
        if tally is not None:
            tally.add(records)
        if progress:
            progress(done, len(federation))
    known_eval = known_test = 0
    for client in federation.clients:
        held, test = federation.eval(client), federation.test(client)
        sizes["eval"].append(len(held))
        sizes["test"].append(len(test))
        known_eval += sum(_key(record) in seen for record in held)
        known_test += sum(_key(record) in seen for record in test)
    unseen = federation.global_test()
    return Inspection(
        folder=federation.folder,
        training=tuple(sizes["training"]),
        eval=tuple(sizes["eval"]),
        test=tuple(sizes["test"]),
        global_test=len(unseen),
        categories=tuple(categories),
        global_categories=Counter(record.category for record in unseen),
        skew=label_skew(categories),
        duplicates=Duplicates(
            within_training=sum(sizes["training"]) - len(seen),
            eval=known_eval,
            test=known_test,
            global_test=sum(_key(record) in seen for record in unseen),
        ),
        lengths=tally.lengths() if tally is not None else None,
    )


def label_skew(categories: Sequence[Counter[str]]) -> float:
    """Mean over clients of ½ Σ_c |p_client(c) − p_all(c)|, from 0 to (nearly) 1."""
    totals: Counter[str] = Counter()
    for own in categories:
        totals.update(own)
    n = totals.total()
    distances = []
    for own in categories:
        # Categories that a client lacks add up to what the others leave of the whole.
        share = sum(totals[c] for c in own) / n
        inside = sum(abs(count / own.total() - totals[c] / n) for c, count in own.items())
        distances.append((inside + 1 - share) / 2)
    return statistics.fmean(distances)


def _key(record: Record) -> bytes:
    prompt = record.messages[:-1] if record.messages is not None else (record.instruction, record.input)
    return hashlib.blake2b(repr(prompt).encode(), digest_size=16).digest()


class _Tally:
    """Token lengths of training examples, client by client."""

    def __init__(self, tokenizer: Any, template: Template, cutoff_len: int) -> None:
        self.tokenizer, self.template, self.cutoff_len = tokenizer, template, cutoff_len
        self.totals: list[int] = []
        self.responses: list[int] = []
        self.cut = self.cut_tokens = self.answers_cut = 0

    def add(self, records: Sequence[Record]) -> None:
        for encoded in encode_all(records, self.template, self.tokenizer, self.cutoff_len):
            self.totals.append(len(encoded.input_ids) + encoded.cut)
            self.responses.append(len(encoded.input_ids) - encoded.response_start)
            self.cut += encoded.cut > 0
            self.cut_tokens += encoded.cut
            self.answers_cut += encoded.cut > 0 and encoded.response_start == 0

    def lengths(self) -> Lengths:
        return Lengths(
            template=self.template.name,
            cutoff_len=self.cutoff_len,
            lengths=tuple(sorted(self.totals)),
            response_median=sorted(self.responses)[len(self.responses) // 2],
            cut=self.cut,
            cut_tokens=self.cut_tokens,
            answers_cut=self.answers_cut,
        )


def inspection_table(found: Inspection, *, most: int = 12) -> Group:
    """The figures as tables for a terminal; of the categories, the `most` largest."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    figures = Table(title=escape(str(found.folder)), show_header=False, box=None, title_justify="left")
    figures.add_column(style="dim")
    figures.add_column()
    for name, value in _figures(found):
        figures.add_row(name, value)
    totals = found.category_totals()
    table = Table("category", "training examples", "clients", box=None, title="categories", title_justify="left")
    table.columns[1].justify = table.columns[2].justify = "right"
    for category, count in totals.most_common(most):
        holders = sum(category in own for own in found.categories)
        table.add_row(escape(category) or "–", f"{count:,}", f"{holders:,}")
    if len(totals) > most:
        rest = sum(count for _, count in totals.most_common()[most:])
        table.add_row(f"{len(totals) - most:,} others", f"{rest:,}", "", style="dim")
    return Group(figures, "", table)


def _figures(found: Inspection) -> list[tuple[str, str]]:
    def spread(sizes: Sequence[int]) -> str:
        return f"{sum(sizes):,}  ({min(sizes):,} to {max(sizes):,} a client, median {statistics.median_low(sizes):,})"

    twice = found.duplicates
    rows = [
        ("clients", f"{found.clients:,}"),
        ("training examples", spread(found.training)),
        ("eval examples", spread(found.eval)),
        ("test examples", spread(found.test)),
        ("global test examples", f"{found.global_test:,} of {len(found.global_categories):,} categories"),
        ("categories", f"{len(found.category_totals()):,}"),
        ("label skew", f"{found.skew:.3f}  (0: all clients alike, towards 1: each its own categories)"),
        ("repeated in training", f"{twice.within_training:,}"),
        ("also in training", f"{twice.eval:,} of eval, {twice.test:,} of test, {twice.global_test:,} of global test"),
    ]
    if found.lengths is not None:
        tokens = found.lengths
        share = tokens.cut / len(tokens.lengths)
        rows += [
            (
                f"tokens ({tokens.template})",
                f"median {tokens.quantile(0.5):,}, 90 % up to {tokens.quantile(0.9):,}, longest {tokens.lengths[-1]:,}; "
                f"response median {tokens.response_median:,}",
            ),
            (
                f"longer than {tokens.cutoff_len}",
                f"{tokens.cut:,} ({share:.1%}), {tokens.cut_tokens:,} tokens left out; "
                f"answers longer than the cutoff: {tokens.answers_cut:,}",
            ),
        ]
    return rows
