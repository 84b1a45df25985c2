"""Commands that look at what a run left behind: report, inspect, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from flexlora.commands.options import OUTPUT, given, next_step, out, refuse_unwritable, write_file
from flexlora.types import FlexLoraError

Out = Annotated[Path | None, Parameter("--out")]


def report(runs: list[Path], /, *, out_file: Out = None) -> None:
    """Write a page with charts, report.html, of one run or of several side by side; and print a table.

    Runs that differ in their seed only are shown as mean ± standard deviation.

    For example:

        flexlora report runs/first
        flexlora report runs/flexlora-* runs/hetlora-* --out comparison.html

    Parameters
    ----------
    runs
        Run folders.
    out_file
        The file; default: report.html in the run's folder, of several runs in this one.
    """
    from flexlora.launch import method_of
    from flexlora.report import write_report
    from flexlora.rundir import open_run
    from flexlora.tables import report_table

    if twice := [run for i, run in enumerate(runs) if run.resolve() in [other.resolve() for other in runs[:i]]]:
        raise FlexLoraError(f"{twice[0]}: is named twice; name each run once")
    path = write_report(runs, out_file)
    out.print(report_table(runs))
    out.print(f"report: {path}", markup=False, soft_wrap=True)
    if len(runs) > 1:
        next_step(f"flexlora report {runs[0]}")
    elif method_of(open_run(runs[0]).config).personal:  # has no global model to inspect
        next_step(f"flexlora export {runs[0]} --client 0 --out my-adapter")
    else:
        next_step(f"flexlora inspect {runs[0]}")


def inspect(run: Path, /, *, energy: float = 0.99, round: int | None = None, out_file: Out = None) -> None:
    """The spectrum of a run's global delta weight by module, and the ranks that keep a share of its energy.

    For example:

        flexlora inspect runs/first --energy 0.95
        flexlora inspect runs/first --energy 0.9 --out enough.yaml
        flexlora run --data data --ranks enough.yaml --name second

    Parameters
    ----------
    run
        The run folder.
    energy
        Share of every module's ‖W‖² to keep, above 0 and at most 1.
    round
        A round that has a checkpoint; default: the best one.
    out_file
        Write the advised rank of every module as a file for the key `ranks`.
    """
    from flexlora.rundir import open_run
    from flexlora.spectrum import rank_file, spectra
    from flexlora.tables import spectrum_table

    if not 0 < energy <= 1:
        raise FlexLoraError(f"energy: {energy:g} is no share; give a figure above 0 and at most 1, e.g. 0.99")
    if out_file is not None and out_file.exists():
        raise FlexLoraError(f"{out_file}: exists already; choose another --out")
    if out_file is not None:
        refuse_unwritable(out_file, "out")
    found = spectra(open_run(run), round)
    table, advised = spectrum_table(found, energy)
    out.print(table)
    if out_file is not None:
        write_file(out_file, rank_file(found, energy), "out")
        out.print(f"written: {out_file}", markup=False, soft_wrap=True)
        next_step(f"flexlora run --ranks {out_file} …")
    else:
        next_step(f"flexlora export {run} --rank {advised} --out my-adapter")


def evaluate(
    target: str,
    /,
    *,
    data: Path,
    num_clients: int | None = None,
    split: Literal["global", "test", "eval"] = "global",
    examples: int | None = None,
    rank: int | None = None,
    client: int | None = None,
    max_new_tokens: int | None = None,
    prompt_template: str | None = None,
    predictions: Path | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    json: Annotated[bool, Parameter(help="Print the scores as one JSON object.", negative="", group=OUTPUT)] = False,
) -> None:
    """Score a run, an exported adapter or a bare model: ROUGE-L of generated answers, exact match, loss.

    For example:

        flexlora evaluate runs/first --data data --split test
        flexlora evaluate smollm2 --data data --examples 100 --json

    Parameters
    ----------
    target
        A run folder, an adapter folder, or a model's name.
    data
        A federation's folder, or one JSON file of examples.
    num_clients
        Which federation, where the folder holds several.
    split
        global: the held-out tasks; test or eval: all clients' own.
    examples
        At most that many.
    rank
        Of a run: score the global model at this rank; default: the largest that a client has.
    client
        Of a run: score what this client runs instead.
    max_new_tokens
        Tokens generated for one answer, at most.
    prompt_template
        As the key of `flexlora run`; default: the run's own.
    predictions
        File for one JSON line an example; default: predictions.jsonl in the folder scored, or here.
    cache_dir
        Where converted models are kept.
    trust_remote_code
        Let the model's own Python code run on this machine.
    """
    from json import dumps

    from flexlora import trained
    from flexlora.data.federation import spread
    from flexlora.tables import scores_table

    if examples is not None and examples < 1:
        raise FlexLoraError(f"examples: {examples} is none; give a whole number from 1")
    path = predictions or (Path(target) if Path(target).is_dir() else Path()) / "predictions.jsonl"
    refuse_unwritable(path, "predictions")
    records = spread(trained.records_of(data, split, num_clients), examples)
    changes = given({"max_new_tokens": max_new_tokens, "prompt_template": prompt_template, "cache_dir": cache_dir})
    changes["trust_remote_code"] = trust_remote_code
    opened = trained.open_trained(target, changes, rank=rank, client=client)
    with out.status("generating answers") as status:
        scores = trained.score(opened, records, lambda done, total: status.update(f"generating answers {done}/{total}"))
    lines = "".join(dumps(line, ensure_ascii=False) + "\n" for line in scores.predictions)
    write_file(path, lines, "predictions")
    if json:
        print(dumps({**scores.summary(), "predictions": str(path)}, ensure_ascii=False))
        return
    out.print(scores_table(scores))
    out.print(f"predictions: {path}", markup=False, soft_wrap=True)
    chosen = "".join(f" --{k} {v}" for k, v in (("rank", rank), ("client", client)) if v is not None)
    next_step(
        f"flexlora export {target}{chosen} --out my-adapter" if chosen else f'flexlora generate {target} --prompt "…"'
    )
