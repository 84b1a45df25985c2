"""Which runner a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from flexlora.client import Site
from flexlora.config import Config
from flexlora.runners.local import LocalRunner
from flexlora.runners.pool import PoolRunner
from flexlora.types import FlexLoraError, LocalTraining


def refuse_runner(config: Config) -> None:
    """Raise FlexLoraError where this process cannot start the configured runner."""
    if config.runner == "flower":
        raise FlexLoraError(
            "runner: a federation is started by Flower: `flexlora flower init DIR` writes the app and the commands"
        )
    if config.runner == "ray" and find_spec("ray") is None:
        raise FlexLoraError(
            "runner: ray is not installed; `pip install '.[ray]'` in flexlora's clone, or choose --runner local"
        )


def open_runner(
    config: Config, site: Site, clients: Sequence[int], settings: LocalTraining
) -> LocalRunner | PoolRunner:
    """The runner, its processes started. `site` is what this process has loaded already."""
    if config.runner == "ray":
        from flexlora.runners.ray import ray_runner

        return ray_runner(config, site.kept, clients, settings)
    if config.workers > 1:
        from flexlora.runners.workers import worker_runner

        return worker_runner(config, site.kept, clients, settings)
    return LocalRunner(site, clients, settings)
