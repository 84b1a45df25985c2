"""The charts of the report, as plain plotly figures: what to draw, and not how a page shows it."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flexlora.rundir import Run
from flexlora.spectrum import beyond, by_kind, rank_for

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#eab308", "#ec4899", "#84cc16", "#64748b")
"""Readable on white and on black."""

SHOWN_RANKS = 256
"""Longer spectra are drawn up to here."""
WIDEST = 60
"""Characters of a name for which a legend has room."""


@dataclass(frozen=True)
class Chart:
    """One chart: traces and layout in plotly's JSON; title and note stand above it as text."""

    title: str
    note: str
    traces: Sequence[Mapping[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)


def safe(text: Any) -> str:
    """Text from data or clients, which plotly must not read as markup."""
    return html.escape(str(text), quote=False)


def line(name: str, x: Sequence[Any], y: Sequence[Any], colour: int = 0, **more: Any) -> dict[str, Any]:
    """A line with its points; None is a gap that is bridged."""
    paint = COLOURS[colour % len(COLOURS)]
    style = {"mode": "lines+markers", "line": {"color": paint, "width": 2}, "marker": {"color": paint, "size": 6}}
    return {"type": "scatter", "name": safe(name), "x": list(x), "y": list(y), "connectgaps": True} | style | more


def level(name: str, value: float, rounds: Sequence[int], colour: int) -> dict[str, Any]:
    """A dashed horizontal line from round 0 on: the base model."""
    dashed = {"color": COLOURS[colour % len(COLOURS)], "width": 1.5, "dash": "dot"}
    return line(name, [0, max(rounds, default=1)], [value, value], colour, mode="lines", line=dashed)


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """A layout with both axes named; keys like `yaxis_type` go into the axis."""
    layout: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name, value in more.items():
        head, _, rest = name.partition("_")
        if rest:
            layout.setdefault(head, {})[rest] = value
        else:
            layout[name] = value
    return layout


def drawn(charts: Sequence[Chart]) -> list[Chart]:
    """The charts that have something to show; axes that count get no tick between two whole numbers."""
    kept = [chart for chart in charts if any(any(v is not None for v in t["y"]) for t in chart.traces)]
    for chart in kept:
        for axis, key in (("xaxis", "x"), ("yaxis", "y")):
            values = [v for t in chart.traces for v in t[key] if isinstance(v, (int, float))]
            if chart.layout[axis]["title"]["text"] in ("round", "client", "layer", "rank", "direction"):
                chart.layout[axis].setdefault("tickformat", "d")
                if max(values, default=0) <= 10:
                    chart.layout[axis]["dtick"] = 1
        axis, heights = chart.layout["yaxis"], [v for t in chart.traces for v in t["y"] if v]
        if axis.get("type") == "log" and max(heights) < 100 * min(heights):
            axis.update(
                dtick="D2", tickformat="~g", exponentformat="none"
            )  # 0.1, 0.2, 0.5: no bare digits between powers
    return kept


# --- one run -----------------------------------------------------------------------------------------------------------


def score_charts(run: Run) -> list[Chart]:
    """ROUGE-L and losses by round with the base model at round 0, ROUGE-L by category, loss at each rank."""
    lines, base = run.metrics, run.base
    rounds = [m["round"] for m in lines]
    scored = [m for m in lines if m["eval"]]
    # Where no round was scored, the base model's scores alone are no chart.
    first, base_loss = (base.get("eval") or {}) if scored else {}, (base.get("validation") or {}).get("loss")
    return drawn(
        [
            *_answers(run),
            _rouge(scored, first, rounds),
            _losses(lines, first.get("loss"), base_loss),
            _categories(run, scored, first),
            _loss_by_rank(scored),
        ]
    )


def _answers(run: Run) -> list[Chart]:
    """ROUGE-L of the base and the federated model on each block of examples that the demo scored after its last round."""
    path = run.folder / "answers.json"
    charts = []
    for title, pair in (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}).items():
        names = ["all", *pair["base"]["per_category"]]
        traces = [
            {
                "type": "bar",
                "name": f"{who} model",
                "x": [safe(name) for name in names],
                "y": [pair[who]["rougeL"], *(part["rougeL"] for part in pair[who]["per_category"].values())],
                "marker": {"color": COLOURS[colour]},
            }
            for who, colour in (("base", 9), ("federated", 0))
        ]
        layout = axes("", "ROUGE-L", barmode="group", yaxis_rangemode="tozero")
        charts.append(
            Chart(f"Answers: {title}", "Generated answers against their references, by family.", traces, layout)
        )
    return charts


