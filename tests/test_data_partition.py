"""Partitioners: nothing lost, nothing twice, the seed decides; tables in the formats that people have."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora.data.federation import open_federation
from flexlora.data.inspection import label_skew
from flexlora.data.partition import deal, parse_rule, partition
from flexlora.data.tables import read_prompts, read_table
from flexlora.data.writing import split
from flexlora.prompts import Record
from flexlora.types import FlexLoraError

RULES = st.sampled_from(["iid", "category", "shards:1", "shards:2", "dirichlet:0.01", "dirichlet:0.5", "dirichlet:100"])
LABELS = st.lists(st.sampled_from("abcdefg"), min_size=12, max_size=120)


@settings(max_examples=150)
@given(LABELS, st.integers(1, 6), RULES, st.integers(0, 5))
def test_nothing_is_lost_nothing_is_twice_nobody_is_empty_and_the_seed_decides(labels, clients, by, seed):
    dealt = deal(labels, clients, by, seed)
    assert len(dealt) == clients
    assert sorted(place for own in dealt for place in own) == list(range(len(labels)))
    assert all(dealt)
    assert dealt == deal(labels, clients, by, seed)


def test_another_seed_deals_otherwise():
    labels = [str(i % 5) for i in range(100)]
    for by in ("iid", "shards:2", "dirichlet:0.5"):
        assert deal(labels, 5, by, 1) != deal(labels, 5, by, 2)


@settings(max_examples=60)
@given(LABELS, st.integers(1, 12))
def test_iid_sizes_are_equal_to_within_one(labels, clients):
    sizes = [len(own) for own in deal(labels, clients, "iid", 0)]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60)
@given(LABELS, st.integers(1, 6), st.integers(1, 2))
def test_shards_give_few_categories(labels, clients, k):
    dealt = deal(labels, clients, f"shards:{k}", 3)
    sizes = [len(own) for own in dealt]
    assert max(sizes) - min(sizes) <= k
    # A shard of s sorted examples meets at most one category more than category borders lie inside it.
    categories = len(set(labels))
    assert sum(len({labels[p] for p in own}) for own in dealt) <= clients * k + categories - 1


def test_category_gives_whole_categories_or_cuts_large_ones():
    labels = ["a"] * 10 + ["b"] * 6 + ["c"] * 5 + ["d"] * 4
    two = deal(labels, 2, "category", 0)
    assert [sorted({labels[p] for p in own}) for own in two] == [["a", "d"], ["b", "c"]]
    four = deal(labels, 4, "category", 0)
    assert [sorted({labels[p] for p in own}) for own in four] == [["a"], ["b"], ["c"], ["d"]]
    six = deal(labels, 6, "category", 0)
    assert sorted((labels[own[0]], len(own)) for own in six) == [
        ("a", 5), ("a", 5), ("b", 3), ("b", 3), ("c", 5), ("d", 4),
    ]  # fmt: skip
    assert all(len({labels[p] for p in own}) == 1 for own in six)


def test_a_smaller_alpha_skews_more_and_poor_clients_are_helped():
    labels = [str(i % 10) for i in range(1000)]

    def skew(by: str) -> float:
        values = [
            label_skew([Counter(labels[p] for p in own) for own in deal(labels, 10, by, seed)]) for seed in range(3)
        ]
        return sum(values) / 3

    skews = [skew(by) for by in ("dirichlet:0.05", "dirichlet:0.5", "dirichlet:5", "dirichlet:500")]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.6
    assert skews[-1] < 0.1
    for seed in range(5):
        assert min(map(len, deal(["a"] * 60, 20, "dirichlet:0.001", seed))) == 3


def test_rules_and_counts_that_cannot_be():
    assert parse_rule("dirichlet:0.3") == ("dirichlet", 0.3)
    for by in ("idd", "iid:2", "dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf",
               "shards:0", "shards:1.5", "shards:x", "category:3", ""):  # fmt: skip
        with pytest.raises(FlexLoraError, match=r"--by .*: choose iid, category"):
            parse_rule(by)
    with pytest.raises(FlexLoraError, match="--clients 4: there are only 3 examples"):
        deal(["a"] * 3, 4, "iid", 0)
    with pytest.raises(FlexLoraError, match="--clients 0"):
        deal(["a"] * 3, 0, "iid", 0)
    with pytest.raises(FlexLoraError, match="have no category: name its column with --category"):
        deal([""] * 9, 2, "category", 0)
    with pytest.raises(FlexLoraError, match="6 shards of only 5 examples: lower K"):
        deal(["a"] * 5, 2, "shards:3", 0)


@given(st.integers(1, 60), st.integers(0, 3))
def test_the_split_is_80_10_10_and_loses_nothing(n, seed):
    records = [Record("i", str(i), "o") for i in range(n)]
    train, held, test = split(records, seed, "x")
    assert sorted(int(r.input) for r in train + held + test) == list(range(n))
    assert len(train) >= 1
    assert len(held) == len(test)
    if n >= 3:
        assert abs(len(held) - n / 10) <= 0.9
        assert len(held) >= 1
    assert (train, held, test) == split(records, seed, "x")


# --- tables ----------------------------------------------------------------------------------------------------------

DOLLY = [
    {"instruction": f"Ask {i}", "context": "c" if i % 2 else "", "response": f"Say {i}", "category": f"k{i % 3}"}
    for i in range(30)
]
ALPACA = [{"instruction": f"Ask {i}", "input": "", "output": f"Say {i}", "text": "…"} for i in range(30)]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_table(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"table.{kind}"
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_csv(path, rows, "\t" if kind == "tsv" else ",")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str):
    rows = [{**DOLLY[0], "response": 'a "quoted",\tlong\nanswer\u2028é'}, *DOLLY[1:]]
    records, dropped = read_table(write_table(tmp_path, kind, rows))
    assert dropped == 0
    assert [(r.instruction, r.input, r.output, r.category) for r in records] == [
        (row["instruction"], row["context"], row["response"], row["category"]) for row in rows
    ]


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\x0c", "\x1c"])
def test_only_line_ends_end_a_line(tmp_path: Path, sign: str):
    """`str.splitlines` ends lines at these too; spreadsheets leave such cells unquoted."""
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "t.csv").write_bytes(f'instruction,output{end}one{sign}two,a{end}"x\n\ny",b{end}'.encode())
        records, _ = read_table(tmp_path / "t.csv")
        assert [(r.instruction, r.output) for r in records] == [(f"one{sign}two", "a"), ("x\n\ny", "b")]
        (tmp_path / "t.txt").write_bytes(f"one{sign}two{end}{end}three".encode())
        assert [r.instruction for r in read_prompts(tmp_path / "t.txt")] == [f"one{sign}two", "three"]


def test_a_saved_data_set_is_loaded(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(DOLLY)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data.select(range(2)), "train": data}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        records, _ = read_table(tmp_path / name)
        assert [r.output for r in records] == [row["response"] for row in DOLLY]


def test_alpaca_conversations_and_columns_by_flag(tmp_path: Path):
    records, _ = read_table(write_table(tmp_path, "json", ALPACA))
    assert (records[3].instruction, records[3].output, records[3].category) == ("Ask 3", "Say 3", "")
    talks = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    (talk,), _ = read_table(write_table(tmp_path, "jsonl", talks))
    assert talk.messages == (("user", "Hi"), ("assistant", "Ho"))
    later = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "with", "output": "d", "category": "k"}]
    assert [(r.input, r.category) for r in read_table(write_table(tmp_path, "jsonl", later))[0]] == [
        ("", ""),
        ("with", "k"),
    ]
    rows = [{"q": "Ask", "a": "Say", "topic": 7, "instruction": "ignored"}]
    columns = {"instruction": "q", "output": "a", "category": "topic"}
    (record,), _ = read_table(write_table(tmp_path, "json", rows), columns)
    assert (record.instruction, record.input, record.output, record.category) == ("Ask", "", "Say", "7")


@pytest.mark.parametrize(
    ("kind", "content", "columns", "says"),
    [
        ("json", "{}", {}, "not a JSON list"),
        ("json", "[]", {}, "holds no rows"),
        ("json", "[1]", {}, "no column named instruction"),
        ("jsonl", '{"a": 1}\n{"a": ', {}, "broken JSON in line 2"),
        ("jsonl", "", {}, "holds no rows"),
        ("jsonl", '{"q": 1}', {}, "no column named instruction among q: name it with --instruction"),
        ("jsonl", '{"q": 1}', {"output": "x"}, "--output x: .* has the columns q"),
        ("jsonl", '{"instruction": "q", "output": "a"}\n{"instruction": "q"}', {}, "row 2 has an empty output"),
        ("jsonl", '{"instruction": 3, "output": "a"}', {}, "row 1: instruction is a number"),
        ("csv", "instruction,output\nq\n", {}, "row 1 does not have as many cells"),
        ("csv", "instruction,output\nq,a,b\n", {}, "row 1 does not have as many cells"),
        ("csv", 'instruction,output\nq,"a\n', {}, "broken CSV"),
        ("csv", f"instruction,output\nq,{'a' * 10_000_000}\n", {}, "broken CSV"),
        ("csv", "instruction,output\nq,a\0\n", {}, "NUL byte"),
        ("parquet", "nonsense", {}, "not a readable Parquet file"),
    ],
)
def test_a_bad_table_gets_one_line(tmp_path: Path, kind: str, content: str, columns: dict[str, str], says: str):
    path = tmp_path / f"t.{kind}"
    path.write_text(content)
    limit = csv.field_size_limit()
    with pytest.raises(FlexLoraError, match=says) as error:
        read_table(path, columns)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert csv.field_size_limit() == limit


def test_what_is_not_there_gets_one_line(tmp_path: Path, monkeypatch):
    with pytest.raises(FlexLoraError, match="no such file"):
        read_table(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        FlexLoraError, match=r"a Parquet file needs pyarrow: `pip install '\.\[data\]'` in flexlora's clone"
    ):
        read_table(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FlexLoraError, match=r"needs datasets: `pip install '\.\[data\]'` in"):
        read_table("someone/something")


def test_rows_without_an_answer_are_refused_or_dropped(tmp_path: Path):
    path = write_table(tmp_path, "json", [*ALPACA, {**ALPACA[0], "output": ""}])
    with pytest.raises(FlexLoraError, match="row 31 has an empty output: fill it in or pass --drop_empty"):
        partition(path, tmp_path / "out", 3)
    assert not (tmp_path / "out").exists()
    done = partition(path, tmp_path / "out", 3, drop_empty=True)
    assert (done.clients, done.dropped) == (3, 1)


@pytest.mark.parametrize("by", ["iid", "category", "dirichlet:0.5", "shards:2"])
def test_a_partition_on_disk_holds_every_row_once(tmp_path: Path, by: str):
    path = write_table(tmp_path, "jsonl", DOLLY)
    done = partition(path, tmp_path / "a", 4, by, seed=9)
    partition(path, tmp_path / "b", 4, by, seed=9)
    federation = open_federation(tmp_path / "a", 4)
    parts = [(federation.train(c), federation.eval(c), federation.test(c)) for c in range(4)]
    found = [record.output for client in parts for part in client for record in part]
    assert sorted(found) == sorted(row["response"] for row in DOLLY)
    assert done.examples == sum(len(train) for train, _, _ in parts)
    for one in (tmp_path / "a").rglob("*.json"):
        assert one.read_bytes() == (tmp_path / "b" / one.relative_to(tmp_path / "a")).read_bytes()
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["by"], manifest["seed"]) == (30, by, 9)
    assert sum(sum(row["categories"].values()) for row in manifest["clients"]) == 30
    with pytest.raises(FlexLoraError, match="exists already"):
        partition(path, tmp_path / "a", 4, by)
