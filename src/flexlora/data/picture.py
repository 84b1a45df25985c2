"""A federation as one SVG picture: client sizes, categories by client, token lengths."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flexlora.data.inspection import Inspection
from flexlora.types import FlexLoraError

WIDTH, PANEL, LEFT, TOP, GAP = 760, 170, 60, 40, 84
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright scheme, told apart by colour-blind eyes as well; grey is everything else."""


def write_picture(found: Inspection, path: str | Path) -> Path:
    """Write the picture; it needs nothing but itself. Raises FlexLoraError where `path` cannot be written."""
    path = Path(path)
    try:
        path.write_text(picture(found), encoding="utf-8")
    except OSError as error:
        raise FlexLoraError(f"{path}: cannot be written ({error.strerror}): choose another file") from None
    return path


def picture(found: Inspection) -> str:
    """The text of the SVG."""
    panels = [_sizes(found)]
    if found.lengths is not None:
        panels.append(_lengths(found.lengths.lengths, found.lengths.cutoff_len))
    height = TOP + len(panels) * (PANEL + GAP)
    body = "".join(
        f'<g transform="translate({LEFT},{TOP + place * (PANEL + GAP)})">{panel}</g>'
        for place, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>{body}</svg>\n'
    )


def _sizes(found: Inspection) -> str:
    """One bar a client, the largest first, stacked by category."""
    totals = found.category_totals()
    named = [category for category, _ in totals.most_common(len(COLOURS) - 1)]
    colour = dict(zip(named, COLOURS, strict=False))
    order = sorted(range(found.clients), key=lambda client: (-found.training[client], client))
    inner = WIDTH - LEFT - 20
    step = inner / found.clients
    unit = PANEL / max(found.training)
    bars = []
    for place, client in enumerate(order):
        floor = 0
        own = found.categories[client]
        others = sum(count for category, count in own.items() if category not in colour)
        stack = [(category, own[category], colour[category]) for category in named if own[category]]
        for category, count, fill in [*stack, ("other categories", others, COLOURS[-1])]:
            if count:
                y = PANEL - (floor + count) * unit
                title = f"<title>client {client}: {count} of {escape(category or '–')}</title>"
                bars.append(
                    f'<rect x="{place * step:.2f}" y="{y:.2f}" width="{max(step * 0.9, 0.3):.2f}" '
                    f'height="{count * unit:.2f}" fill="{fill}">{title}</rect>'
                )
                floor += count
    key = []
    labels = named + (["other categories"] if len(totals) > len(named) else [])
    for row, label in enumerate(labels):
        fill = colour.get(label, COLOURS[-1])
        x, y = (row % 4) * inner / 4, PANEL + 22 + 16 * (row // 4)
        shown = (label[:24] + "…" if len(label) > 25 else label) or "–"
        key.append(
            f'<rect x="{x:.0f}" y="{y - 9}" width="10" height="10" fill="{fill}"/>'
            f'<text x="{x + 14:.0f}" y="{y}">{escape(shown)}</text>'
        )
    title = f"training examples of {found.clients:,} clients, by category (label skew {found.skew:.2f})"
    return _frame(title, str(max(found.training))) + "".join(bars) + "".join(key)


def _lengths(lengths: Sequence[int], cutoff_len: int, bins: int = 60) -> str:
    """How many examples have how many tokens; beyond the cutoff in red."""
    end = max(lengths[int(0.99 * (len(lengths) - 1))], cutoff_len) + 1
    counts = [0] * (bins + 1)
    for length in lengths:
        counts[min(bins, length * bins // end)] += 1
    inner = WIDTH - LEFT - 20
    step = inner / (bins + 1)
    unit = PANEL / max(counts)
    bars = "".join(
        f'<rect x="{place * step:.2f}" y="{PANEL - count * unit:.2f}" width="{step * 0.9:.2f}" '
        f'height="{count * unit:.2f}" fill="{COLOURS[1] if place * end / bins > cutoff_len else COLOURS[0]}">'
        f"<title>{count}</title></rect>"
        for place, count in enumerate(counts)
        if count
    )
    x = cutoff_len * bins / end * step
    over = sum(length > cutoff_len for length in lengths)
    line = (
        f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{PANEL}" stroke="black" stroke-dasharray="4 3"/>'
        f'<text x="{x - 6:.1f}" y="12" text-anchor="end">cutoff {cutoff_len}: {over:,} are longer</text>'
    )
    axis = (
        f'<text x="0" y="{PANEL + 16}">0</text><text x="{inner}" y="{PANEL + 16}" text-anchor="end">{end - 1}+</text>'
    )
    return _frame("tokens an example", str(max(counts))) + bars + line + axis


def _frame(title: str, top: str) -> str:
    return (
        f'<text x="0" y="-14" font-weight="bold">{escape(title)}</text>'
        f'<text x="-8" y="10" text-anchor="end">{top}</text><text x="-8" y="{PANEL}" text-anchor="end">0</text>'
        f'<line x1="0" y1="{PANEL}" x2="{WIDTH - LEFT - 20}" y2="{PANEL}" stroke="#888888"/>'
    )
