"""Federated fine-tuning of large language models where every client has its own LoRA rank.

``from flexlora import run, Config``; nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexlora import processor

if TYPE_CHECKING:
    from flexlora.config import Config
    from flexlora.launch import resume, run
    from flexlora.rundir import Run
    from flexlora.types import FlexLoraError

processor.settle()

__version__ = "0.1.0"
__all__ = ["Config", "FlexLoraError", "Run", "resume", "run"]

_homes = {
    "Config": "flexlora.config",
    "FlexLoraError": "flexlora.types",
    "Run": "flexlora.rundir",
    "resume": "flexlora.launch",
    "run": "flexlora.launch",
}


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))


def __getattr__(name: str) -> Any:
    if name in _homes:
        return getattr(import_module(_homes[name]), name)
    raise AttributeError(f"module 'flexlora' has no attribute {name!r}")
