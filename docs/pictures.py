"""Draws the pictures of the mathematics page with the package itself: `python docs/pictures.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from flexlora import lowrank
from flexlora.randomness import generator
from flexlora.types import LowRank

FOLDER = Path(__file__).parent / "pictures"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7")
D, RANKS, CLIENTS = 96, (2, 4, 8, 16), 12
Line = tuple[str, Sequence[float], Sequence[float]]


def clients(seed: int, spread: float) -> list[LowRank]:
    """Clients whose delta weights share one matrix of decaying spectrum; `spread` is how much each adds of its own."""
    draw = generator(seed, "picture")
    common = torch.randn(D, 8, generator=draw) * 0.85 ** torch.arange(8), torch.randn(8, D, generator=draw)
    found = []
    for i in range(CLIENTS):
        r = RANKS[i % len(RANKS)]
        own = LowRank(spread * torch.randn(D, r, generator=draw) / math.sqrt(r), torch.randn(r, D, generator=draw))
        found.append(lowrank.truncate(lowrank.stack([LowRank(*common), own], [1.0, 1.0]), r))
    return found


def spectrum() -> str:
    """Singular values of the weighted sum, and of what the clients of each rank can hold of it."""
    mean = lowrank.stack(clients(1, 1.5), [1 / CLIENTS] * CLIENTS)
    values = lowrank.singular_values(mean).tolist()[:48]
    share = lowrank.energy_beyond(mean, range(1, 49))
    lines: list[Line] = [
        ("singular value σ / σ₁", range(1, 49), [v / values[0] for v in values]),
        ("share of ‖W‖² beyond the rank", range(1, 49), share),
    ]
    return plot("The global delta weight of 12 clients", "rank", "", lines, marks=RANKS)


def averaging() -> str:
    """Relative error of the mean of the factors against the mean of the products, as clients differ more."""
    draw = generator(2, "picture")
    B, A = torch.randn(D, 8, generator=draw), torch.randn(8, D, generator=draw)
    own = [(torch.randn(D, 8, generator=draw), torch.randn(8, D, generator=draw)) for _ in range(CLIENTS)]
    spreads = [0.02 * i for i in range(51)]
    wrong: list[float] = []
    kept: dict[int, list[float]] = {8: [], 32: []}
    for spread in spreads:
        found = [LowRank(B + spread * b, A + spread * a) for b, a in own]
        mean = lowrank.stack(found, [1 / CLIENTS] * CLIENTS)
        factors = LowRank(torch.stack([x.B for x in found]).mean(0), torch.stack([x.A for x in found]).mean(0))
        size = float(lowrank.norm(mean))
        wrong.append(float(lowrank.norm(lowrank.stack([mean, factors], [1.0, -1.0]))) / size)
        for rank, errors in kept.items():
            errors.append(lowrank.truncation_error(mean, rank) / size)
    lines: list[Line] = [("mean B × mean A", spreads, wrong)]
    lines += [(f"mean of B A, cut to rank {rank}", spreads, errors) for rank, errors in kept.items()]
    return plot(
        "Error of the aggregate, clients of rank 8",
        "distance of a client's factors from the common ones",
        "‖error‖ / ‖W‖",
        lines,
    )


def plot(title: str, x: str, y: str, lines: Sequence[Line], marks: Sequence[float] = ()) -> str:
    """Lines in an SVG that needs nothing else and takes the page's colour for its text; marks are vertical lines."""
    width, height, left, top, bottom = 640, 320, 60, 44, 60
    high = max(max(values) for _, _, values in lines)
    low_x, high_x = min(min(xs) for _, xs, _ in lines), max(max(xs) for _, xs, _ in lines)

    def at(u: float, v: float) -> tuple[float, float]:
        return (
            left + (u - low_x) / (high_x - low_x) * (width - left - 20),
            height - bottom - v / high * (height - top - bottom),
        )

    parts = [f'<text x="{left}" y="22" font-size="16">{title}</text>']
    for i in range(6):
        px, py = at(low_x, high * i / 5)
        parts.append(f'<path d="M{px:.1f} {py:.1f}H{width - 20}" stroke="#888" stroke-opacity=".3"/>')
        parts.append(f'<text x="{px - 6:.1f}" y="{py + 4:.1f}" text-anchor="end">{high * i / 5:.2f}</text>')
        u = low_x + (high_x - low_x) * i / 5
        px, py = at(u, 0)
        parts.append(f'<text x="{px:.1f}" y="{py + 18:.1f}" text-anchor="middle">{u:.3g}</text>')
    for mark in marks:
        px, py = at(mark, 0)
        parts.append(f'<path d="M{px:.1f} {py:.1f}V{top}" stroke="#888" stroke-dasharray="4 4"/>')
        parts.append(f'<text x="{px + 3:.1f}" y="{top + 10 + 12 * (mark == marks[0])}">r = {mark}</text>')
    for i, (name, xs, values) in enumerate(lines):
        points = " ".join("{:.1f},{:.1f}".format(*at(u, v)) for u, v in zip(xs, values, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[i]}" stroke-width="2"/>')
        px = left + i * 200
        parts.append(f'<path d="M{px} {height - 8}h20" stroke="{COLOURS[i]}" stroke-width="3"/>')
        parts.append(f'<text x="{px + 26}" y="{height - 4}">{name}</text>')
    parts.append(f'<text x="{width - 20}" y="{height - bottom + 34}" text-anchor="end">{x}</text>')
    parts.append(f'<text x="{left}" y="{top - 6}">{y}</text>')
    style = "<style>text{fill:#334155}@media(prefers-color-scheme:dark){text{fill:#cbd5e1}}</style>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    return head + style + "\n".join(parts) + "</svg>\n"


def pictures() -> dict[Path, str]:
    """File -> its text."""
    return {FOLDER / "spectrum.svg": spectrum(), FOLDER / "averaging.svg": averaging()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in pictures().items():
        path.write_text(text, encoding="utf-8")
        print(path)
