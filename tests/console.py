"""The command line as a user has it, in this process; the fixture `command` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    code: int
    said: str
    error: str


Command = Callable[..., Done]


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    assert done.error.count("\n") == 1, done.error
    for part in parts:
        assert part in done.error