def _rouge(scored: Sequence[Mapping[str, Any]], first: Mapping[str, Any], rounds: Sequence[int]) -> Chart:
    x, y = [m["round"] for m in scored], [m["eval"]["rougeL"] for m in scored]
    traces = []
    if "rougeL" in first:
        x, y = [0, *x], [first["rougeL"], *y]
        traces.append(level("base model", first["rougeL"], rounds, 9))
    traces.append(line("federated model", x, y))
    note = "Generated answers to the held-out examples against their references, from 0 to 1; higher is better."
    return Chart("Held-out ROUGE-L", note, traces, axes("round", "ROUGE-L", yaxis_rangemode="tozero"))


def _losses(lines: Sequence[Mapping[str, Any]], held_out: float | None, validation: float | None) -> Chart:
    rounds = [m["round"] for m in lines]
    series = (
        ("held-out", held_out, [m["eval"].get("loss") for m in lines]),
        ("validation", validation, [m["validation"].get("loss") for m in lines]),
        ("training, mean of clients", None, [m["train_loss"] for m in lines]),
    )
    traces = []
    for i, (name, first, values) in enumerate(series):
        if first is not None:
            traces.append(level(f"{name}, base model", first, rounds, i) | {"showlegend": False})
        if any(v is not None for v in values):
            start = ([0], [first]) if first is not None else ([], [])
            traces.append(line(name, [*start[0], *rounds], [*start[1], *values], i))
    note = "Negative log likelihood of a token, in nats. Dotted: the base model. Early stop and the best round look at validation."
    return Chart("Loss", note, traces, axes("round", "loss"))


def _categories(run: Run, scored: Sequence[Mapping[str, Any]], first: Mapping[str, Any]) -> Chart:
    best = run.line(run.best_round) if run.best_round else {}
    if not best.get("eval"):
        return Chart("", "", [])
    after = best["eval"].get("per_category") or {}
    before = first.get("per_category") or {}
    names = sorted(after, key=lambda c: after[c]["rougeL"], reverse=True)
    text = [f"{safe(c) or '–'} ({int(after[c]['examples'])})" for c in names]
    traces = []
    if before:
        values = [before.get(c, {}).get("rougeL") for c in names]
        traces.append({"type": "bar", "name": "base model", "x": text, "y": values, "marker": {"color": COLOURS[9]}})
    values = [after[c]["rougeL"] for c in names]
    name = f"round {best['round']}"
    traces.append({"type": "bar", "name": name, "x": text, "y": values, "marker": {"color": COLOURS[0]}})
    layout = axes("", "ROUGE-L", barmode="group", yaxis_rangemode="tozero", xaxis_automargin=True)
    return Chart("ROUGE-L by category", "Number of held-out examples in brackets.", traces, layout)


def _loss_by_rank(scored: Sequence[Mapping[str, Any]]) -> Chart:
    labels = list(dict.fromkeys(label for m in scored for label in m["eval"].get("loss_by_rank") or {}))
    x = [m["round"] for m in scored]
    traces = [
        line(f"rank {label}", x, [(m["eval"].get("loss_by_rank") or {}).get(label) for m in scored], i)
        for i, label in enumerate(labels)
    ]
    note = "Held-out loss of the one global model, cut to the rank that each kind of client can hold."
    return Chart("Loss at each client rank", note, traces, axes("round", "loss"))


