"""Where the time of a round goes: smollm2, 4 clients of mixed ranks, in this process.

    python benchmarks/round.py --data DIR                       # flexlora, flexlora-carry, raflora
    python benchmarks/round.py --data DIR --methods flexlora --rounds 4

Everything that is not the forward pass, the backward pass or the optimiser is overhead; its share is given of the time
without evaluation. Clocks stand around the functions named in PARTS and stop while another one of them runs, so that
every second is counted once. The first round is left out: it warms up.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flexlora  # before torch: settles how its idle threads wait

# isort: split
import torch

from flexlora import engine, guard, launch, training, wire
from flexlora.data.federation import Federation
from flexlora.modeling import Model
from flexlora.prompts import TokenCache
from flexlora.scorer import ModelScorer

WORK = "forward, backward, optimiser"
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    WORK: ((training, "_backward"), (training, "_step")),
    "data": ((Federation, "train"), (TokenCache, "encode_all"), (training, "batches"), (training, "collate")),
    "client switch": ((Model, "attach"), (Model, "read"), (Model, "detach")),
    "send and receive": ((wire, "pack_update"), (wire, "unpack_update"), (wire, "cast")),
    "checks": ((guard, "examine"),),
    "aggregate": ((engine, "aggregate"),),
    "evaluation": ((ModelScorer, "validate"), (ModelScorer, "evaluate"), (engine, "global_adapter")),
    "checkpoint": ((engine, "write_checkpoint"), (engine, "remove_checkpoints"), (engine, "save_adapter")),
}


class Clocks:
    """Seconds by part, each counted for the innermost one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.open = ["other"]
        self.since = time.perf_counter()

    def switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.open[-1] == "evaluation":
                return function(*args, **kwargs)
            self.switch()
            self.open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.open.pop()

        return timed


def measure(method: str, data: Path, rounds: int, ranks: str, examples: int) -> Mapping[str, float]:
    """Seconds a round by part."""
    clocks = Clocks()
    make = launch.method_of

    def clocked_method(config: Any) -> Any:
        made = make(config)
        return replace(made, distribute=clocks.around("distribute", made.distribute))

    def notify(event: str, facts: Mapping[str, Any]) -> None:
        if event == "saved" and facts["round"] == 1:
            clocks.seconds.clear()
            clocks.since = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, clocks.around(part, getattr(owner, name))))
        stack.enter_context(patch.object(launch, "method_of", clocked_method))
        config = flexlora.Config(
            data=data,
            method=method,
            ranks=ranks,
            rounds=rounds + 1,
            participation=4 / 64,
            num_clients=64,
            early_stop=False,
            eval_every=0,
            validation_examples=examples,
            output_dir=Path(folder),
            name="run",
        )
        flexlora.run(config, notify)
        clocks.switch()
    return {part: clocks.seconds[part] / rounds for part in [*PARTS, "distribute", "other"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder of 64 clients")
    parser.add_argument("--methods", nargs="+", default=["flexlora", "flexlora-carry", "raflora"])
    parser.add_argument("--ranks", default="random")
    parser.add_argument("--rounds", type=int, default=2, help="rounds that are measured, after one that warms up")
    parser.add_argument("--validation", type=int, default=16, help="validation examples a round")
    given = parser.parse_args()
    found = {m: measure(m, given.data, given.rounds, given.ranks, given.validation) for m in given.methods}
    print(
        f"\nsmollm2, ranks {given.ranks}, {torch.get_num_threads()} threads, seconds a round, {given.rounds} rounds\n"
    )
    print("| part | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for part in next(iter(found.values())):
        print(f"| {part} | " + " | ".join(f"{seconds[part]:.2f}" for seconds in found.values()) + " |")
    shares = []
    for seconds in found.values():
        rest = sum(seconds.values()) - seconds["evaluation"]
        shares.append(f"{(rest - seconds[WORK]) / rest:.1%}")
    print("| overhead, without evaluation | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
