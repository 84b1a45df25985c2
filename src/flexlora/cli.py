"""The command line, thin: every command checks its words, calls one function and names the next command."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console

from flexlora.commands.data import app as data_commands
from flexlora.commands.flower import app as flower_commands
from flexlora.config import Config, key_aliases, key_group, make_config, read_config
from flexlora.types import FlexLoraError

GROUPS = ("Model", "Data", "Federation", "Method", "LoRA", "Local training", "Evaluation", "Trust", "Running")
LISTS = ("lora_target_modules", "method_options", "client_memory")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

app = App(
    name="flexlora",
    help="Federated LoRA fine-tuning of large language models where every client has its own rank.",
    help_epilogue="Try it: `flexlora demo`. Every command explains itself with --help.",
    console=out,
    error_console=err,
    version=lambda: __import__("flexlora").__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # main says how to go on
    default_parameter=Parameter(name_transform=lambda name: name),
)
app.command(data_commands)
app.command(flower_commands)

Quiet = Annotated[bool, Parameter(help="Print nothing while it works.", negative="", group="Output")]
Json = Annotated[
    bool, Parameter(name="--json", help="One JSON event a line on standard output.", negative="", group="Output")
]


def config_keys(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for every configuration key, under its new, its old and its dashed name.

    Values stay text here; `Config` types and checks them, the same way as those of a YAML file.
    """
    groups = {name: Group(name, sort_key=i) for i, name in enumerate(GROUPS)}
    parameters = []
    for name, info in Config.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = (
            ""
            if default in (None, {})
            else f" Default: {' '.join(default) if isinstance(default, tuple) else default}."
        )
        option = Parameter(
            name=[f"--{spelling}" for spelling in (name, *key_aliases(name))],
            metavar=_metavar(info.annotation),
            help=f"{' '.join((info.description or '').split())}{shown}",
            group=groups[key_group(name)],
            show_default=False,
            negative="",
            consume_multiple=name in LISTS,
            allow_leading_hyphen=False,
        )
        kind = list[str] | None if name in LISTS else str | None
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )
    own = [
        p
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    everything = sorted([*own, *parameters], key=lambda p: p.kind)
    function.__signature__ = inspect.Signature(everything)  # pyright: ignore[reportFunctionMemberAccess]
    function.__annotations__ = {p.name: p.annotation for p in everything}
    return function


def _metavar(kind: Any) -> str:
    """What --help shows for a key's value: the choices of a Literal, or the type."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    named = [part for part in get_args(kind) if part is not type(None)] if get_origin(kind) is not tuple else []
    plain = named[0] if named else kind
    return {bool: "true|false", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}.get(plain, "TEXT…")


def given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _mode(quiet: bool, json: bool) -> Literal["auto", "quiet", "json"]:
    return "json" if json else "quiet" if quiet else "auto"


def _next(text: str, quiet: bool = False) -> None:
    if not quiet:
        out.print(f"next: {text}", markup=False, soft_wrap=True)


@app.command
@config_keys
def run(config_file: Path | None = None, /, *, quiet: Quiet = False, json: Json = False, **keys: Any) -> None:
    """Fine-tune a model in a federation on your data.

    Keys come from CONFIG_FILE (YAML) and from options; options win. The names of the original FlexLoRA are accepted.

    Examples:

        flexlora run --data ./data --num_clients 64 --participation 0.0625 --rounds 10 --ranks heavy_tail --name first

        flexlora run my.yaml --method flexlora-carry --seed 2
    """
    values = (read_config(config_file) if config_file else {}) | given(keys)
    config = make_config(values, str(config_file) if config_file and not given(keys) else "")
    from flexlora.display import display
    from flexlora.launch import run as launch

    with display(_mode(quiet, json), out) as notify:
        done = launch(config, notify)
    _summary(done.folder, quiet or json)


@app.command
def resume(run: Path, /, *, rounds: int | None = None, quiet: Quiet = False, json: Json = False) -> None:
    """Go on with an interrupted run, or play more rounds.

    Parameters
    ----------
    run
        The run folder.
    rounds
        New number of rounds in all; it can only grow.
    """
    from flexlora.display import display
    from flexlora.launch import resume as launch

    with display(_mode(quiet, json), out) as notify:
        done = launch(run, rounds=rounds, notify=notify)
    _summary(done.folder, quiet or json)


def _summary(folder: Path, quiet: bool) -> None:
    if quiet:
        return
    from flexlora.tables import report_table

    out.print(report_table([folder]))
    out.print(f"run folder: {folder}", markup=False)
    _next(f'flexlora generate {folder} --prompt "…"')
    out.print(f"      flexlora report {folder}", markup=False, soft_wrap=True)


@app.command
def demo(
    *,
    output_dir: Path = Path("runs"),
    name: str | None = None,
    seed: int = 42,
    cache_dir: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """The main job on a built-in federation: a real LLM, eight clients at different ranks, about five minutes.

    Parameters
    ----------
    output_dir
        Where the run folder goes.
    name
        Name of the run; the default is numbered.
    seed
        All randomness is derived from it.
    cache_dir
        Where the converted model is kept.
    """
    from flexlora.demo import demo as play

    play(out, output_dir=output_dir, name=name, seed=seed, cache_dir=cache_dir, quiet=quiet)


@app.command
def evaluate(
    target: str,
    /,
    *,
    data: Path,
    split: Literal["global", "test", "eval"] = "global",
    examples: int | None = None,
    max_new_tokens: int | None = None,
    prompt_template: str | None = None,
    predictions: Path | None = None,
    cache_dir: Path | None = None,
) -> None:
    """Score a run, an exported adapter or a bare model: ROUGE-L of generated answers, exact match, loss.

    Parameters
    ----------
    target
        A run folder, an adapter folder, or a model's name.
    data
        A federation's folder, or one JSON file of examples.
    split
        global: the held-out tasks; test or eval: all clients' own.
    examples
        At most that many.
    max_new_tokens
        Tokens generated for one answer, at most.
    prompt_template
        As the key of `flexlora run`; default: the run's own.
    predictions
        File for one JSON line an example; default: predictions.jsonl in the folder scored, or here.
    cache_dir
        Where converted models are kept.
    """
    from json import dumps

    from flexlora import trained
    from flexlora.data.federation import spread
    from flexlora.rundir import write_text
    from flexlora.tables import scores_table

    records = spread(trained.records_of(data, split), examples)
    changes = given({"max_new_tokens": max_new_tokens, "prompt_template": prompt_template, "cache_dir": cache_dir})
    opened = trained.open_trained(target, changes)
    with out.status("generating answers") as status:
        scores = trained.score(opened, records, lambda done, total: status.update(f"generating answers {done}/{total}"))
    folder = Path(target) if Path(target).is_dir() else Path()
    path = predictions or folder / "predictions.jsonl"
    write_text(path, "".join(dumps(line, ensure_ascii=False) + "\n" for line in scores.predictions))
    out.print(scores_table(scores))
    out.print(f"predictions: {path}", markup=False)
    _next(f'flexlora generate {target} --prompt "…"')


@app.command
def export(
    run: Path,
    /,
    *,
    out: Annotated[Path, Parameter("--out")],
    rank: int | None = None,
    client: int | None = None,
    merge: bool = False,
) -> None:
    """Write the global model of a run's best round as a PEFT adapter of any rank, or merged into the base model.

    Parameters
    ----------
    run
        The run folder.
    out
        The new folder.
    rank
        Rank of every module; default: the largest that a client has.
    client
        Export what this client runs instead.
    merge
        Write a whole model.
    """
    from flexlora.rundir import open_run
    from flexlora.trained import export as write

    folder = write(open_run(run), out, rank=rank, client=client, merge=merge)
    console = Console(highlight=False)
    console.print(f"written: {folder}", markup=False)
    console.print(f'next: flexlora generate {folder} --prompt "…"', markup=False)


@app.command
def generate(
    target: str,
    /,
    *,
    prompt: str | None = None,
    input: str = "",
    max_new_tokens: int = 128,
    prompt_template: str | None = None,
    cache_dir: Path | None = None,
) -> None:
    """Let a run, an exported adapter or a bare model answer; words appear as they come.

    Parameters
    ----------
    target
        A run folder, an adapter folder, or a model's name.
    prompt
        The instruction; without it, one a line from standard input.
    input
        The input that the instruction is about.
    max_new_tokens
        Tokens of the answer, at most.
    prompt_template
        As the key of `flexlora run`; default: the run's own.
    cache_dir
        Where converted models are kept.
    """
    from flexlora import trained

    changes = given({"prompt_template": prompt_template, "cache_dir": cache_dir, "max_new_tokens": max_new_tokens})
    opened = trained.open_trained(target, changes)
    interactive = prompt is None and sys.stdin.isatty()
    while True:
        line = prompt if prompt is not None else (out.input("> ") if interactive else sys.stdin.readline())
        if not line.strip():
            break
        for piece in trained.answer(opened, line.strip(), input):
            out.print(piece, end="", markup=False, soft_wrap=True)
        out.print()
        if prompt is not None:
            break


@app.command
def report(runs: list[Path], /, *, out: Annotated[Path | None, Parameter("--out")] = None) -> None:
    """Write a page with charts, report.html, of one run or of several side by side; and print a table.

    Runs that differ in their seed only are shown as mean ± standard deviation.

    Examples:

        flexlora report runs/first

        flexlora report runs/flexlora-* runs/hetlora-* --out comparison.html

    Parameters
    ----------
    runs
        Run folders.
    out
        The file; default: report.html in the run's folder, of several runs in this one.
    """
    from flexlora.report import write_report
    from flexlora.tables import report_table

    path = write_report(runs, out)
    console = Console(highlight=False)
    console.print(report_table(runs))
    console.print(f"report: {path}", markup=False, soft_wrap=True)
    if len(runs) == 1:
        console.print(f"next: flexlora inspect {runs[0]}", markup=False, soft_wrap=True)
    else:
        console.print(f"next: flexlora report {runs[0]}", markup=False, soft_wrap=True)


@app.command
def watch(run: Path, /, *, timeout: float | None = None) -> None:
    """Follow a run from another terminal: a line a round, and what is left. It ends with the run, or with Ctrl-C.

    Parameters
    ----------
    run
        The run folder.
    timeout
        Give up when no round came for so many seconds; default: never.
    """
    from flexlora.display import follow
    from flexlora.rundir import open_run

    try:
        reason = follow(open_run(run), out, timeout=timeout)
    except KeyboardInterrupt:
        return
    out.print(f"ended: {reason}", markup=False)
    _next(f"flexlora report {run}")


@app.command(name="inspect")
def inspect_run(run: Path, /, *, energy: float = 0.99, round: int | None = None) -> None:
    """The spectrum of a run's global delta weight by module, and the ranks that keep a share of its energy.

    Example:

        flexlora inspect runs/first --energy 0.95

    Parameters
    ----------
    run
        The run folder.
    energy
        Share of every module's ‖W‖² to keep, above 0 and at most 1.
    round
        A round that has a checkpoint; default: the best one.
    """
    from flexlora.rundir import open_run
    from flexlora.spectrum import spectra
    from flexlora.tables import spectrum_table

    if not 0 < energy <= 1:
        raise FlexLoraError(f"energy: {energy:g} is no share; give a figure above 0 and at most 1, e.g. 0.99")
    found = spectra(open_run(run), round)
    table, advised = spectrum_table(found, energy)
    out.print(table)
    _next(f"flexlora export {run} --rank {advised} --out my-adapter")


@app.command
@config_keys
def sweep(sweep_file: Path, /, *, quiet: Quiet = False, json: Json = False, **keys: Any) -> None:
    """Play many runs from one file: every combination of its axes, the same clients for all methods; what is done is skipped.

    Example:

        flexlora sweep configs/compare.yaml --rounds 4
    """
    from flexlora.display import display
    from flexlora.sweep import play_sweep, read_sweep
    from flexlora.tables import report_table

    wanted = read_sweep(sweep_file, given(keys))
    for line in wanted.left_out:
        err.print(f"left out: {line}", style="dim", markup=False)
    with display(_mode(quiet, json), out) as notify:
        played = play_sweep(wanted, notify)
    if not (quiet or json):
        out.print(report_table([run.folder for run in played]))
        _next(f"flexlora report {' '.join(str(run.folder) for run in played)}")


@app.command
def methods() -> None:
    """All methods: name, paper, what the server does."""
    from rich.table import Table

    from flexlora.methods import method_entry
    from flexlora.methods import methods as names

    table = Table(box=None, pad_edge=False)
    for column in ("method", "paper", "what it does", "options"):
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "paper"))
    for name in names():
        entry = method_entry(name)
        table.add_row(name, entry.paper, entry.summary, ", ".join(entry.options))
    out.print(table)
    _next("flexlora run --method flexlora-carry …")


@app.command
def ranks(
    name: str = "random",
    /,
    *,
    clients: int = 20,
    hidden_size: int = 2048,
    lora_r: int = 8,
    seed: int = 42,
    model: str | None = None,
    memory: str | None = None,
    micro_batch_size: int = 2,
    cutoff_len: int = 512,
    cache_dir: Path | None = None,
) -> None:
    """Show a rank distribution: its types, their shares, and who would get which. With --model, the memory that each needs.

    Examples:

        flexlora ranks heavy_tail --clients 100

        flexlora ranks --model smollm2 --memory 4GB --cutoff_len 256

    Parameters
    ----------
    name
        homo, random, heavy_tail, heavy_tail_strong, normal (`:release` for the old shares), or a YAML file.
    clients
        Number of clients.
    hidden_size
        Hidden size of the model; below 1,024 the ranks are scaled down. --model tells it by itself.
    lora_r
        Rank where the distribution is homo.
    seed
        Seed of the assignment.
    model
        Estimate the memory of training this model; only its config.json is read.
    memory
        What a client can spend, e.g. 8GB: names the largest rank type that fits.
    micro_batch_size
        As the key of `flexlora run`.
    cutoff_len
        As the key of `flexlora run`; the estimate takes every example to be that long.
    cache_dir
        Where converted models are kept.
    """
    from flexlora.ranks import read_plan
    from flexlora.tables import ranks_table

    if model is None:
        if memory is not None:
            raise FlexLoraError("memory: of which model? name it with --model")
        out.print(ranks_table(read_plan(name, lora_r=lora_r, hidden_size=hidden_size), clients, seed))
        _next(f"flexlora run --ranks {name} …")
        return
    from flexlora.memory import Workload, affordable, read_bytes, type_memories
    from flexlora.modeling import empty_model
    from flexlora.tables import memory_table

    budget = None if memory is None else read_bytes(memory)
    empty = empty_model(model, cache_dir=cache_dir)
    plan = read_plan(name, lora_r=lora_r, hidden_size=empty.hidden_size)
    needed = type_memories(empty, plan, Workload(micro_batch_size, cutoff_len))
    out.print(memory_table(plan, needed, budget))
    if budget is not None:
        best = affordable(needed, budget)
        remedy = "none: try a smaller --micro_batch_size or --cutoff_len"
        out.print(f"largest that fits {memory}: {best or remedy}", markup=False)
    _next(f"flexlora run --ranks {name} …")


def plain_words(words: Sequence[str]) -> list[str]:
    """The words of the command line with `--like-this` spelled `--like_this`, and `true` after a truth key that stands alone."""
    switches = {
        f"--{spelling}"
        for name, info in Config.model_fields.items()
        if info.annotation is bool
        for spelling in (name, *key_aliases(name))
    }
    plain: list[str] = []
    for i, word in enumerate(words):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            word = "--" + option[2:].replace("-", "_") + equals + value
        plain.append(word)
        alone = i + 1 == len(words) or words[i + 1].startswith("--")
        if words[0] == "run" and word in switches and alone:
            plain.append("true")
    return plain


def main(words: Sequence[str] | None = None) -> None:
    """Entry point: user errors are one line on standard error and exit code 2."""
    import os
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Nothing is fetched unless asked for: a model that is on disk must load without a network.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(plain_words(sys.argv[1:] if words is None else words), exit_on_error=False, print_error=False)
    except FlexLoraError as error:
        fail(str(error))
    except CycloptsError as error:
        fail(str(error))
    except KeyboardInterrupt as stop:
        # Raised with the run folder once there are rounds to go on from.
        saved = f"; finished rounds are saved, go on with `flexlora resume {stop}`" if str(stop) else ""
        print(f"flexlora: stopped{saved}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


def fail(message: str) -> None:
    """One line on standard error, exit code 2."""
    text = " ".join(message.split())
    print(f"flexlora: {text}", file=sys.stderr)
    sys.exit(2)
