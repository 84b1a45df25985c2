"""What the number of clients costs: start to the first client, seconds and memory a round, on a tiny model.

    python benchmarks/population.py                                             # made clients
    python benchmarks/population.py --archive ../shared/data/ni-1613-mini.tar.gz    # 1,613 clients of Natural Instructions too

Each case is one process. "start" goes from its start, imports of torch and transformers included, to the first client's
training; a round's seconds and the resident memory after it are those of round 2 and of the last. Participants are drawn from
all clients, so that the total may only show in the start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import tiny_federation, tiny_model  # pyright: ignore[reportMissingImports]

CASE = """
import json, sys, time
from pathlib import Path
from flexlora import Config, run
began, keys = float(sys.argv[1]), json.loads(sys.argv[2])
marks = []
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
def notify(event, facts):
    if event in ("round", "saved"):
        marks.append([time.time() - began, resident()])
run(Config(**keys), notify)
print(json.dumps(marks))
"""


def play(folder: Path, model: Path, data: Path, total: int, participants: int, rounds: int) -> dict[str, Any]:
    keys = {
        "model": str(model), "data": str(data), "num_clients": total, "participation": participants / total,
        "rounds": rounds, "early_stop": False, "eval_every": 0, "validation_examples": 8, "cutoff_len": 64,
        "ranks": "heavy_tail", "output_dir": str(folder / f"{data.name}-{total}-{participants}"),
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CASE, str(time.time()), json.dumps(keys)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    marks = json.loads(done.stdout.splitlines()[-1])
    seconds = [marks[i + 1][0] - marks[i][0] for i in range(0, len(marks), 2)]
    memory = [marks[i + 1][1] for i in range(0, len(marks), 2)]
    return {"start": marks[0][0], "second": seconds[1], "last": seconds[-1], "early": memory[1], "late": memory[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="tar file of a data folder of 1,613 clients")
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    print("| clients | of them in a round | start, s | round 2, s | last round, s | MB after 2 | MB after the last |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny_model(folder / "model")
        cases = [(100, 20), (400, 20), (1613, 20), (1613, 40), (1613, 80)]
        data = {total: tiny_federation(folder / f"made-{total}", total) for total in {total for total, _ in cases}}
        shown = [(f"{total:,}, made", data[total], total, some) for total, some in cases]
        if given.archive:
            with tarfile.open(given.archive) as archive:
                archive.extractall(folder / "real", filter="data")
            shown.append(("1,613 of Natural Instructions", next((folder / "real").iterdir()), 1613, 80))
        os.sync()  # else the first file that a run makes durable waits for thousands that were written just now
        for title, where, total, some in shown:
            x = play(folder, model, where, total, some, given.rounds)
            figures = [f"{x[k]:.2f}" for k in ("start", "second", "last")] + [f"{x[k]:.0f}" for k in ("early", "late")]
            print(f"| {title} | {some} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
