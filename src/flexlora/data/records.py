"""Reading instruction examples from JSON files, with one line for whatever is wrong in them.

A file is a JSON list of objects: ``{"instruction": str, "input": str, "output": str or list of str, "category": str}``
or ``{"messages": [{"role": str, "content": str}, …], "category": str}`` whose last message is the assistant's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from flexlora.prompts import Record
from flexlora.types import FlexLoraError

MAX_CHARACTERS = 1_000_000
"""Of one string: some 250,000 tokens, far beyond any cutoff; a longer one is a slip, not an example."""

ROLES = ("system", "user", "assistant", "tool")


def read_json(path: Path) -> Any:
    """The parsed file. Raises FlexLoraError with one line that names the file and the remedy."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FlexLoraError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if not raw.strip():
        raise FlexLoraError(f"{path}: the file is empty: write a JSON list of records or remove the file")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise FlexLoraError(f"{path}: starts with a byte order mark (BOM): save it as plain UTF-8 without one")
    if b"\0" in raw:
        raise FlexLoraError(f"{path}: holds a NUL byte at offset {raw.index(0)}: save it as plain UTF-8 text")
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FlexLoraError(f"{path}: not UTF-8 at byte {error.start}: save it as plain UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise FlexLoraError(f"{path}: broken JSON at {where} ({error.msg}): mend or regenerate the file") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FlexLoraError(f"{path}: cannot be parsed ({reason}): mend or regenerate the file") from None


def read_records(path: str | Path, *, allow_empty: bool = False) -> list[Record]:
    """The records of one JSON file, checked. Records are counted from 1 in messages.

    Raises FlexLoraError, one line with file, record and remedy, for broken or empty files, a byte order mark, NUL
    characters, lone surrogates, wrong types, missing or empty fields and strings beyond `MAX_CHARACTERS`. An empty
    output is taken only where the instruction itself speaks of one (Natural Instructions has such tasks).
    `allow_empty`: an empty list is no error (a small client's eval or test file).
    """
    path = Path(path)
    return parse_records(path, read_json(path), allow_empty=allow_empty)


def parse_records(path: Path, data: Any, *, allow_empty: bool = False) -> list[Record]:
    """Check parsed JSON; `path` only names the source in messages."""
    if not isinstance(data, list):
        raise FlexLoraError(f"{path}: holds {_kind(data)} where a JSON list of records belongs: wrap it in [ ]")
    if not data and not allow_empty:
        raise FlexLoraError(f"{path}: the list holds no record: add examples or remove this client")
    return [parse_record(f"{path}: record {number}", item) for number, item in enumerate(data, start=1)]


def parse_record(where: str, item: Any) -> Record:
    """Check one parsed object; `where` names file and record in messages."""
    if not isinstance(item, dict):
        raise FlexLoraError(f"{where} is {_kind(item)}, not an object: write instruction, input and output")
    category = _string(where, "category", item.get("category", ""))
    if "messages" in item:
        return _conversation(where, item["messages"], category)
    for key in ("instruction", "input", "output"):
        if key not in item:
            remedy = ' (may be "")' if key == "input" else ""
            raise FlexLoraError(f"{where} has no {key}: add the field{remedy}")
    instruction = _string(where, "instruction", item["instruction"])
    if not instruction.strip():
        raise FlexLoraError(f"{where} has an empty instruction: fill it in or drop the record")
    output = item["output"]
    answers = output if isinstance(output, list) else [output]
    if not answers:
        raise FlexLoraError(f"{where} has an empty list as output: fill it in or drop the record")
    references = tuple(_string(where, "output", answer) for answer in answers)
    if not all(answer.strip() for answer in references) and not silence_is_asked(instruction):
        raise FlexLoraError(f"{where} has an empty output: fill it in or drop the record")
    return Record(instruction, _string(where, "input", item["input"]), references[0], category, references)


def silence_is_asked(instruction: str) -> bool:
    """Whether an instruction speaks of an empty answer ("…, output should be empty"), so that one may be right."""
    return re.search(r"\b(empty|blank|nothing)\b", instruction, re.IGNORECASE) is not None


def _conversation(where: str, messages: Any, category: str) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise FlexLoraError(f"{where}: messages is not a list of at least a user's and an assistant's message: mend it")
    turns = []
    for place, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            roles = ", ".join(ROLES)
            raise FlexLoraError(f"{where}: message {place} has no role of {roles}: write role and content")
        content = _string(where, f"content of message {place}", message.get("content"))
        if not content.strip():
            raise FlexLoraError(f"{where}: message {place} has an empty content: fill it in or drop the record")
        turns.append((message["role"], content))
    if turns[-1][0] != "assistant":
        raise FlexLoraError(f"{where}: the last message is not the assistant's: end with the answer to train on")
    question = "\n\n".join(content for _, content in turns[:-1])
    answer = turns[-1][1]
    return Record(question, "", answer, category, (answer,), tuple(turns))


def _string(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise FlexLoraError(f"{where}: {key} is {_kind(value)}, not a string: put it in quotes or drop the record")
    if len(value) > MAX_CHARACTERS:
        raise FlexLoraError(
            f"{where}: {key} has {len(value):,} characters (at most {MAX_CHARACTERS:,}): shorten it or drop the record"
        )
    if "\0" in value:
        raise FlexLoraError(f"{where}: {key} holds a NUL character: remove it")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise FlexLoraError(
                f"{where}: {key} holds a lone surrogate at character {error.start}: write the whole character"
            ) from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record, as `read_records` reads it."""
    if record.messages is not None:
        messages = [{"role": role, "content": content} for role, content in record.messages]
        return {"messages": messages, "category": record.category}
    output = list(record.references) if len(record.references) > 1 else record.output
    return {
        "instruction": record.instruction,
        "input": record.input,
        "output": output,
        "category": record.category,
    }
