"""The registry of methods. The contract itself, `Method`, stands in `flexlora.types`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from flexlora.types import ClientUpdate, FlexLoraError, LowRank, Method

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
_plugins: set[str] = set()
"""Entry points that are loaded."""


def _load_plugins() -> None:
    """Third parties register by an entry point whose object is a function without arguments that calls `register`."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True  # first: what is loaded may ask for methods itself
        for point in entry_points(group=ENTRY_POINTS):
            if repr(point) in _plugins:  # before one that failed
                continue
            try:
                loaded = point.load()
                if callable(loaded):
                    loaded()
            except Exception as error:
                _plugins_loaded = False
                reason = f"{type(error).__name__}: {error}"
                raise FlexLoraError(
                    f"the method of package {point.dist.name if point.dist else point.value} cannot be loaded ({reason}); "
                    "mend or uninstall that package"
                ) from error
            _plugins.add(repr(point))


def methods() -> tuple[str, ...]:
    """Names of all registered methods, built-in ones first, in the order of registration."""
    _load_plugins()
    return tuple(_entries)


def method_entry(name: str) -> MethodEntry:
    """The registered entry. Raises FlexLoraError with the nearest name where there is none."""
    if name not in methods():
        near = get_close_matches(str(name), _entries, n=1)
        hint = f"did you mean {near[0]}?" if near else "`flexlora methods` lists them"
        raise FlexLoraError(f"method {name!r} does not exist: {hint}")
    return _entries[name]


def get_method(name: str, /, **options: Any) -> Method:
    """Make a method, e.g. ``get_method("flexlora-carry", eta=0.5)``.

    Raises FlexLoraError for an unknown name or option, and for a value of another type than the option's.
    """
    entry = method_entry(name)
    kinds = _hints(entry.make)
    for option in options:
        if option not in entry.options and not entry.passes_on:
            known = ", ".join(entry.options) or "none"
            raise FlexLoraError(f"method {name!r} has no option {option!r}: it has {known}")
    return entry.make(**{option: _checked(name, option, value, kinds.get(option)) for option, value in options.items()})


def _finite(x: Any) -> bool:
    try:
        return math.isfinite(x)
    except OverflowError:  # a whole number beyond all floats
        return False


KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda x: isinstance(x, bool)),
    int: ("a whole number", lambda x: isinstance(x, Integral) and not isinstance(x, bool)),
    float: ("a number", lambda x: isinstance(x, Real) and not isinstance(x, bool) and _finite(x)),
    str: ("a word", lambda x: isinstance(x, str)),
    type(None): ("null", lambda x: x is None),
}
"""Annotation of an option -> what it is called, and whether a value is one."""


def _checked(name: str, option: str, value: Any, kind: Any) -> Any:
    """The value of an option annotated as `kind`; kinds other than those in `KINDS` are the method's own to check."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if not all(isinstance(member, type) and member in KINDS for member in members):
        return value
    if isinstance(value, str) and str not in members:  # YAML reads 1e-3 and none as words
        value = _said(value, members)
    if not any(KINDS[member][1](value) for member in members):
        wanted = " or ".join(KINDS[member][0] for member in members)
        raise FlexLoraError(f"method {name!r}: {option} is {value!r}, it must be {wanted}")
    return value


def _said(text: str, members: Collection[type]) -> Any:
    if text.lower() == "none" and type(None) in members:
        return None
    try:
        return float(text) if float in members else text
    except ValueError:
        return text


def _hints(make: Callable[..., Method]) -> Mapping[str, Any]:
    try:
        return get_type_hints(make)
    except Exception:  # somebody else's, in words that are no types, or with names that are not there
        return {}


def started(method: Method, state: Any, adapter: Mapping[str, LowRank]) -> Any:
    """The state whose global delta weight is the adapter's, as if one client had answered with it in the first round.

    Raises what the method's `aggregate` raises for an adapter that it cannot start from.
    """
    nothing = {m: LowRank(torch.zeros_like(x.B), torch.zeros_like(x.A)) for m, x in adapter.items()}
    update = ClientUpdate(-1, 1.0, adapter, sent=nothing, scaling=dict.fromkeys(adapter, 1.0))
    return (method.start or method.aggregate)(state, [update])
