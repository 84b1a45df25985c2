"""`flexlora report`: one HTML page that needs nothing else, of one run or of several side by side."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from flexlora import charts
from flexlora.charts import Chart
from flexlora.rundir import Run, open_run, write_text
from flexlora.spectrum import spectra
from flexlora.tables import grouped, mean_deviation, megabytes, outcome, shown
from flexlora.types import FlexLoraError


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report and return its path: by default report.html in the run's folder, of several runs in this one.

    Raises FlexLoraError where a folder holds no run, no run has a finished round, or `out` cannot be written.
    """
    runs = [open_run(folder) for folder in folders]
    for run in runs:
        if not run.metrics:
            raise FlexLoraError(f"{run.folder}: no round is finished yet; go on with `flexlora resume {run.folder}`")
    path = out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    try:
        write_text(path, page)
    except OSError as error:
        raise FlexLoraError(f"{path}: cannot be written: {error.strerror or error}; choose another --out") from None
    return path


def run_page(run: Run) -> str:
    """The page of one run."""
    try:
        modules, missing = spectra(run), ""
    except FlexLoraError as error:
        modules, missing = {}, str(error)
    sections: dict[str, tuple[Sequence[Chart], str]] = {
        "Scores": (charts.score_charts(run), _no_scores(run)),
        "Clients": (charts.client_charts(run), ""),
        "Global delta weight": (charts.spectrum_charts(run, modules) if modules else [], missing),
        "Cost": (charts.cost_charts(run), ""),
    }
    failed = [(m["round"], c) for m in run.metrics for c in m["failed"]]
    rows = [(round, c["id"], c["ranks"], c["failed"]) for round, c in failed]
    troubles = (
        table(("round", "client", "ranks", "reason"), rows) if rows else "<p>No client failed or was rejected.</p>"
    )
    end = (
        f"<h2>Failures and rejections</h2>{troubles}"
        + folded("Configuration", pairs(run.config.dump()))
        + folded("Environment", pairs(run.environment))
    )
    name = run.folder.resolve().name
    config = run.config
    model = Path(config.model).name or config.model
    subtitle = f"{config.method_name} · {config.baseline} · {model} · {run.folder}"
    return page(name, subtitle, tiles(run_facts(run)), sections, end)


def _no_scores(run: Run) -> str:
    scored = any(m["eval"] for m in run.metrics) or (run.folder / "answers.json").is_file()
    return "" if scored else "No held-out scores: the key eval_every was 0, or the data have no global_test.json."


def run_facts(run: Run) -> dict[str, str]:
    """What the tiles of one run say."""
    lines, base, got = run.metrics, run.base, outcome(run)
    before = base.get("eval") or {}
    clients = {c["id"] for m in lines for c in m["clients"]}
    facts = {
        "held-out ROUGE-L": _change(before.get("rougeL"), got["rougeL"]),
        "held-out loss": _change(before.get("loss"), got["loss"]),
        "validation loss": _change((base.get("validation") or {}).get("loss"), got["validation"]),
        "best round": f"{got['best']} of {got['rounds']}",
        "clients trained": str(len(clients)),
        "traffic": megabytes(got["bytes"]),
        "time": duration(got["seconds"]),
    }
    if promise := lines[-1].get("privacy"):
        facts["privacy of a client"] = f"ε = {promise['epsilon']:.2f}, δ = {promise['delta']:.0e}"
    return {name: text for name, text in facts.items() if text != "–"}


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return "–"
    return f"{shown(before)} → {shown(after)}" if before is not None else shown(after)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def comparison_page(runs: Sequence[Run]) -> str:
    """The page of several runs: runs that differ in their seed only are one group."""
    groups = grouped(runs)
    rows = []
    for name, members in groups.items():
        found = [outcome(run) for run in members]
        figures = [mean_deviation([o[k] for o in found], 4) for k in ("rougeL", "loss", "validation", "energy")]
        traffic = mean_deviation([o["bytes"] / 1e6 for o in found], 1)
        rows.append((name, len(members), *figures, traffic, mean_deviation([o["seconds"] for o in found], 0)))
    heads = ("group", "runs", "held-out ROUGE-L", "held-out loss", "validation loss", "energy beyond", "MB", "seconds")
    single = []
    for name, members in groups.items():
        for run in members:
            o = outcome(run)
            figures = (shown(o[k], 4) for k in ("rougeL", "loss", "validation"))
            single.append((run.folder, name, run.config.seed, f"{o['best']} of {o['rounds']}", *figures))
    above = (
        f"<h2>At the best round</h2>{table(heads, rows)}"
        "<p class=soft>Mean ± standard deviation over the runs of a group. Energy beyond: share of ‖W‖² of the global "
        "delta weight beyond the smallest ranks.</p>"
    )
    heads = ("run", "group", "seed", "best round", "ROUGE-L", "held-out loss", "validation loss")
    end = f"<h2>Runs</h2>{table(heads, single)}"
    title = f"{len(runs)} runs in {len(groups)} group{'s' * (len(groups) != 1)}"
    return page(title, "", above, {"By round": (charts.comparison_charts(groups), "")}, end)


