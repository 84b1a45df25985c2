"""Tables for people: runs side by side, scores, who trains at which rank."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from flexlora.data.federation import Federation
from flexlora.evaluation import Scores
from flexlora.memory import Memory
from flexlora.ranks import REST, RankPlan, label
from flexlora.rundir import Run, open_run
from flexlora.spectrum import advised_ranks, beyond, by_kind, rank_for
from flexlora.standing import WHERE


def shown(value: float | None, digits: int = 3) -> str:
    """A figure for a table; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def rounds_table(run: Run) -> Table:
    """One row a round of one run; it fits 80 columns. Columns in which nothing happened are left out."""
    lines, base = run.metrics, run.base
    best = run.best_round
    # The best round may have got its held-out scores when the run ended.
    lines = [run.line(line["round"]) if line["round"] == best else line for line in lines]
    scored, failed = any(line["eval"] for line in lines), any(line["failed"] for line in lines)
    held_out = ("held-out\nloss", "held-out\nROUGE-L") if scored else ()
    table = _table(
        "round", "train\nloss", "valid.\nloss", *held_out, "clients@ranks", *(["failed"] if failed else []), "MB", "s"
    )
    for column in table.columns:
        column.no_wrap = column.header != "clients@ranks"
    table.columns[-2 - failed - 1].overflow = "fold"

    def scores(of: Mapping[str, Any]) -> list[str]:
        found = of.get("eval") or {}
        return [
            shown((of.get("validation") or {}).get("loss")),
            *([shown(found.get("loss")), shown(found.get("rougeL"))] if scored else []),
        ]

    if base:
        table.add_row("base", "–", *scores(base))
    for line in lines:
        kinds = Counter(c["ranks"] for c in line["clients"])
        traffic = sum(c["bytes_up"] + c["bytes_down"] for c in line["clients"]) / 1e6
        table.add_row(
            f"{line['round']}{' *' if line['round'] == best else '  '}",
            shown(line["train_loss"]),
            *scores(line),
            " ".join(f"{count}@{label}" for label, count in kinds.items()),
            *([str(len(line["failed"]) or "–")] if failed else []),
            f"{traffic:.1f}" if traffic < 100 else f"{traffic:.0f}",
            f"{sum(line['seconds'].values()):.0f}",
        )
    return table


def outcome(run: Run) -> dict[str, Any]:
    """The figures of a run's best round that a comparison shows."""
    lines = run.metrics
    best = run.line(run.best_round) if run.best_round else {}
    scored = best.get("eval") or {}
    energy = best.get("energy") or {}
    return {
        "rounds": len(lines),
        "best": best.get("round"),
        "validation": (best.get("validation") or {}).get("loss"),
        "loss": scored.get("loss"),
        "rougeL": scored.get("rougeL"),
        "energy": next(iter(energy.values()), None),
        "bytes": sum(c["bytes_up"] + c["bytes_down"] for line in lines for c in line["clients"]),
        "seconds": sum(sum(line["seconds"].values()) for line in lines),
    }


