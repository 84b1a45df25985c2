"""The registry of methods. The contract itself, `Method`, stands in `flexlora.types`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from flexlora.types import FlexLoraError, Method

ENTRY_POINTS = "flexlora.methods"


@dataclass(frozen=True)
class MethodEntry:
    """One registered method: what `flexlora methods` prints, and the function that makes it."""

    name: str
    make: Callable[..., Method]
    """Called with the method's options by keyword; its signature is the list of options."""
    paper: str
    """arXiv number, or "ours"."""
    summary: str
    """One line: what the server does."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options, without a ``**rest``."""
        return tuple(p.name for p in self._parameters if p.kind is not p.VAR_KEYWORD)

    @property
    def passes_on(self) -> bool:
        """Whether options beyond these go on to another method, which knows them (slora)."""
        return any(p.kind is p.VAR_KEYWORD for p in self._parameters)

    @property
    def _parameters(self) -> tuple[inspect.Parameter, ...]:
        return tuple(inspect.signature(self.make).parameters.values())


_entries: dict[str, MethodEntry] = {}


def register(name: str, make: Callable[..., Method], *, paper: str = "", summary: str = "") -> None:
    """Add a method under a new name. Raises ValueError where the name is taken."""
    if name in _entries:
        raise ValueError(f"a method named {name!r} is registered already: choose another name")
    _entries[name] = MethodEntry(name, make, paper, summary)


_plugins_loaded = False


def _load_plugins() -> None:
    """Third parties register by an entry point whose object is a function without arguments that calls `register`."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for point in entry_points(group=ENTRY_POINTS):
            loaded = point.load()
            if callable(loaded):
                loaded()


def methods() -> tuple[str, ...]:
    """Names of all registered methods, built-in ones first, in the order of registration."""
    _load_plugins()
    return tuple(_entries)


def method_entry(name: str) -> MethodEntry:
    """The registered entry. Raises FlexLoraError with the nearest name where there is none."""
    if name not in methods():
        near = get_close_matches(name, _entries, n=1)
        hint = f"did you mean {near[0]}?" if near else "`flexlora methods` lists them"
        raise FlexLoraError(f"method {name!r} does not exist: {hint}")
    return _entries[name]


def get_method(name: str, **options: Any) -> Method:
    """Make a method, e.g. ``get_method("flexlora-carry", eta=0.5)``.

    Raises FlexLoraError for an unknown name or option.
    """
    entry = method_entry(name)
    for option in options:
        if option not in entry.options and not entry.passes_on:
            known = ", ".join(entry.options) or "none"
            raise FlexLoraError(f"method {name!r} has no option {option!r}: it has {known}")
    return entry.make(**options)