# --- HTML --------------------------------------------------------------------------------------------------------------


def page(title: str, subtitle: str, above: str, sections: Mapping[str, tuple[Sequence[Chart], str]], end: str) -> str:
    """The whole page. Each section has charts and a remark; one without either is left out."""
    parts = [f"<h1>{html.escape(title)}</h1><p class=soft>{html.escape(subtitle)}</p>{above}"]
    figures: list[dict[str, Any]] = []
    for name, (drawn, remark) in sections.items():
        if not drawn and not remark:
            continue
        parts.append(f"<h2>{name}</h2>")
        parts.append(f"<p class=soft>{html.escape(remark)}</p>" if remark else "")
        parts.append("<div class=cards>" + "".join(card(chart) for chart in drawn) + "</div>")
        figures += [{"traces": chart.traces, "layout": chart.layout} for chart in drawn]
    parts.append(f"{end}<p class=soft>flexlora {version('flexlora')}</p>")
    # "</script>" inside a string of the data must not end the script; NaN is no JSON.
    data = json.dumps(_finite(figures), allow_nan=False).replace("<", "\\u003c")
    template = files("flexlora").joinpath("report.html").read_text(encoding="utf-8")
    fields = {"title": html.escape(title), "body": "\n".join(parts), "figures": data, "library": library()}
    # In one pass: a client's text that looks like a field must not be filled in.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], template)


def _finite(value: Any) -> Any:
    """The same with None in the place of NaN and infinities: a gap in the chart."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


@cache
def library() -> str:
    """plotly.js from the installed package, gzip in base64; the same bytes each time."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def card(chart: Chart) -> str:
    title = html.escape(chart.title)
    return (
        f"<div class=card><h3>{title}</h3><p>{html.escape(chart.note)}</p>"
        f'<div class=chart role=img aria-label="{title}"></div></div>'
    )


def tiles(facts: Mapping[str, str]) -> str:
    inner = (
        f"<div class=tile><span class=soft>{html.escape(k)}</span><b>{html.escape(v)}</b></div>"
        for k, v in facts.items()
    )
    return f"<div class=tiles>{''.join(inner)}</div>"


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose columns of figures stand to the right."""
    right = [all(_is_figure(row[i]) for row in rows) for i in range(len(heads))]

    def cells(tag: str, row: Sequence[Any]) -> str:
        kinds = (" class=figure" if r else "" for r in right)
        return "".join(f"<{tag}{k}>{html.escape(str(v))}</{tag}>" for k, v in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{cells('th', heads)}</tr></thead><tbody>{body}</tbody></table></div>"


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) or str(value)[:1] in "0123456789–-"


def pairs(facts: Mapping[str, Any]) -> str:
    rows = [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in facts.items()]
    return table(("key", "value"), rows)


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"