PLACE = ("seed", *WHERE)
"""Configuration keys in which runs of one group may differ: they say where and how often, not what."""


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in their seed only are one group, under a name of method, ranks, training and what else differs."""
    kinds: list[dict[str, Any]] = []
    for run in runs:
        kind = {k: v for k, v in run.config.dump().items() if k not in PLACE}
        # The demo's data lie in its run folder: their path says nothing.
        if kind["data"] and Path(kind["data"]).resolve().is_relative_to(run.folder.resolve()):
            kind["data"] = None
        kinds.append(kind)
    told = {"method", "ranks", "baseline", "method_options"}
    differing = [k for k in kinds[0] if k not in told and any(kind[k] != kinds[0][k] for kind in kinds)]
    groups: dict[str, list[Run]] = {}
    for run, kind, ranks in zip(runs, kinds, rank_names([k["ranks"] for k in kinds]), strict=True):
        config = run.config
        options = " ".join(f"{k}={v}" for k, v in config.method_options.items())
        others = [f"{k}={kind[k]}" for k in differing]
        groups.setdefault(
            " ".join(filter(None, [config.method_name, options, ranks, config.baseline, *others])), []
        ).append(run)
    return groups


def rank_names(found: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """A short name for each value of the key `ranks`, another for each other value: a file's whole path where its stem is not
    its own."""
    distinct = [value for i, value in enumerate(found) if value not in found[:i]]
    maps = [value for value in distinct if not isinstance(value, str)]

    def short(value: str | Mapping[str, Any]) -> str:
        if isinstance(value, str):
            return Path(value).stem
        number = maps.index(value)
        return f"map {number + 1}" if number else "map"

    alike = Counter(map(short, distinct))
    return [value if isinstance(value, str) and alike[short(value)] > 1 else short(value) for value in found]


def comparison_table(folders: Sequence[Path]) -> Table:
    """One row a group of `grouped`: mean and standard deviation over its runs, at the best round of each."""
    table = _table(
        "method, ranks, training", "runs", "valid.\nloss", "held-out\nloss", "held-out\nROUGE-L", "energy\nbeyond", "MB"
    )
    for column in table.columns[1:]:
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    table.caption = "± standard deviation over runs; energy beyond: share of ‖W‖² beyond the smallest ranks"
    table.caption_justify = "left"
    for name, runs in grouped([open_run(folder) for folder in folders]).items():
        found = [outcome(run) for run in runs]
        cells = [
            mean_deviation([o[k] for o in found], digits).replace(" ± ", "\n± ")
            for k, digits in (("validation", 4), ("loss", 4), ("rougeL", 4), ("energy", 4))
        ]
        table.add_row(escape(name), str(len(runs)), *cells, f"{statistics.fmean(o['bytes'] for o in found) / 1e6:.1f}")
    return table


def mean_deviation(values: Sequence[float | None], digits: int = 3) -> str:
    """`mean ± standard deviation` of the values that are there and finite; the deviation needs two."""
    there = [v for v in values if v is not None and math.isfinite(v)]
    if not there:
        return "–"
    mean = f"{statistics.fmean(there):.{digits}f}"
    return f"{mean} ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else mean


def report_table(folders: Sequence[Path]) -> Table:
    """One run: its rounds. Several: a comparison."""
    return rounds_table(open_run(folders[0])) if len(folders) == 1 else comparison_table(folders)


def scores_table(scores: Scores) -> Table:
    """Scores overall and by category."""
    table = _table("category", "examples", "ROUGE-L", "exact match", "loss")
    for category, part in scores.per_category.items():
        row = (shown(part["rougeL"]), shown(part["exact_match"]), shown(part["loss"]))
        table.add_row(escape(category) or "–", str(int(part["examples"])), *row)
    table.add_section()
    table.add_row(
        "all examples", str(scores.examples), shown(scores.rougeL), shown(scores.exact_match), shown(scores.loss)
    )
    table.add_row("mean over categories", str(len(scores.per_category)), shown(scores.rougeL_by_task))
    table.add_row("(teacher-forced, as the release)", "", shown(scores.rougeL_teacher_forced))
    return table


def ranks_table(plan: RankPlan, clients: int, seed: int) -> Table:
    """Rank types, their shares, and how many of `clients` clients get each with this seed."""
    drawn = Counter(plan.type_of(client, seed) for client in range(clients) if plan.shares or client in plan.clients)
    table = _table("type", "ranks", "share", f"clients of {clients}, seed {seed}")
    for name, rows in plan.types.items():
        table.add_row(escape(name), escape(_spoken(rows)), f"{plan.shares.get(name, 0):.4g}", str(drawn[name]))
    return table


def memory_table(plan: RankPlan, needed: Mapping[str, Memory], budget: int | None) -> Table:
    """What each rank type needs at the peak of local training on the CPU, in MB, and whether it fits."""
    fits = [] if budget is None else ["fits"]
    table = _table(
        "type", "ranks", "base\nweights", "adapters", "optimiser", "activa-\ntions", "process", "all, MB", *fits
    )
    for name, m in needed.items():
        parts = (m.weights, m.adapters, m.optimizer, m.activations, m.process, m.total)
        verdict = [] if budget is None else ["yes" if m.total <= budget else "no"]
        table.add_row(escape(name), label(plan.types[name]), *(f"{part / 1e6:,.0f}" for part in parts), *verdict)
    return table


def _spoken(rows: Mapping[str, int]) -> str:
    named = [f"{module} {rank}" for module, rank in rows.items() if module != REST]
    return ", ".join([*named, *([f"{'others' if named else 'all'} {rows[REST]}"] if REST in rows else [])])


def spectrum_table(found: Mapping[str, Tensor], energy: float) -> tuple[Table, int]:
    """By layer, for each kind of module the smallest rank that keeps the share `energy` of its ‖W‖²; and the largest of all."""
    kinds, advised = by_kind(found), advised_ranks(found, energy)
    title = f"smallest ranks that keep {energy:.4g} of ‖W‖² in each module"
    table = _table("layer", *(kind.removesuffix("_proj") for kind in kinds), title=title)
    layers = sorted({layer for rows in kinds.values() for layer in rows})
    needed = {kind: {layer: rank_for(values, energy) for layer, values in rows.items()} for kind, rows in kinds.items()}
    for layer in layers:
        table.add_row(str(layer), *(str(rows.get(layer, "–")) for rows in needed.values()))
    table.add_section()
    table.add_row("largest", *(str(max(rows.values())) for rows in needed.values()))
    table.add_row("mean", *(f"{statistics.fmean(rows.values()):.1f}" for rows in needed.values()))
    tails = {kind: beyond(list(rows.values())) for kind, rows in kinds.items()}
    for rank in (1, 2, 4, 8, 16, 32, 64):
        if any(len(tail) > rank for tail in tails.values()):
            shares = (f"{tail[rank]:.1e}" if len(tail) > rank else "0" for tail in tails.values())
            table.add_row(f"beyond {rank}", *shares)
    return table, max(advised.values())


def demo_scores_table(blocks: Mapping[str, Mapping[str, Scores]]) -> Table:
    """For each block of examples, by family and overall: ROUGE-L and loss of the base and the federated model."""
    table = _table("", "examples", "ROUGE-L base", "federated", "loss base", "federated")
    table.columns[0].no_wrap = True
    for title, pair in blocks.items():
        base, federated = pair["base"], pair["federated"]
        table.add_row(
            f"[bold]{escape(title)}[/bold]",
            str(base.examples),
            shown(base.rougeL),
            f"[bold]{shown(federated.rougeL)}[/bold]",
            shown(base.loss),
            f"[bold]{shown(federated.loss)}[/bold]",
        )
        for category, before in base.per_category.items():
            after = federated.per_category[category]
            figures = (shown(part[key]) for key in ("rougeL", "loss") for part in (before, after))
            table.add_row(f"  {escape(category)}", str(int(before["examples"])), *figures)
    return table


def demo_clients_table(run: Run, federation: Federation) -> Table:
    """Who took part: family, ranks, examples, megabytes over all rounds, train loss in the first and the last one."""
    table = _table("", "client", "rank", "examples", "MB sent", "MB got", "loss first", "last")
    table.columns[1].justify, table.columns[1].no_wrap = "left", True
    rows: dict[int, list[dict[str, Any]]] = {}
    for line in run.metrics:
        for client in line["clients"]:
            rows.setdefault(client["id"], []).append(client)
    for number, records in sorted(rows.items()):
        table.add_row(
            str(number),
            escape(federation.train(number)[0].category),
            records[-1]["ranks"],
            str(records[-1]["examples"]),
            f"{sum(r['bytes_up'] for r in records) / 1e6:.1f}",
            f"{sum(r['bytes_down'] for r in records) / 1e6:.1f}",
            shown(records[0]["loss"]),
            shown(records[-1]["loss"]),
        )
    return table
