"""What commands share: the configuration keys as options, how a run is shown, the console, the next step."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import Group, Parameter
from rich.console import Console

from flexlora.config import Config, key_aliases, key_group
from flexlora.types import FlexLoraError

GROUPS = ("Model", "Data", "Federation", "Method", "LoRA", "Local training", "Evaluation", "Trust", "Running")
LISTS = ("lora_target_modules", "method_options", "client_memory")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

OUTPUT = Group("Output", sort_key=len(GROUPS))
Quiet = Annotated[bool, Parameter(help="Print nothing while it works.", negative="", group=OUTPUT)]
Json = Annotated[
    bool, Parameter(name="--json", help="One JSON event a line on standard output.", negative="", group=OUTPUT)
]
Track = Annotated[
    list[str] | None,
    Parameter(
        help="Record the run in tensorboard, wandb, mlflow or trackio (several: --track tensorboard mlflow).",
        negative="",
        consume_multiple=True,
        group=OUTPUT,
    ),
]


@contextmanager
def shown(quiet: bool, json: bool, track: list[str] | None) -> Iterator[Any]:
    """The observer of a run: what it prints, and the trackers that were asked for."""
    from flexlora.display import display
    from flexlora.tracking import tracked

    names = [name for part in track or () for name in part.split(",") if name]
    with display("json" if json else "quiet" if quiet else "auto", out) as notify, tracked(names, notify) as observe:
        yield observe


def config_keys(function: Callable[..., Any], show: bool = True) -> Callable[..., Any]:
    """Give a command one option for every configuration key, under its new, its old and its dashed name.

    `show`: whether --help lists them. Values stay text here; `Config` types and checks them, the same way as those of a YAML file.
    """
    groups = {name: Group(name, sort_key=i) for i, name in enumerate(GROUPS)}
    parameters = []
    for name, info in Config.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = (
            ""
            if default in (None, {})
            else f" Default: {' '.join(default) if isinstance(default, tuple) else default}."
        )
        option = Parameter(
            name=[f"--{spelling}" for spelling in (name, *key_aliases(name))],
            metavar=_metavar(info.annotation),
            help=f"{' '.join((info.description or '').split())}{shown}",
            group=groups[key_group(name)],
            show=show,
            show_default=False,
            negative="",
            consume_multiple=name in LISTS,
            allow_leading_hyphen=False,
        )
        # Choices are told to the shell's completion too.
        one: Any = info.annotation if get_origin(info.annotation) is Literal else str
        kind = list[str] | None if name in LISTS else one | None
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    everything = sorted([*own, *parameters], key=lambda p: p.kind)
    function.__signature__ = inspect.Signature(everything)  # pyright: ignore[reportFunctionMemberAccess]
    function.__annotations__ = {p.name: p.annotation for p in everything}
    return function


def _metavar(kind: Any) -> str:
    """What --help shows for a key's value: the choices of a Literal, or the type."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    named = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not tuple else []
    plain = named[0] if named else kind
    return {bool: "true|false", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}.get(plain, "TEXT…")


def given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def refuse_unwritable(path: Path, option: str) -> None:
    """Raise FlexLoraError where a file cannot be written: asked before the work whose result it is to hold."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "is a folder" if path.is_dir() else f"{path.parent} is no folder that can be written to"
        raise FlexLoraError(f"{path}: cannot be written: {reason}; choose another --{option}")


def write_file(path: Path, text: str, option: str) -> None:
    """Write what the option `option` named. Raises FlexLoraError where the disk refuses."""
    from flexlora.rundir import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise FlexLoraError(
            f"{path}: cannot be written: {error.strerror or error}; choose another --{option}"
        ) from None


def next_step(*commands: str) -> None:
    """Names the commands that people usually want next; one line each, never wrapped, so that they can be copied."""
    for i, command in enumerate(commands):
        out.print(f"{'' if i else 'next:':5} {command}", markup=False, soft_wrap=True)
