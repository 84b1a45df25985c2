"""The reference pages, written from the code while the site is built: mkdocs calls `on_files` (hooks in mkdocs.yml).

They are in no folder of the repository, so they cannot be out of date. In a terminal, `flexlora COMMAND --help` says the same.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from flexlora.cli import app
from flexlora.config import Config, key_aliases, key_group

MODULES = (
    "flexlora", "flexlora.types", "flexlora.methods.base", "flexlora.lowrank", "flexlora.ranks", "flexlora.modeling",
    "flexlora.training", "flexlora.evaluation", "flexlora.rundir", "flexlora.trained", "flexlora.spectrum",
    "flexlora.memory", "flexlora.report",
)  # fmt: skip
"""Modules whose public names the Python reference shows."""


def command_line() -> str:
    text = app.generate_docs(output_format="markdown")
    return text.replace("# flexlora\n", "# Command line\n", 1)


def configuration() -> str:
    parts = [
        "# Configuration keys\n\nThe same keys in a YAML file, as options of `flexlora run` and as arguments of "
        "`flexlora.Config`. Old names are those of the original FlexLoRA release; they are accepted everywhere. "
        "`null` means that the value is chosen from the data or the model.\n"
    ]
    groups = dict.fromkeys(key_group(name) for name in Config.model_fields)
    for group in groups:
        parts.append(f"\n## {group}\n\n| key | default | old name | meaning |\n|---|---|---|---|\n")
        for name, info in Config.model_fields.items():
            if key_group(name) == group:
                default = info.get_default(call_default_factory=True)
                shown = json.dumps(str(default) if isinstance(default, Path) else default)
                old = ", ".join(f"`{alias}`" for alias in key_aliases(name))
                meaning = " ".join((info.description or "").split()).replace("|", "\\|")
                parts.append(f"| `{name}` | `{shown}` | {old} | {meaning} |\n")
    return "".join(parts)


def public_names(module: ModuleType) -> list[str]:
    """What the module exports: its __all__, or the functions, classes and constants that it defines without a leading _."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    found = vars(module).items()
    return [n for n, x in found if not n.startswith("_") and getattr(x, "__module__", None) == module.__name__]


def signature(x: Any) -> str:
    try:
        text = str(inspect.signature(x))
    except (TypeError, ValueError):
        return ""
    # Addresses and full names of modules are noise.
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"\b(?:[a-z_]+\.)+([A-Z]\w*)", r"\1", text).replace("'", "")


def entry(name: str, x: Any) -> str:
    if inspect.isclass(x):
        doc = inspect.cleandoc(x.__doc__ or "")
        text = f"### {name}\n\n{doc}\n"
        if issubclass(x, BaseModel) or issubclass(x, Exception):
            return text
        methods = [
            f"- `{method}{signature(m)}`: {' '.join((inspect.getdoc(m) or '').split())}\n"
            for method, m in vars(x).items()
            if inspect.isfunction(m) and not method.startswith("_") and m.__doc__
        ]
        return f"{text}\n{''.join(methods)}" if methods else text
    doc = inspect.getdoc(x) or ""
    return f"### {name}\n\n```python\n{name}{signature(x)}\n```\n\n{doc}\n"


def python() -> str:
    parts = ["# Python\n\nThe public names of the modules, with their docstrings.\n"]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"\n## {name}\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        for public in public_names(module):
            x = getattr(module, public)
            if inspect.isclass(x) or inspect.isfunction(x):
                parts.append("\n" + entry(public, x))
    return "".join(parts)


def pages() -> dict[str, str]:
    """Path within docs/ -> text of the page."""
    made = {"command-line": command_line(), "configuration": configuration(), "python": python()}
    return {f"reference/{name}.md": text.rstrip() + "\n" for name, text in made.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs' hook: the pages join those of the folder."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
