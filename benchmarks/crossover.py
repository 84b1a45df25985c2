"""Seconds of one decomposition against the stacked rank, factored and dense: where the crossover is.

    python benchmarks/crossover.py --chart docs/crossover.svg

Both ways get the stack of the round's factors, as `lowrank.Sum` holds it, and return the leading directions; the dense
way pays for its matrix product too. One thread, CPU seconds (so that a busy machine disturbs little), medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flexlora import lowrank
from flexlora.types import LowRank

SHAPES = [(576, 576), (1536, 576), (2048, 2048), (2048, 5504)]
COLOURS = ["#4477aa", "#228833", "#cc6677", "#aa3377"]


def seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def measure(d_out: int, d_in: int, rank: int, repeats: int) -> list[tuple[int, float, float]]:
    """(stacked rank, seconds factored, seconds dense)"""
    least = min(d_out, d_in)
    g = torch.Generator().manual_seed(0)
    rows = []
    for share in (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875):
        R = int(share * least)
        x = LowRank(torch.randn((d_out, R), generator=g), torch.randn((R, d_in), generator=g))
        k = min(rank, R)
        factored = seconds(lambda x=x, k=k: lowrank._factored_gram(x, k) or lowrank._factored_qr(x, k), repeats)
        dense = seconds(lambda x=x, k=k: lowrank._dense_gram(W := lowrank.delta(x), k, float(W.norm())), repeats)
        rows.append((R, factored, dense))
        print(f"| {d_out} × {d_in} | {k} | {R} | {share:.3g} | {factored:.3f} | {dense:.3f} |", flush=True)
    return rows


def chart(results: dict[tuple[int, int], list[tuple[int, float, float]]], path: Path) -> None:
    """Seconds over stacked rank as a share of min(d_out, d_in), both axes logarithmic; solid factored, dashed dense."""
    width, height, left, top = 760, 420, 70, 30
    ys = [s for rows in results.values() for row in rows for s in row[1:]]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    x0, x1 = math.log2(1 / 16), 0.0

    def at(share: float, s: float) -> tuple[float, float]:
        x = left + (math.log2(share) - x0) / (x1 - x0) * (width - left - 190)
        return round(x, 1), round(top + (high - math.log10(s)) / (high - low) * (height - top - 60), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(low, high + 1):
        (a, y), (b, _) = at(1 / 16, 10.0**power), at(1.0, 10.0**power)
        parts.append(
            f'<path d="M{a} {y}H{b}" stroke="#ddd"/><text x="{a - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>'
        )
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0):
        x, y = at(share, 10.0**low)
        parts.append(
            f'<path d="M{x} {top}V{y}" stroke="#ddd"/><text x="{x}" y="{y + 18}" text-anchor="middle">{share:g}</text>'
        )
    x, y = at(0.25, 10.0**low)
    parts.append(f'<text x="{x}" y="{y + 40}" text-anchor="middle">stacked rank / min(d_out, d_in)</text>')
    parts.append(f'<text x="{left - 50}" y="{top - 12}">CPU seconds, one thread</text>')
    for i, ((d_out, d_in), rows) in enumerate(results.items()):
        for column, dash in ((1, ""), (2, ' stroke-dasharray="6 4"')):
            points = " ".join("{},{}".format(*at(row[0] / min(d_out, d_in), row[column])) for row in rows)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"{dash}/>')
        y = top + 20 + 22 * i
        parts.append(f'<text x="{width - 180}" y="{y}" fill="{COLOURS[i]}">{d_out} × {d_in}</text>')
    parts.append(f'<text x="{width - 180}" y="{top + 130}">solid: factored</text>')
    parts.append(f'<text x="{width - 180}" y="{top + 150}">dashed: dense</text></svg>')
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=200, help="leading directions asked for")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chart", type=Path, help="write an SVG there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| shape | directions | stacked rank | share | factored, s | dense, s |\n|---|---|---|---|---|---|")
    results = {(m, n): measure(m, n, args.rank, args.repeats) for m, n in SHAPES}
    if args.chart:
        chart(results, args.chart)


if __name__ == "__main__":
    main()
