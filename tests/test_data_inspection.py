"""Figures of a federation against counts by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from flexlora.data.inspection import inspect, inspection_table, label_skew
from flexlora.data.picture import picture, write_picture
from flexlora.prompts import load_template
from flexlora.types import FlexLoraError
from tiny import tiny_tokenizer


def row(text: str, category: str, output: str = "ok") -> dict[str, Any]:
    return {"instruction": "Do.", "input": text, "output": output, "category": category}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inner = tmp_path / "2"
    inner.mkdir()
    files = {
        "local_training_0": [row("a", "x"), row("b", "x"), row("a", "x"), row("c" * 300, "y & <z>")],
        "local_eval_0": [row("b", "x")],
        "local_test_0": [row("d", "x"), row("e", "x")],
        "local_training_1": [row("f", "x"), row("g", "x", "o" * 200)],
        "local_eval_1": [],
        "local_test_1": [row("a", "x"), row("a", "x")],
        "global_test": [row("f", "w"), row("h", "w"), row("i", "v")],
    }
    for name, rows in files.items():
        (inner / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def test_sizes_categories_and_duplicates(folder: Path):
    found = inspect(folder)
    assert (found.clients, found.training, found.eval, found.test, found.global_test) == (2, (4, 2), (1, 0), (2, 2), 3)
    assert found.category_totals() == Counter({"x": 5, "y & <z>": 1})
    assert found.global_categories == Counter({"w": 2, "v": 1})
    twice = found.duplicates
    assert (twice.within_training, twice.eval, twice.test, twice.global_test) == (1, 1, 2, 1)
    assert found.lengths is None


def test_token_lengths_and_truncation(folder: Path):
    tokenizer, template = tiny_tokenizer(), load_template("alpaca_short")
    found = inspect(folder, tokenizer=tokenizer, template=template, cutoff_len=150).lengths
    assert found is not None
    frame = len(template.prompt_input.format(instruction="Do.", input=""))
    by_hand = sorted(frame + n + answer + 1 for n, answer in ((1, 2), (1, 2), (1, 2), (300, 2), (1, 2), (1, 200)))
    assert found.lengths == tuple(by_hand)  # a byte a token, and the eos token
    assert found.quantile(0.5) == by_hand[3]
    assert (found.cut, found.answers_cut) == (2, 1)
    assert found.cut_tokens == sum(n - 150 for n in by_hand if n > 150)
    assert found.response_median == 3
    with pytest.raises(FlexLoraError, match="both a tokenizer and a prompt template"):
        inspect(folder, tokenizer=tokenizer)


def test_label_skew_is_the_total_variation_distance():
    assert label_skew([Counter(a=2, b=2), Counter(a=5, b=5)]) == pytest.approx(0)
    assert label_skew([Counter(a=4), Counter(b=4)]) == pytest.approx(0.5)
    three = [Counter(a=3, b=1), Counter(b=2, c=2), Counter(a=1)]
    totals = {c: sum(own[c] for own in three) / 9 for c in "abc"}
    dense = [sum(abs(own[c] / own.total() - totals[c]) for c in "abc") / 2 for own in three]
    assert label_skew(three) == pytest.approx(sum(dense) / 3)


def test_the_table_and_the_picture_show_the_figures(folder: Path, tmp_path: Path):
    found = inspect(folder, tokenizer=tiny_tokenizer(), template=load_template("chat"), cutoff_len=150)
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    console.print(inspection_table(found, most=1))
    text = console.export_text()
    assert "1 of eval, 2 of test, 1 of global test" in text
    assert "longer than 150" in text
    assert "1 others" in text
    svg = ElementTree.fromstring(picture(found))
    titles = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert "client 0: 1 of y & <z>" in titles
    assert "client 1: 2 of x" in titles
    bars = [t for t in titles if t and t.isdigit()]
    assert sum(map(int, bars)) == 6  # the histogram holds every example
    path = write_picture(found, tmp_path / "data.svg")
    assert path.read_text(encoding="utf-8") == picture(found)
    with pytest.raises(FlexLoraError, match="cannot be written"):
        write_picture(found, tmp_path / "no" / "data.svg")
