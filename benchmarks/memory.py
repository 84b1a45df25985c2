"""The memory advisor against what a process really uses: estimated and measured peak for a few ranks and batches.

    python benchmarks/memory.py                  # smollm2
    python benchmarks/memory.py --model FOLDER

Each case runs in a process of its own. The peak is the kernel's (VmHWM), counted from after the model was loaded, since
loading has a peak of its own. Linux only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import flexlora  # noqa: F401  before torch, as the command line does: settles memory

# isort: split
import torch

from flexlora.memory import Workload, training_memory
from flexlora.modeling import empty_model, load_model
from flexlora.prompts import Encoded
from flexlora.training import train_client
from flexlora.types import ClientRule, Download, LocalTraining, LowRank, TrainTask

CASES = ((8, 1, 128), (8, 2, 256), (64, 2, 256), (8, 4, 256), (8, 2, 512), (200, 4, 512))
"""(rank, micro_batch_size, cutoff_len)"""


def measure(name: str, rank: int, batch: int, length: int) -> int:
    """Peak resident bytes of this process while one client trains two steps of full-length examples."""
    model = load_model(name, precision="float32")
    ranks = {m: min(rank, *shape) for m, shape in model.shapes.items()}
    adapter = {
        m: LowRank(torch.zeros(shape[0], ranks[m]), torch.randn(ranks[m], shape[1]))
        for m, shape in model.shapes.items()
    }
    training = LocalTraining(
        batch_size=batch, micro_batch_size=batch, cutoff_len=length, train_on_inputs=True, dropout=0.05
    )
    task = TrainTask(1, 0, ranks, Download(adapter, {}, ClientRule()), training, 1)
    draw = torch.Generator().manual_seed(0)
    examples = [
        Encoded(tuple(torch.randint(9, 999, (length,), generator=draw).tolist()), 0, 0) for _ in range(2 * batch)
    ]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    train_client(model, task, examples)
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--case", type=int, nargs=3)
    given = parser.parse_args()
    if given.case:
        print(measure(given.model, *given.case))
        return
    empty = empty_model(given.model, precision="float32")
    print("| rank | micro_batch_size | cutoff_len | estimated MB | measured MB | error |\n|---|---|---|---|---|---|")
    for rank, batch, length in CASES:
        ranks = {m: min(rank, *shape) for m, shape in empty.shapes.items()}
        guess = training_memory(empty, ranks, Workload(batch, length)).total
        words = [sys.executable, __file__, "--model", given.model, "--case", str(rank), str(batch), str(length)]
        real = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(
            f"| {rank} | {batch} | {length} | {guess / 1e6:.0f} | {real / 1e6:.0f} | {guess / real - 1:+.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
