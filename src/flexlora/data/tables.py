"""Rows of instruction data from JSON, JSON lines, CSV, Parquet or a data set of the `datasets` library."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora.data.records import MAX_CHARACTERS, Record, parse_record, read_json, silence_is_asked
from flexlora.types import FlexLoraError

KNOWN_COLUMNS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "category": ("category",),
    "messages": ("messages",),
}
"""Field -> column names understood without a flag: Alpaca's and Dolly's."""


def read_table(
    source: str | Path, columns: Mapping[str, str] | None = None, *, drop_empty: bool = False
) -> tuple[list[Record], int]:
    """(records, rows left out for an empty answer).

    `source` is a file ending in .json (a list), .jsonl or .ndjson, .csv or .tsv (with a header), .parquet, or else a
    folder or a name that `datasets` can load (its train split). `columns` maps instruction, input, output, category or
    messages to column names; the others go by `KNOWN_COLUMNS`. A missing input is an empty one. `drop_empty` leaves
    rows without an answer out instead of refusing them. Raises FlexLoraError with one line that names file and row.
    """
    rows = _rows(str(source))
    if not rows:
        raise FlexLoraError(f"{source}: holds no rows: give a file with examples")
    names = _columns(str(source), rows, columns or {})
    records: list[Record] = []
    dropped = 0
    for number, row in enumerate(rows, start=1):
        where = f"{source}: row {number}"
        if not isinstance(row, dict):
            raise FlexLoraError(f"{where} is not an object with columns: write one object a row")
        item = {field: row.get(column) for field, column in names.items()}
        category = item.get("category")
        item["category"] = "" if category is None else str(category)
        if "messages" not in item:
            item["input"] = item["input"] if item.get("input") is not None else ""
            if _is_empty(item):
                if not drop_empty:
                    raise FlexLoraError(f"{where} has an empty {names['output']}: fill it in or pass --drop_empty")
                dropped += 1
                continue
        records.append(parse_record(where, item))
    if not records:
        raise FlexLoraError(f"{source}: no row has an answer: check --output")
    return records, dropped


def read_prompts(source: str | Path) -> list[Record]:
    """Instructions to be answered, with their inputs: a text file of one a line, or a table as `read_table` takes them.

    Blank lines are left out; answers that a table has are not read. Raises FlexLoraError with one line that names file
    and row.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise FlexLoraError(f"{path}: no such file: give the path of a text file or a table")
        rows: Sequence[Any] = [
            {"instruction": line.strip()} for line in re.split(r"\r\n|\r|\n", _text(path)) if line.strip()
        ]
    else:
        rows = _rows(str(source))
    if not rows:
        raise FlexLoraError(f"{path}: holds no instruction: write one a line")
    prompts = []
    for number, row in enumerate(rows, start=1):
        there = row if isinstance(row, dict) else {}
        fields = [next((there[c] for c in KNOWN_COLUMNS[f] if there.get(c)), "") for f in ("instruction", "input")]
        if not fields[0] or not all(isinstance(text, str) and len(text) <= MAX_CHARACTERS for text in fields):
            raise FlexLoraError(f"{path}: row {number} has no instruction that is a text: name that column instruction")
        prompts.append(Record(fields[0], fields[1], ""))
    return prompts


def _is_empty(item: Mapping[str, Any]) -> bool:
    output = item["output"]
    empty = output is None or output == [] or (isinstance(output, str) and not output.strip())
    return empty and not (output == "" and silence_is_asked(str(item["instruction"])))


def _columns(source: str, rows: Sequence[Any], chosen: Mapping[str, str]) -> dict[str, str]:
    """Field -> column, of those that any row has: a row may lack what is empty in it."""
    there = list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))
    for field, column in chosen.items():
        if column not in there:
            raise FlexLoraError(f"--{field} {column}: {source} has the columns {', '.join(there)}")
    names = {field: next((n for n in known if n in there), "") for field, known in KNOWN_COLUMNS.items()}
    names.update(chosen)
    if names["messages"] and not any(field in chosen for field in ("instruction", "output")):
        return {field: names[field] for field in ("messages", "category") if names[field]}
    for field in ("instruction", "output"):
        if not names[field]:
            raise FlexLoraError(
                f"{source}: no column named {' or '.join(KNOWN_COLUMNS[field])} among {', '.join(there)}: "
                f"name it with --{field}"
            )
    return {field: column for field, column in names.items() if column and field != "messages"}


def _rows(source: str) -> Sequence[Any]:
    path = Path(source)
    kind = path.suffix.lower()
    if kind not in (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        return _data_set(source)
    if not path.is_file():
        raise FlexLoraError(f"{source}: no such file: give the path of a data file")
    if kind == ".json":
        data = read_json(path)
        if not isinstance(data, list):
            raise FlexLoraError(f"{source}: is not a JSON list of objects: wrap the rows in [ ] or name it .jsonl")
        return data
    if kind == ".parquet":
        parquet = _optional("pyarrow.parquet", "a Parquet file")
        try:
            return parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
            raise FlexLoraError(f"{source}: not a readable Parquet file ({_line(error)}): write it anew") from None
    text = _text(path)
    return _json_lines(path, text) if kind in (".jsonl", ".ndjson") else _csv(path, text, kind)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FlexLoraError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if b"\0" in raw:
        raise FlexLoraError(f"{path}: holds a NUL byte at offset {raw.index(0)}: save it as plain UTF-8 text")
    try:
        return raw.decode("utf-8-sig")  # spreadsheets write CSV with a byte order mark
    except UnicodeDecodeError as error:
        raise FlexLoraError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None


def _json_lines(path: Path, text: str) -> list[Any]:
    rows = []
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise FlexLoraError(f"{path}: broken JSON in line {number} ({_line(error)}): mend the line") from None
    return rows


def _csv(path: Path, text: str, kind: str) -> list[dict[str, str]]:
    limit = csv.field_size_limit(2 * MAX_CHARACTERS)  # the longest string is refused later, with its row
    try:
        # Not splitlines: U+2028 and its like may stand inside a cell.
        lines = io.StringIO(text, newline="")
        reader = csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
        rows = list(reader)
    except csv.Error as error:
        raise FlexLoraError(f"{path}: broken CSV ({_line(error)}): mend the quotes or write it anew") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise FlexLoraError(f"{path}: row {number} does not have as many cells as the header: mend its quotes")
    return rows


def _data_set(source: str) -> Sequence[Any]:
    datasets = _optional("datasets", f"the data set {source}")
    path = Path(source)
    try:
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
        if isinstance(loaded, dict):
            loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
        return loaded.to_list()
    except Exception as error:  # whatever builders, file systems and networks raise
        raise FlexLoraError(
            f"{source}: `datasets` cannot load it ({_line(error)}): "
            "give a .json, .jsonl, .csv or .parquet file, a saved data set, or the name of one that is in its cache"
        ) from None


def _optional(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise FlexLoraError(f"{what} needs {package}: `pip install '.[data]'` in flexlora's clone") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
