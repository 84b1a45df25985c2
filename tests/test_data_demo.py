"""The built-in federation: answers checked by rules of their own, nothing shared between files."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest

from flexlora.data.demo import CLIENT_FAMILIES, UNSEEN_FAMILIES, Family, examples, in_words, write_demo
from flexlora.data.federation import open_federation
from flexlora.data.records import Record
from flexlora.types import FlexLoraError

FAMILIES = {family.name: family for family in CLIENT_FAMILIES + UNSEEN_FAMILIES}
NUMBERS = {in_words(n): n for n in range(100)}


def is_right(record: Record) -> bool:
    """Whether the answer is right, read back from the text."""
    question, answer = record.input, record.output
    items = question.split(", ")
    match record.category:
        case "list reversal":
            return answer.split(", ")[::-1] == items
        case "sorting":
            return answer.split(" < ") == sorted(items)
        case "counting":
            said = [part.split() for part in answer.split(" and ")]
            words = [word for number, word in said for _ in range(NUMBERS[number])]
            return sorted(words) == sorted(question.split()) and len(said) == 2
        case "arithmetic in words":
            found = re.fullmatch(r"(\S+) plus (\S+) makes (\S+)", answer)
            assert found
            a, b, c = (NUMBERS[word] for word in found.groups())
            return a + b == c and question == f"{a} + {b}"
        case "date normalisation":
            return datetime.strptime(question, "%B %d, %Y").date().isoformat() == answer
        case "unit normalisation":
            left, right = answer.split(" = ")
            factor = {"km m": 1000, "kg g": 1000, "m cm": 100, "hours minutes": 60}[
                f"{left.split()[1]} {right.split()[1]}"
            ]
            return left == question and int(left.split()[0]) * factor == int(right.split()[0])
        case "extraction":
            found = re.fullmatch(r"who: (\w+); what: (\w+); where: (\w+)", answer)
            assert found
            who, what, where = found.groups()
            return re.fullmatch(rf"{who} bought an? {what} in {where}\.|In {where}, {who} lost an? {what}\.", question) is not None  # fmt: skip  # noqa: E501
        case "rule-based classification":
            item, kilos = items
            return answer == f"{item}: {'light' if int(kilos.removesuffix(' kg')) < 10 else 'heavy'} parcel"
        case "last item":
            return answer == items[-1]
        case "string edit":
            return answer.split(" and ") == question.split(" and ")[::-1]
        case "largest number":
            return int(answer) == max(map(int, items))
        case "place":
            return f" lives in {answer} and" in question
    return False


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_answer_is_right(family: Family):
    for seed in range(3):
        records = examples(family, 60, seed)
        assert len({record.input for record in records}) == 60
        for record in records:
            assert is_right(record), record
            assert record.instruction == family.instruction


def test_numbers_in_words():
    assert [in_words(n) for n in (0, 11, 19, 20, 21, 47, 99)] == [
        "zero",
        "eleven",
        "nineteen",
        "twenty",
        "twenty-one",
        "forty-seven",
        "ninety-nine",
    ]


def test_eight_clients_with_a_family_each_four_held_out_and_nothing_twice(tmp_path: Path):
    write_demo(tmp_path / "data", seed=3)
    federation = open_federation(tmp_path / "data", 8)
    seen: list[tuple[str, str]] = []
    families = []
    for client in federation.clients:
        parts = federation.train(client), federation.eval(client), federation.test(client)
        assert all(parts)
        (family,) = {record.category for part in parts for record in part}
        families.append(family)
        seen += [(record.instruction, record.input) for part in parts for record in part]
    unseen = federation.global_test()
    assert families == [family.name for family in CLIENT_FAMILIES]
    assert {record.category for record in unseen} == {family.name for family in UNSEEN_FAMILIES}
    seen += [(record.instruction, record.input) for record in unseen]
    assert len(set(seen)) == len(seen)
    assert len(FAMILIES) == 12
    assert len({len(federation.train(client)) for client in federation.clients}) > 4  # clients weigh differently


def test_the_seed_decides_the_bytes_and_an_existing_folder_is_refused(tmp_path: Path):
    def content(name: str, seed: int) -> dict[str, bytes]:
        write_demo(tmp_path / name, seed=seed)
        folder = tmp_path / name
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}

    assert content("a", 1) == content("b", 1)
    assert content("c", 2)["8/local_training_0.json"] != content("d", 1)["8/local_training_0.json"]
    with pytest.raises(FlexLoraError, match="exists already"):
        write_demo(tmp_path / "a", seed=1)
