"""Seconds a round and peak memory by number of clients and runner, on a tiny model: what is not training is the runner's.

    python benchmarks/scaling.py --clients 4 16 64 256 --runners local workers ray flower

Each case is a run of two rounds in processes of its own, all clients in every round; the second round is shown. Local has
one slot, the others two of one thread each; flower is Flower's simulation. pure_s is the sum of the seconds
that the clients worked over the slots, overhead_s all else of the round; aggregate_s with the checks of what arrives, which
with more than one slot goes on while others train. Memory is the sum of the proportional set sizes of all processes,
sampled twice a second. load is the machine's load average at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flexlora.rundir import read_metrics
from flexlora.runners.flower_folder import write_folder

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from federation import PATIENCE, descendants, living_in  # pyright: ignore[reportMissingImports]
from tiny import tiny_federation, tiny_model  # pyright: ignore[reportMissingImports]

RUNNERS: dict[str, dict[str, Any]] = {
    "local": {},
    "workers": {"workers": 2},
    "ray": {"runner": "ray", "workers": 2},
}

CASE = """
import json, sys
import torch
from flexlora import Config, run
keys = json.loads(sys.argv[1])
torch.set_num_threads(keys.pop("threads"))
run(Config(**keys))
"""


def memory(processes: list[int]) -> float:
    """Megabytes of processes, shared pages counted once."""
    total = 0
    for process in processes:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def measure(folder: Path, model: Path, clients: int, runner: str, threads: int) -> dict[str, float]:
    data = folder / f"data-{clients}"
    if not data.exists():
        tiny_federation(data, clients, train=4)
    keys = {
        "model": str(model),
        "data": str(data),
        "output_dir": str(folder / "runs"),
        "name": f"{runner}-{clients}",
        "rounds": 2,
        "participation": 1.0,
        "ranks": "random",
        "eval_every": 0,
        "early_stop": False,
        "validation_examples": 1,
        "prompt_template": "chat",
    }
    begin = time.perf_counter()
    if runner == "flower":
        peak = simulation(folder / f"flower-{clients}", keys, clients, threads)
    else:
        given = {**keys, **RUNNERS[runner], "threads": threads}
        peak = watched([sys.executable, "-c", CASE, json.dumps(given)], lambda pid: [pid, *descendants(pid)])
    whole = time.perf_counter() - begin
    lines = read_metrics(folder / "runs" / f"{runner}-{clients}")
    if len(lines) < 2:  # `flwr run` ends with 0 whatever became of the run
        raise SystemExit(f"{runner} with {clients} clients played {len(lines)} of 2 rounds; see its log above")
    line = lines[-1]
    assert len(line["clients"]) == clients, line.get("failed")
    seconds = line["seconds"]
    slots = threads if runner == "flower" else RUNNERS[runner].get("workers", 1)
    training = sum(c["seconds"] for c in line["clients"]) / slots
    return {
        "round_s": sum(seconds.values()),
        "pure_s": training,
        "overhead_s": sum(seconds.values()) - training,
        "aggregate_s": seconds["aggregate"] + seconds["distribute"],
        "peak_mb": peak,
        "up_mb": sum(c["bytes_up"] for c in line["clients"]) / 1e6,
        "whole_s": whole,
        "load": os.getloadavg()[0],
    }


def watched(command: list[str], family: Callable[[int], list[int]], **options: Any) -> float:
    """Run a command to its end; the peak memory of the processes that belong to it, in megabytes."""
    process = subprocess.Popen(command, stdout=sys.stderr, **options)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory(family(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)[:300]}")
    return peak


def simulation(folder: Path, keys: dict[str, Any], clients: int, threads: int) -> float:
    """A federation in Flower's simulation, one core for each of its workers; its peak memory."""
    write_folder(folder)
    (folder / "keys.toml").write_text("\n".join(f"{k} = {json.dumps(v)}" for k, v in keys.items()) + "\n")
    with (folder / "keys.toml").open("a") as file:
        file.write(f"min_clients = {clients}\n")
    (folder / "local").mkdir()
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
    quiet |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_ADDRESS": "local", **PATIENCE}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, **quiet, "FLWR_HOME": str(folder / "local"), "PATH": path}
    resources = f"num-supernodes={clients} client-resources-num-cpus=1 init-args-num-cpus={threads}"
    words = ["flwr", "run", "app", "--stream", "--run-config", "keys.toml", "--federation-config", resources]
    try:
        return watched(words, lambda pid: living_in(folder / "local"), cwd=folder, env=env)
    finally:
        for pid in living_in(folder / "local"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--runners", nargs="+", choices=[*RUNNERS, "flower"], default=[*RUNNERS, "flower"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    shown = ("round_s", "pure_s", "overhead_s", "aggregate_s", "peak_mb", "up_mb")
    shown += ("whole_s", "load")
    print("| runner | clients | " + " | ".join(shown) + " |")
    print("|---|---|" + "---|" * len(shown))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {"hidden_size": given.hidden_size, "num_hidden_layers": given.layers}
        model = tiny_model(folder / "model", **sizes)
        for runner in given.runners:
            for clients in given.clients:
                found = measure(folder, model, clients, runner, given.threads)
                print(
                    f"| {runner} | {clients} | " + " | ".join(f"{found[name]:.2f}" for name in shown) + " |", flush=True
                )


if __name__ == "__main__":
    main()
