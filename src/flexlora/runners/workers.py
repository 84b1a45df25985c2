"""Worker processes on this machine: `--workers N` trains N clients at once.

Each worker loads the base model once; its weights are memory-mapped where the model's folder has them in the precision
of the run, so that the workers share them. Tasks and answers are `Parcel`s over a socket pair: JSON and safetensors.
The cores are shared out: every worker computes with ⌊threads / N⌋ threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from flexlora.client import open_site, perform
from flexlora.config import Config
from flexlora.runners.pool import LostError, PoolRunner, Recipe
from flexlora.types import FlexLoraError, LocalTraining
from flexlora.wire import Parcel

PATIENCE = 5.0
"""Seconds that a worker has to leave by itself."""


def worker_runner(config: Config, kept: Path, clients: Sequence[int], settings: LocalTraining) -> PoolRunner:
    """`config.workers` processes, started now, which load their models while this one goes on."""
    threads = max(1, torch.get_num_threads() // config.workers)
    recipe = Recipe(config, kept, threads)
    return PoolRunner(
        lambda number: Worker(recipe, number),
        ready,
        slots=config.workers,
        clients=clients,
        config=config,
        settings=settings,
    )


class Worker:
    """A child process that performs one parcel after the other."""

    def __init__(self, recipe: Recipe, number: int) -> None:
        self.connection, theirs = Pipe()
        handle = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flexlora.runners.workers", str(handle)],
            pass_fds=[handle],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(recipe.threads)},
        )
        theirs.close()
        facts = {
            "config": {**recipe.config.dump(), "device": device(recipe.config.device, number)},
            "kept": str(recipe.kept),
            "threads": recipe.threads,
        }
        self.connection.send_bytes(json.dumps(facts).encode())

    def send(self, parcel: Parcel) -> None:
        try:
            send(self.connection, parcel)
        except OSError as error:
            raise LostError(str(error)) from None

    def receive(self) -> Parcel:
        """Raises FlexLoraError where the worker could not open its model or data."""
        try:
            parcel = receive(self.connection)
        except (EOFError, OSError):
            code = self.process.wait()
            raise LostError(f"exit code {code}") from None
        facts = json.loads(parcel.facts)
        if "error" in facts:
            raise FlexLoraError(f"worker: {facts['error']}")
        return parcel

    def close(self) -> None:
        self.connection.close()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def device(named: str, number: int) -> str:
    """The device of slot `number`: the GPUs in turn where the configuration leaves the choice open."""
    if named in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return named


def ready(workers: Sequence[Worker]) -> Sequence[Worker]:
    """Those that have an answer or died; waits for one."""
    answering = wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in answering]


def send(connection: Connection, parcel: Parcel) -> None:
    for part in (parcel.facts.encode(), parcel.adapter, parcel.base_delta):
        connection.send_bytes(part)


def receive(connection: Connection) -> Parcel:
    facts, adapter, base_delta = (connection.recv_bytes() for _ in range(3))
    return Parcel(facts.decode(), adapter, base_delta)


def main(handle: int) -> None:
    """The worker: opens its site, then performs parcels until the other side hangs up."""
    # Interrupts are the parent's business; it hangs up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(handle)
    facts = json.loads(connection.recv_bytes())
    torch.set_num_threads(facts["threads"])
    try:
        site = open_site(Config(**facts["config"]), Path(facts["kept"]))
    except FlexLoraError as error:
        send(connection, Parcel(json.dumps({"error": str(error)})))
        return
    try:
        while True:
            send(connection, perform(site, receive(connection)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main(int(sys.argv[1]))
