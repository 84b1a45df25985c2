"""Seconds a round and peak memory by number of clients and runner, on a tiny model: what is not training is the runner's.

    python benchmarks/scaling.py --clients 4 16 64 256 --runners local workers ray

Each case is a run of two rounds in a process of its own, all clients in every round; the second round is shown. Memory is
the sum of the proportional set sizes of the process and all that it started, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from federation import descendants  # pyright: ignore[reportMissingImports]
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
done = run(Config(**keys))
print(json.dumps(done.metrics[-1]))
"""


def memory(pid: int) -> float:
    """Megabytes of a process and its descendants, shared pages counted once."""
    total = 0
    for process in (pid, *descendants(pid)):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def measure(folder: Path, model: Path, clients: int, runner: str, threads: int) -> dict[str, float]:
    data = folder / f"data-{clients}"
    if not data.exists():
        tiny_federation(data, clients)
    keys = {
        "model": str(model),
        "data": str(data),
        "output_dir": str(folder / "runs"),
        "name": f"{runner}-{clients}",
        "rounds": 2,
        "participation": 1.0,
        "ranks": "random",
        "eval_every": 0,
        "validation_examples": 4,
        "prompt_template": "chat",
        "threads": threads,
        **RUNNERS[runner],
    }
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", CASE, json.dumps(keys)], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.1)
    assert process.stdout is not None
    if process.returncode:
        raise SystemExit(f"{runner} with {clients} clients failed")
    line = json.loads(process.stdout.read().splitlines()[-1])
    seconds = line["seconds"]
    slots = keys.get("workers", 1)
    training = sum(c["seconds"] for c in line["clients"]) / slots
    wall = seconds["train"]
    return {
        "round_s": sum(seconds.values()),
        "train_wall_s": wall,
        "train_pure_s": training,
        "overhead_s": wall - training,
        "aggregate_s": seconds["aggregate"] + seconds["distribute"],
        "peak_mb": peak,
        "whole_s": time.perf_counter() - begin,
        "up_mb": sum(c["bytes_up"] for c in line["clients"]) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--runners", nargs="+", choices=list(RUNNERS), default=["local", "workers"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    given = parser.parse_args()
    shown = ("round_s", "train_wall_s", "train_pure_s", "overhead_s", "aggregate_s", "peak_mb", "up_mb", "whole_s")
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
