"""Commands that play runs: demo, run, resume, watch, sweep."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flexlora.commands.options import Json, Quiet, Track, config_keys, err, given, next_step, out, shown
from flexlora.config import make_config, new_names, read_config

ConfigFile = Annotated[Path | None, Parameter(help="YAML file of configuration keys.")]
SweepFile = Annotated[Path, Parameter(help="YAML file with the keys of all runs and the axes that differ.")]


@config_keys
def run(
    config_file: ConfigFile = None,
    /,
    *,
    quiet: Quiet = False,
    json: Json = False,
    track: Track = None,
    **keys: Any,
) -> None:
    """Fine-tune a model in a federation on your data.

    Keys come from CONFIG_FILE and from options; options win. The names of the original FlexLoRA are accepted.

    For example:

        flexlora run --data data --participation 0.2 --rounds 10 --ranks heavy_tail --name first
        flexlora run my.yaml --method flexlora-carry --seed 2
    """
    values = (new_names(read_config(config_file), str(config_file)) if config_file else {}) | given(keys)
    config = make_config(values, str(config_file) if config_file and not given(keys) else "")
    from flexlora.launch import run as launch

    with shown(quiet, json, track) as notify:
        done = launch(config, notify)
    _summary(done.folder, quiet or json)


def resume(
    run: Path, /, *, rounds: int | None = None, quiet: Quiet = False, json: Json = False, track: Track = None
) -> None:
    """Go on with an interrupted run, or play more rounds.

    For example:

        flexlora resume runs/first --rounds 20

    Parameters
    ----------
    run
        The run folder.
    rounds
        New number of rounds in all; it can only grow.
    """
    from flexlora.launch import resume as launch

    with shown(quiet, json, track) as notify:
        done = launch(run, rounds=rounds, notify=notify)
    _summary(done.folder, quiet or json)


def _summary(folder: Path, quiet: bool) -> None:
    if quiet:
        return
    from flexlora.launch import method_of
    from flexlora.rundir import open_run
    from flexlora.tables import report_table

    out.print(report_table([folder]))
    out.print(f"run folder: {folder}", markup=False, soft_wrap=True)
    config = open_run(folder).config
    personal = method_of(config).personal
    use = f"evaluate {folder} --client 0 --data …" if personal else f'generate {folder} --prompt "…"'
    use += " --trust_remote_code" if config.trust_remote_code else ""
    next_step(f"flexlora {use}", f"flexlora report {folder}")


def demo(
    *,
    output_dir: Path = Path("runs"),
    name: str | None = None,
    seed: int = 42,
    cache_dir: Path | None = None,
    quiet: Quiet = False,
) -> None:
    """The main job on a built-in federation: a real LLM, eight clients at different ranks, about five minutes.

    For example:

        flexlora demo --name another --seed 7

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


def watch(run: Path, /, *, timeout: float | None = None) -> None:
    """Follow a run from another terminal; it ends with the run, or with Ctrl-C, which leaves the run alone.

    For example:

        flexlora watch runs/first

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
    next_step(f"flexlora report {run}")


@partial(config_keys, show=False)
def sweep(
    sweep_file: SweepFile,
    /,
    *,
    quiet: Quiet = False,
    json: Json = False,
    track: Track = None,
    **keys: Any,
) -> None:
    """Play many runs from one file: every combination of its axes, on the same clients; what is done is skipped.

    Every key of `flexlora run` is an option here too, and then holds for all runs.

    For example:

        flexlora sweep configs/compare.yaml --rounds 4
    """
    from flexlora.sweep import play_sweep, read_sweep
    from flexlora.tables import report_table

    wanted = read_sweep(sweep_file, given(keys))
    for line in wanted.left_out:
        err.print(f"left out: {line}", style="dim", markup=False)
    with shown(quiet, json, track) as notify:
        played = play_sweep(wanted, notify)
    if not (quiet or json):
        out.print(report_table([run.folder for run in played]))
        next_step(f"flexlora report {' '.join(str(run.folder) for run in played)}")
