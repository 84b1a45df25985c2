"""Ray actors: many GPUs or machines of one owner. One actor a slot, each with its own base model.

Needs the extra: `pip install '.[ray]'` in flexlora's clone. Without `ray_address` a Ray of its own is started on this machine and
stopped in the end; with it the actors run wherever the cluster has room, and data and model must have the same path
there (or the model a name that every machine can load).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexlora.client import open_site, perform
from flexlora.config import Config
from flexlora.runners.pool import LostError, PoolRunner, Recipe
from flexlora.types import FlexLoraError, LocalTraining
from flexlora.wire import Parcel

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A busy machine needs more than Ray's defaults.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")
os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "180")
os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", "60")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
import ray
from ray.exceptions import RayError


def ray_runner(config: Config, kept: Path, clients: Sequence[int], settings: LocalTraining) -> RayRunner:
    """`config.workers` actors. Raises FlexLoraError where the cluster cannot be reached."""
    threads = max(1, torch.get_num_threads() // config.workers) if config.ray_address is None else 1
    place: dict[str, Any] = {"address": config.ray_address} if config.ray_address else {"address": "local"}
    if config.ray_address is None:
        place |= {"num_cpus": config.workers * threads, "include_dashboard": False}
    try:
        ray.init(**place, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except Exception as error:  # Ray raises bare Exceptions here
        where = config.ray_address or "a Ray on this machine"
        raise FlexLoraError(
            f"ray_address: {where} cannot be reached ({' '.join(str(error).split())[:200]}); "
            "check the address, or choose --runner local"
        ) from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(places(machine, threads, config.worker_gpus) for machine in machines)
    if room < config.workers:  # Ray would wait for it without a word
        ray.shutdown()
        needs = f"{threads} CPUs" + (f" and {config.worker_gpus:g} GPUs" if config.worker_gpus else "")
        raise FlexLoraError(
            f"workers: Ray has room for {room} of {config.workers} that need {needs} each; lower --workers or "
            "--worker_gpus, or have more machines join first"
        )
    recipe = Recipe(config, kept.resolve(), threads)
    return RayRunner(
        lambda number: Actor(recipe),
        ready,
        slots=config.workers,
        clients=clients,
        config=config,
        settings=settings,
    )


def places(machine: Mapping[str, float], cpus: int, gpus: float) -> int:
    """Workers that one machine has room for; a share of a GPU lies on one GPU."""
    found = int(machine.get("CPU", 0.0) / cpus + 1e-6)
    if not gpus:
        return found
    there = machine.get("GPU", 0.0)
    return min(found, int(there) * int(1 / gpus + 1e-6) if gpus < 1 else int(there / gpus + 1e-6))


class RayRunner(PoolRunner):
    """A pool of actors, and the connection to Ray."""

    def close(self) -> None:
        super().close()
        ray.shutdown()


class Desk:
    """What runs inside an actor: one site, parcel after parcel."""

    def __init__(self, facts: str) -> None:
        given = json.loads(facts)
        torch.set_num_threads(given["threads"])
        self.error = ""
        try:
            self.site = open_site(Config(**given["config"]), Path(given["kept"]))
        except FlexLoraError as error:
            self.error = str(error)

    def perform(self, facts: str, adapter: bytes, base_delta: bytes) -> tuple[str, bytes, bytes]:
        if self.error:
            return json.dumps({"error": self.error}), b"", b""
        answer = perform(self.site, Parcel(facts, adapter, base_delta))
        return answer.facts, answer.adapter, answer.base_delta


class Actor:
    """A slot: one actor, placed by Ray."""

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.config
        data = str(config.data.resolve()) if config.data else None
        given = {"config": {**config.dump(), "data": data}, "kept": str(recipe.kept), "threads": recipe.threads}
        # Ray shows an actor only the GPUs that it was given, so that "auto" is right there.
        options = ray.remote(num_cpus=recipe.threads, num_gpus=config.worker_gpus, max_restarts=0)
        self.handle: Any = options(Desk).remote(json.dumps(given))
        self.answer: Any = None

    def send(self, parcel: Parcel) -> None:
        self.answer = self.handle.perform.remote(*parcel)

    def receive(self) -> Parcel:
        """Raises FlexLoraError where the actor could not open its model or data."""
        try:
            parcel = Parcel(*ray.get(self.answer))
        except RayError as error:
            raise LostError(type(error).__name__) from None
        facts = json.loads(parcel.facts)
        if "error" in facts:
            raise FlexLoraError(f"Ray actor: {facts['error']}")
        return parcel

    def close(self) -> None:
        ray.kill(self.handle, no_restart=True)


def ready(actors: Sequence[Actor]) -> Sequence[Actor]:
    """Those that have an answer or died; waits for one."""
    done, _ = ray.wait([actor.answer for actor in actors], num_returns=1)
    return [actor for actor in actors if actor.answer in done]