def client_charts(run: Run) -> list[Chart]:
    """Who took part at which rank, and how much of the global model each rank lost."""
    lines = run.metrics
    labels = list(dict.fromkeys(c["ranks"] for m in lines for c in [*m["clients"], *m["failed"]]))
    labels.sort(key=lambda label: [int(part) for part in label.replace("…", "+").split("+")])
    took_part = []
    for i, label in enumerate(labels):
        seen = [(m["round"], c) for m in lines for c in m["clients"] if c["ranks"] == label]
        took_part.append(
            line(
                f"rank {label}",
                [round for round, _ in seen],
                [c["id"] for _, c in seen],
                i,
                mode="markers",
                marker={"color": COLOURS[i % len(COLOURS)], "symbol": "square", "size": 10},
                text=[f"client {c['id']}, {c['examples']} examples, loss {_figure(c['loss'])}" for _, c in seen],
                hovertemplate="round %{x}: %{text}",
            )
        )
    failed = [(m["round"], c) for m in lines for c in m["failed"]]
    if failed:
        took_part.append(
            line(
                "failed or rejected",
                [round for round, _ in failed],
                [c["id"] for _, c in failed],
                4,
                mode="markers",
                marker={"color": COLOURS[4], "symbol": "x", "size": 9},
                text=[f"client {c['id']}: {safe(c['failed'])}" for _, c in failed],
                hovertemplate="round %{x}: %{text}",
            )
        )
    rounds = [m["round"] for m in lines]
    cut = []
    for i, label in enumerate(labels):
        errors = [next((c.get("truncation") for c in m["clients"] if c["ranks"] == label), None) for m in lines]
        if any(e is not None for e in errors):
            cut.append(line(f"rank {label}", rounds, errors, i))
    return drawn(
        [
            Chart("Who took part", "One square for each client and round.", took_part, axes("round", "client")),
            Chart(
                "Truncation error by client rank",
                "‖W − P_r(W)‖ / ‖W‖ of what was sent: the share of the global delta weight W that rank r cannot hold.",
                cut,
                axes("round", "relative error", yaxis_rangemode="tozero"),
            ),
        ]
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def spectrum_charts(run: Run, found: Mapping[str, Tensor]) -> list[Chart]:
    """The singular values of the global delta weight, its energy beyond each rank, and the ranks that layers need."""
    kinds = by_kind(found)
    values, tails = [], []
    for i, (kind, layers) in enumerate(kinds.items()):
        tail = beyond(list(layers.values()))
        length = min(SHOWN_RANKS, len(tail) - 1)
        x = list(range(1, length + 1))
        # σ_j² of all layers together is what lies between two neighbours of the tail.
        spectrum = [max(0.0, tail[j] - tail[j + 1]) ** 0.5 or None for j in range(length)]
        values.append(line(kind, x, spectrum, i, mode="lines"))
        tails.append(line(kind, [0, *x], [v or None for v in tail[: length + 1]], i, mode="lines"))
    whole = beyond(list(found.values()))[: SHOWN_RANKS + 1]
    paint = {"color": COLOURS[9], "width": 4}
    tails.insert(0, line("all modules", range(len(whole)), [v or None for v in whole], 9, mode="lines", line=paint))
    labels = list(dict.fromkeys(label for m in run.metrics for label in m["energy"]))
    rounds = [m["round"] for m in run.metrics]
    energy = [line(f"rank {r}", rounds, [m["energy"].get(r) for m in run.metrics], i) for i, r in enumerate(labels)]
    needed = [
        line(kind, list(layers), [rank_for(x, 0.99) for x in layers.values()], i)
        for i, (kind, layers) in enumerate(kinds.items())
    ]
    where = f"Global delta weight W of round {run.best_round}. "
    return drawn(
        [
            Chart(
                "Spectrum of the global delta weight",
                where + "Share of ‖W‖ in direction j, over all layers of a kind.",
                values,
                axes("direction", "σ / ‖W‖", yaxis_type="log", yaxis_exponentformat="power"),
            ),
            Chart(
                "Energy beyond each rank",
                where + "Share of ‖W‖² that is lost when every module is cut to this rank.",
                tails,
                axes("rank", "share of ‖W‖²", yaxis_type="log", yaxis_exponentformat="power"),
            ),
            Chart(
                "Energy beyond the clients' ranks",
                "Share of ‖W‖² that the clients of each rank cannot hold, after each round.",
                energy,
                axes("round", "share of ‖W‖²", yaxis_rangemode="tozero"),
            ),
            Chart(
                "Rank that keeps 99 % of the energy",
                where + "By layer and kind of module.",
                needed,
                axes("layer", "rank", yaxis_rangemode="tozero"),
            ),
        ]
    )


def cost_charts(run: Run) -> list[Chart]:
    """Bytes and seconds of every round."""
    lines = run.metrics
    rounds = [m["round"] for m in lines]
    traffic = [
        {"type": "bar", "name": name, "x": rounds, "y": [sum(c[key] for c in m["clients"]) / 1e6 for m in lines]}
        | {"marker": {"color": COLOURS[i]}}
        for i, (name, key) in enumerate((("to the server", "bytes_up"), ("to the clients", "bytes_down")))
    ]
    phases = [phase for phase in (lines[0]["seconds"] if lines else {}) if any(m["seconds"][phase] for m in lines)]
    seconds = [
        {"type": "bar", "name": phase, "x": rounds, "y": [m["seconds"][phase] for m in lines]}
        | {"marker": {"color": COLOURS[i % len(COLOURS)]}}
        for i, phase in enumerate(phases)
    ]
    spent = line("ε", rounds, [(m.get("privacy") or {}).get("epsilon") for m in lines])
    return drawn(
        [
            Chart("Traffic", "Megabytes of adapters, by round.", traffic, axes("round", "MB", barmode="stack")),
            Chart("Time", "Seconds by phase, by round.", seconds, axes("round", "seconds", barmode="stack")),
            Chart(
                "Privacy spent",
                "ε of differential privacy for a whole client, after each round; smaller is more private.",
                [spent],
                axes("round", "ε", yaxis_rangemode="tozero"),
            ),
        ]
    )


# --- several runs ------------------------------------------------------------------------------------------------------


def comparison_charts(groups: Mapping[str, Sequence[Run]]) -> list[Chart]:
    """Mean over the runs of each group by round, with a band of one standard deviation; a line alone is named too."""
    groups = {fitted(name, groups): runs for name, runs in groups.items()}
    read = {
        "Held-out ROUGE-L": ("ROUGE-L", lambda m: m["eval"].get("rougeL"), ("eval", "rougeL")),
        "Held-out loss": ("loss", lambda m: m["eval"].get("loss"), ("eval", "loss")),
        "Validation loss": ("loss", lambda m: m["validation"].get("loss"), ("validation", "loss")),
        "Training loss": ("loss", lambda m: m["train_loss"], None),
        "Energy beyond the smallest ranks": ("share of ‖W‖²", lambda m: next(iter(m["energy"].values()), None), None),
    }
    charts = []
    note = "Mean over the runs of a group; band: ± standard deviation."
    if any(len({len(run.metrics) for run in runs}) > 1 for runs in groups.values()):
        note += " Some runs of a group ended before others: later points are means of fewer runs."
    for title, (unit, value, base) in read.items():
        traces: list[Mapping[str, Any]] = []
        for i, (name, runs) in enumerate(groups.items()):
            points: dict[int, list[float]] = {}
            for run in runs:
                found = {m["round"]: v for m in run.metrics if (v := value(m)) is not None}
                if found and base and (first := (run.base.get(base[0]) or {}).get(base[1])) is not None:
                    found = {0: first, **found}
                for round, v in found.items():
                    if math.isfinite(v):  # a run that diverged has no share in the mean
                        points.setdefault(round, []).append(v)
            traces += banded(name, points, i)
        # Shares and ROUGE-L end at 0, whatever mean minus deviation is.
        span = {"yaxis_rangemode": "normal" if unit == "loss" else "nonnegative"}
        charts.append(Chart(title, note, traces, axes("round", unit, showlegend=True, **span)))
    traces = []
    for i, (name, runs) in enumerate(groups.items()):
        x, y = [], []
        for run in runs:
            sent = 0.0
            for m in run.metrics:
                sent += sum(c["bytes_up"] + c["bytes_down"] for c in m["clients"]) / 1e6
                x.append(sent)
                y.append(m["validation"].get("loss"))
            x.append(None)
            y.append(None)
        traces.append(line(name, x, y, i, connectgaps=False))
    note = "One line a run, one point a round."
    charts.append(Chart("Validation loss against traffic", note, traces, axes("MB so far", "loss", showlegend=True)))
    return drawn(charts)


def fitted(name: str, names: Iterable[str]) -> str:
    """A name as a legend has room for it; whole where another of the names begins alike."""
    cut = name[: WIDEST - 1]
    alone = sum(other.startswith(cut) for other in names) == 1
    return f"{cut.rstrip()}…" if alone and len(name) > WIDEST else name


def banded(name: str, points: Mapping[int, Sequence[float]], colour: int) -> list[dict[str, Any]]:
    """The mean of each x and, where there are two values or more, a band of one standard deviation about it."""
    x = sorted(points)
    mean = [statistics.fmean(points[r]) for r in x]
    traces = [line(name, x, mean, colour)]
    if any(len(points[r]) > 1 for r in x):
        spread = [statistics.stdev(points[r]) if len(points[r]) > 1 else 0.0 for r in x]
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        traces.append(
            line(
                f"{name} ±",
                [*x, *reversed(x)],
                [*low, *reversed(high)],
                colour,
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=COLOURS[colour % len(COLOURS)] + "33",
                hoverinfo="skip",
                showlegend=False,
            )
        )
    return traces
