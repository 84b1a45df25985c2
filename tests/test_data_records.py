"""Reading records: what is right is taken as it is, whatever is wrong gets one line with file, record and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexlora.data.records import Record, parse_records, read_records, to_json
from flexlora.types import FlexLoraError

GOOD = {"instruction": "Add.", "input": "1 1", "output": "2", "category": "sums"}


def test_the_release_format_is_read_as_it_is(tmp_path: Path):
    path = tmp_path / "local_training_0.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "input": "", "output": ["2", "two"], "id": 7}]))
    assert read_records(path) == [
        Record("Add.", "1 1", "2", "sums", ("2",)),
        Record("Add.", "", "2", "sums", ("2", "two")),
    ]


def test_a_conversation_is_read(tmp_path: Path):
    messages = [{"role": r, "content": c} for r, c in (("system", "Brief."), ("user", "Sky?"), ("assistant", "Blue."))]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": messages}]))
    (record,) = read_records(path)
    assert record.messages == (("system", "Brief."), ("user", "Sky?"), ("assistant", "Blue."))
    assert (record.output, record.references) == ("Blue.", ("Blue.",))


def test_an_empty_output_is_taken_only_where_the_instruction_speaks_of_one():
    path = Path("x.json")
    asked = {**GOOD, "instruction": "List the events; if there is none, output should be empty.", "output": ""}
    assert parse_records(path, [asked])[0].output == ""
    with pytest.raises(FlexLoraError, match="record 1 has an empty output"):
        parse_records(path, [{**GOOD, "output": ""}])


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in GOOD.items() if k != key}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"  \n", "the file is empty"),
        (b"[{", "broken JSON at line 1"),
        (b'[{"a": 1},]', "broken JSON"),
        (b"\xef\xbb\xbf[]", "byte order mark"),
        (json.dumps([GOOD]).encode("utf-16"), "byte order mark"),
        (json.dumps([GOOD]).encode("utf-16-le"), "NUL byte at offset 1"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b"[" * 200_000, "cannot be parsed"),
        (b"[" + b"1" * 5000 + b"]", "cannot be parsed"),
        (json.dumps(GOOD).encode(), "an object where a JSON list"),
        (b"null", "null where a JSON list"),
        (b"[]", "holds no record"),
    ],
)
def test_a_bad_file_gets_one_line(tmp_path: Path, content: bytes, says: str):
    path = tmp_path / "local_training_3.json"
    path.write_bytes(content)
    with pytest.raises(FlexLoraError) as error:
        read_records(path)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("text", "is a string, not an object"),
        (None, "is null, not an object"),
        (without("instruction"), "has no instruction"),
        (without("input"), "has no input"),
        (without("output"), "has no output"),
        ({**GOOD, "instruction": " "}, "empty instruction"),
        ({**GOOD, "output": "\n"}, "empty output"),
        ({**GOOD, "output": []}, "empty list as output"),
        ({**GOOD, "output": ["2", ""]}, "empty output"),
        ({**GOOD, "output": 2}, "output is a number, not a string"),
        ({**GOOD, "output": True}, "output is true or false"),
        ({**GOOD, "output": ["2", None]}, "output is null"),
        ({**GOOD, "output": {"a": 1}}, "output is an object"),
        ({**GOOD, "input": None}, "input is null"),
        ({**GOOD, "instruction": ["Add."]}, "instruction is a list"),
        ({**GOOD, "category": 3}, "category is a number"),
        ({**GOOD, "input": "x" * 10_000_000}, "input has 10,000,000 characters"),
        ({**GOOD, "input": "a\0b"}, "input holds a NUL character"),
        ({**GOOD, "output": "a\ud800"}, "lone surrogate at character 1"),
        ({"messages": []}, "messages is not a list of at least"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "not the assistant's"),
        ({"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}, "message 1 has no"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "content of message 2 is null"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty content"),
    ],
)
def test_a_bad_record_gets_one_line_with_its_number(tmp_path: Path, record: Any, says: str):
    path = tmp_path / "local_eval_0.json"
    path.write_text(json.dumps([GOOD, GOOD, record]))
    with pytest.raises(FlexLoraError) as error:
        read_records(path)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{path}: record 3")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(FlexLoraError, match=r"a\.json: cannot be read \(No such file"):
        read_records(tmp_path / "a.json")


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
instruction_records = st.builds(
    lambda i, q, answers, c: Record(i, q, answers[0], c, tuple(answers)),
    words,
    st.just("") | words,
    st.lists(words, min_size=1, max_size=3),
    st.just("") | words,
)


@given(st.lists(instruction_records, min_size=1, max_size=4))
def test_what_is_written_is_read_back(records: list[Record]):
    data = json.loads(json.dumps([to_json(record) for record in records]))
    assert parse_records(Path("x"), data) == records
