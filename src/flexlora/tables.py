"""Tables for people: runs side by side, scores, who trains at which rank."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flexlora.data.federation import Federation
from flexlora.evaluation import Scores
from flexlora.ranks import REST, RankPlan
from flexlora.rundir import Run, open_run


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
    """One row a round of one run."""
    table = _table(
        "round", "train loss", "validation", "held-out loss", "ROUGE-L", "clients@ranks", "failed", "up", "down", "s"
    )
    base = run.base
    if base:
        held_out = base.get("eval") or {}
        first = base.get("validation") or {}
        table.add_row("base", "–", shown(first.get("loss")), shown(held_out.get("loss")), shown(held_out.get("rougeL")))
    best = run.best_round
    for line in run.metrics:
        held_out = line["eval"]
        kinds = Counter(c["ranks"] for c in line["clients"])
        table.add_row(
            f"{line['round']}{' *' if line['round'] == best else ''}",
            shown(line["train_loss"]),
            shown(line["validation"].get("loss")),
            shown(held_out.get("loss")),
            shown(held_out.get("rougeL")),
            " ".join(f"{count}@{label}" for label, count in kinds.items()),
            str(len(line["failed"]) or "–"),
            megabytes(sum(c["bytes_up"] for c in line["clients"])),
            megabytes(sum(c["bytes_down"] for c in line["clients"])),
            f"{sum(line['seconds'].values()):.0f}",
        )
    return table


def outcome(run: Run) -> dict[str, Any]:
    """The figures of a run's best round that a comparison shows."""
    lines = run.metrics
    best = next((line for line in lines if line["round"] == run.best_round), lines[-1] if lines else {})
    scored = best.get("eval") or next((line["eval"] for line in reversed(lines) if line["eval"]), {})
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


def comparison_table(folders: Sequence[Path]) -> Table:
    """Runs that differ in their seed only are one row: mean ± standard deviation over the seeds."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for folder in folders:
        run = open_run(folder)
        config = run.config
        kind = config.ranks if isinstance(config.ranks, str) else "map"
        options = ",".join(f"{k}={v}" for k, v in config.method_options.items())
        method = config.method_name + (f"({options})" if options else "")
        groups.setdefault((method, Path(kind).stem, config.baseline), []).append(run)
    table = _table(
        "method",
        "ranks",
        "training",
        "seeds",
        "rounds",
        "validation",
        "held-out loss",
        "ROUGE-L",
        "energy beyond smallest",
        "traffic",
    )
    for (method, kind, baseline), runs in groups.items():
        found = [outcome(run) for run in runs]
        cells = [
            mean_deviation([o[k] for o in found], digits)
            for k, digits in (("validation", 4), ("loss", 4), ("rougeL", 4), ("energy", 4))
        ]
        rounds = sorted({o["rounds"] for o in found})
        traffic = megabytes(statistics.fmean(o["bytes"] for o in found))
        shown_rounds = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]}–{rounds[-1]}"
        table.add_row(method, kind, baseline, str(len(runs)), shown_rounds, *cells, traffic)
    return table


def mean_deviation(values: Sequence[float | None], digits: int = 3) -> str:
    """`mean ± standard deviation` of the values that are there; the deviation needs two."""
    there = [v for v in values if v is not None and not math.isnan(v)]
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
        table.add_row(category or "–", str(int(part["examples"])), *row)
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
        table.add_row(name, _spoken(rows), f"{plan.shares.get(name, 0):.4g}", str(drawn[name]))
    return table


def _spoken(rows: Mapping[str, int]) -> str:
    named = [f"{module} {rank}" for module, rank in rows.items() if module != REST]
    return ", ".join([*named, *([f"{'others' if named else 'all'} {rows[REST]}"] if REST in rows else [])])


def demo_scores_table(blocks: Mapping[str, Mapping[str, Scores]]) -> Table:
    """For each block of examples, by family and overall: ROUGE-L and loss of the base and the federated model."""
    table = _table("", "examples", "ROUGE-L base", "federated", "loss base", "federated")
    for title, pair in blocks.items():
        base, federated = pair["base"], pair["federated"]
        table.add_row(
            f"[bold]{title}[/bold]",
            str(base.examples),
            shown(base.rougeL),
            f"[bold]{shown(federated.rougeL)}[/bold]",
            shown(base.loss),
            f"[bold]{shown(federated.loss)}[/bold]",
        )
        for category, before in base.per_category.items():
            after = federated.per_category[category]
            figures = (shown(part[key]) for key in ("rougeL", "loss") for part in (before, after))
            table.add_row(f"  {category}", str(int(before["examples"])), *figures)
    return table


def demo_clients_table(run: Run, federation: Federation) -> Table:
    """Who took part: family, ranks, examples, and bytes over all rounds."""
    table = _table("client", "family", "rank", "examples", "sent", "received", "first loss", "last loss")
    rows: dict[int, list[dict[str, Any]]] = {}
    for line in run.metrics:
        for client in line["clients"]:
            rows.setdefault(client["id"], []).append(client)
    for number, records in sorted(rows.items()):
        table.add_row(
            str(number),
            federation.train(number)[0].category,
            records[-1]["ranks"],
            str(records[-1]["examples"]),
            megabytes(sum(r["bytes_up"] for r in records)),
            megabytes(sum(r["bytes_down"] for r in records)),
            shown(records[0]["loss"]),
            shown(records[-1]["loss"]),
        )
    return table
