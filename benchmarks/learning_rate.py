"""The sweep behind the default learning rates: validation loss after a few rounds, for each optimiser and rate.

    python benchmarks/learning_rate.py [--rounds 2] [--data DIR --num_clients N]

Without --data it runs on the built-in federation of `flexlora demo`. One line a run; the best rate of each optimiser is
marked. On two cores a run of the default takes about a minute and a half.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Literal

from flexlora import Config, run
from flexlora.data.demo import write_demo

RATES: dict[Literal["fedit", "fedavg"], tuple[float, ...]] = {
    "fedit": (1e-4, 3e-4, 1e-3, 3e-3),
    "fedavg": (0.01, 0.1, 0.5, 2.0),
}
RELEASE = 1e-6
"""What the published code trains with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--participation", type=float, default=0.25)
    parser.add_argument("--ranks", default="homo")
    parser.add_argument("--lora_scaling", default="alpha_over_r")
    parser.add_argument("--baseline", choices=list(RATES))
    parser.add_argument("--rates", type=float, nargs="+")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = given.data or Path(scratch) / "data"
        if given.data is None:
            write_demo(data)
        for baseline in RATES:
            if given.baseline not in (None, baseline):
                continue
            for rate in given.rates or (RELEASE, *RATES[baseline]):
                config = Config(
                    model=given.model,
                    data=data,
                    method="flexlora",
                    baseline=baseline,
                    ranks=given.ranks,
                    lora_scaling=given.lora_scaling,
                    learning_rate=rate,
                    rounds=given.rounds,
                    participation=given.participation,
                    eval_every=0,
                    early_stop=False,
                    validation_examples=24,
                    output_dir=Path(scratch),
                    name=f"{baseline}-{rate:g}",
                )
                done = run(config)
                losses = [done.base["validation"]["loss"], *(line["validation"]["loss"] for line in done.metrics)]
                print(f"{baseline:7} {rate:8g}  validation loss {' '.join(f'{x:.3f}' for x in losses)}", flush=True)


if __name__ == "__main__":
    main()
