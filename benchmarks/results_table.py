"""The tables of docs/results.md from the runs of a sweep, finished or not.

    flexlora sweep configs/results.yaml
    python benchmarks/results_table.py runs/results

Runs are `{seed}-{label}`; those that have not played all their rounds are counted and left out of the means.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexlora.rundir import Run, open_run
from flexlora.sweep import finished


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation (of the sample), the mean alone where there is one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def megabytes(run: Run) -> float:
    return sum(c["bytes_up"] + c["bytes_down"] for line in run.metrics for c in line["clients"]) / 1e6


COLUMNS: dict[str, Callable[[Run], float]] = {
    "held-out loss": lambda run: run.metrics[-1]["eval"]["loss"],
    "ROUGE-L": lambda run: run.metrics[-1]["eval"]["rougeL"],
    "exact match": lambda run: run.metrics[-1]["eval"]["exact_match"],
    "validation loss": lambda run: run.metrics[-1]["validation"]["loss"],
}


def scores(groups: dict[str, dict[int, Run]]) -> list[str]:
    lines = [
        "| run | seeds | rounds | " + " | ".join(COLUMNS) + " | MB sent |",
        "|---|" * 1 + "---|" * (len(COLUMNS) + 3),
    ]
    for label, runs in groups.items():
        figures = [spread([value(run) for run in runs.values()]) for value in COLUMNS.values()]
        rounds = {len(run.metrics) for run in runs.values()}
        sent = statistics.fmean(megabytes(run) for run in runs.values())
        seeds = ", ".join(map(str, sorted(runs)))
        lines.append(f"| {label} | {seeds} | {'/'.join(map(str, rounds))} | {' | '.join(figures)} | {sent:.0f} |")
    return lines


def by_rank(groups: dict[str, dict[int, Run]]) -> list[str]:
    found = {
        label: [run.metrics[-1]["eval"]["loss_by_rank"] for run in runs.values()] for label, runs in groups.items()
    }
    ranks = list(dict.fromkeys(r for many in found.values() for one in many for r in one))
    ranks.sort(key=lambda r: [int(x) for x in r.replace("+", " ").split() if x.isdigit()] or [0])
    lines = ["| run | " + " | ".join(ranks) + " |", "|---|" + "---|" * len(ranks)]
    for label, many in found.items():
        cells = [spread([one[r] for one in many if r in one]) if any(r in one for one in many) else "" for r in ranks]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def energies(groups: dict[str, dict[int, Run]]) -> list[str]:
    """Share of ‖W‖² beyond the smallest rank of the run, round by round."""
    most = max(len(run.metrics) for runs in groups.values() for run in runs.values())
    lines = ["| run | " + " | ".join(str(i + 1) for i in range(most)) + " |", "|---|" + "---|" * most]
    for label, runs in groups.items():
        shares = [[next(iter(line["energy"].values()), math.nan) for line in run.metrics] for run in runs.values()]
        if len(next(iter(runs.values())).metrics[0]["energy"]) < 2:
            continue
        cells = [spread([one[i] for one in shares if i < len(one)], 2) for i in range(most)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Two-sided 95 % quantile of Student's t for a mean of so many values."""


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval; a star where that leaves zero out."""
    mean = statistics.fmean(values)
    if len(values) not in STUDENT:
        return f"{mean:+.3f}"
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}{' *' if abs(mean) > half else ''}"


def comparable(rival: str, label: str) -> bool:
    """Equal ranks against unequal ones, and flexlora against what goes beyond it on the same distribution."""
    if rival.startswith("fedavg"):
        return not label.startswith("fedavg")
    method, _, ranks = rival.partition("-")
    return method == "flexlora" and label != rival and label.endswith(f"-{ranks}")


def differences(groups: dict[str, dict[int, Run]]) -> list[str]:
    """Paired by seed, since a seed has the same clients, ranks and data order whatever the method."""
    columns = ("held-out loss", "validation loss", "ROUGE-L")
    lines = ["| against | run | seeds | " + " | ".join(columns) + " |", "|---|---|---|" + "---|" * len(columns)]
    for rival in groups:
        for label, runs in groups.items():
            seeds = sorted(set(runs) & set(groups[rival]))
            if not comparable(rival, label) or not seeds:
                continue
            cells = [interval([COLUMNS[c](runs[s]) - COLUMNS[c](groups[rival][s]) for s in seeds]) for c in columns]
            lines.append(f"| {rival} | {label} | {', '.join(map(str, seeds))} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    left = 0
    for path in sorted(folder.iterdir()):
        seed, _, label = path.name.partition("-")
        if not seed.isdigit() or not (path / "metrics.jsonl").exists():
            continue
        run: Any = open_run(path)
        if finished(run):
            groups[label][int(seed)] = run
        else:
            left += 1
    for title, made in (
        ("Scores", scores),
        ("Paired by seed", differences),
        ("Loss by rank", by_rank),
        ("Energy", energies),
    ):
        print(f"\n## {title}\n\n" + "\n".join(made(groups)))
    print(f"\n{sum(map(len, groups.values()))} finished runs, {left} unfinished")


main()
