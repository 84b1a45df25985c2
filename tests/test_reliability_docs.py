"""The tables of docs/reliability.md name tests that exist, in the file that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def rows() -> list[tuple[str, list[str]]]:
    """(file that the table's heading names, cells) of every row."""
    found: list[tuple[str, list[str]]] = []
    file = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []
        if cells and (heading := re.fullmatch(r"test \(`(\w+\.py)`\)", cells[-1])):
            file = heading[1]
        elif cells:
            found.append((file, cells))
    return found


def named() -> list[tuple[str, str, str]]:
    """(row, file, test) of every test in a table's last column: of the heading's file, or of one named before it."""
    found: list[tuple[str, str, str]] = []
    for file, cells in rows():
        for word in re.findall(r"`([^`]+)`", cells[-1]):
            if word.endswith(".py"):
                file = word
            else:
                found.append((cells[0], file, word))
    return found


def defined_in(file: str) -> set[str]:
    return set(re.findall(r"^def test_(\w+)\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE))


def test_every_row_names_a_test() -> None:
    assert len(rows()) > 25
    assert {cells[0] for _, cells in rows()} == {row for row, _, _ in named()}


@pytest.mark.parametrize(("row", "file", "test"), named())
def test_a_named_test_exists(row: str, file: str, test: str) -> None:
    assert test in defined_in(file), row
