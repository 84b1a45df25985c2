"""The only round loop: distribute, train at the clients, aggregate, validate, save; again.

The engine owns rounds, participation, the rank table, aggregation, early stop, checkpoints and the log. It knows no
model library and no transport: clients train behind a `Runner`, scores come from a `Scorer`.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from flexlora import guard, lowrank, privacy, ranks, rundir, sampling, wire
from flexlora.checkpoint import (
    DamagedError,
    checkpoint_folder,
    read_checkpoint,
    remove_checkpoints,
    remove_kept,
    replace_folder,
    sync_files,
    write_checkpoint,
)
from flexlora.collection import (
    Notify,
    RoundLog,
    Spool,
    Stopwatch,
    accept,
    examined,
    in_client_order,
    moderated,
    timed,
)
from flexlora.config import Config
from flexlora.processor import give_back
from flexlora.randomness import derive
from flexlora.rundir import Run
from flexlora.standing import Setup, Standing, energy_beyond, last_standing, standing_of
from flexlora.types import (
    Adapter,
    ClientFailure,
    ClientInfo,
    ClientRule,
    ClientScore,
    ClientUpdate,
    Download,
    EvalTask,
    FlexLoraError,
    LowRank,
    Method,
    Ranks,
    TrainTask,
)

ATTEMPTS = 3
"""How often a round is tried, with other clients each time, before the run stops."""

EVAL_PER_CLIENT = 8
"""Eval examples of one client where validation is the clients' own."""


class Runner(Protocol):
    """Does the work that it is given, wherever the clients are."""

    def clients(self) -> Mapping[int, ClientInfo]:
        """Who could take part now; it may grow while the run goes on."""
        ...

    def train(self, round: int, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Every task's result, in any order, as they come."""
        ...

    def evaluate(self, round: int, tasks: Sequence[EvalTask]) -> Iterator[ClientScore | ClientFailure]:
        """Scores where the data stay with the clients."""
        ...

    def close(self) -> None: ...


def run_rounds(setup: Setup, runner: Runner, run: Run, standing: Standing, notify: Notify) -> Run:
    """Play rounds until the last one, an early stop, or too few answers. The caller holds the run folder.

    Raises FlexLoraError where too few clients answer; the state of the last finished round is saved then.
    """
    while standing.round < setup.config.rounds and not standing.stopped:
        standing = finish_round(setup, runner, run, standing, notify)
    notify("stop", {"round": standing.round, "reason": standing.stopped or "last round", "folder": run.folder})
    return run


def finish_round(setup: Setup, runner: Runner, run: Run, standing: Standing, notify: Notify) -> Standing:
    """One round, scored and saved. The adapter comes first and the checkpoint last: a round that was cut off is played
    again and writes the same bytes."""
    config, method = setup.config, setup.method
    number = standing.round + 1
    watch = Stopwatch()
    begin = time.perf_counter()
    standing, line = play_round(setup, runner, run, standing, watch, notify)
    with watch("eval"):
        adapter = global_adapter(method, standing.state, ranks.largest(standing.table.values()))
        line["validation"] = dict(validate(setup, runner, standing, adapter))
        judged = judge_round(config, standing, line["validation"])
        standing = replace(judged, best_before=standing.best_round)
        last = number == config.rounds or standing.stopped is not None
        due = config.eval_every > 0 and (last or number % config.eval_every == 0)
        line["eval"] = dict(evaluate(setup, standing, adapter)) if due else {}
        if due and last:
            line["eval_best"] = evaluate_best(setup, run, standing)
    standing = replace(standing, energy=energy_beyond(method, standing.state, standing.table))
    line["energy"] = dict(standing.energy)
    line |= method.figures(standing.state) if method.figures else {}
    line["best_round"] = standing.best_round
    line["stopped"] = standing.stopped
    if setup.mechanism:
        line["privacy"] = privacy.statement(setup.mechanism, number)
    if standing.best_round == number and not method.personal:
        save_adapter(setup, run, adapter, line)
    seconds = {k: watch.seconds.get(k, 0.0) for k in ("train", "aggregate", "distribute", "eval")}
    line["seconds"] = {**seconds, "other": time.perf_counter() - begin - sum(seconds.values())}
    rundir.append_metrics(run.folder, line)
    write_checkpoint(run.checkpoints, number, standing.state, standing.progress(setup))
    remove_checkpoints(run.checkpoints, standing.needed_rounds)
    remove_kept(run.kept, standing.needed_rounds)
    give_back()
    notify("saved", {"round": number, "line": line})
    return standing


def play_round(
    setup: Setup, runner: Runner, run: Run, standing: Standing, watch: Stopwatch, notify: Notify
) -> tuple[Standing, dict[str, Any]]:
    """One round without its scores: the new standing and the beginning of its line in metrics.jsonl."""
    config, number = setup.config, standing.round + 1
    secret = rundir.secret(run.folder) if setup.mechanism else 0
    log, answered = RoundLog({}, {}), ""
    for attempt in range(ATTEMPTS):
        present = sorted(set(standing.table) & set(runner.clients()))
        if setup.mechanism:
            clients = sampling.poisson(present, config.participation, seed=secret, round=number)
        else:
            clients = sampling.participants(
                present, config.participation, seed=config.seed, round=number, attempt=attempt
            )
        with watch("distribute"):
            tasks = [
                TrainTask(
                    number,
                    client,
                    standing.table[client],
                    download,
                    config.local_training(number, setup.template),
                    derive(config.seed, "train", number, client),
                    setup.base,
                    tuple(sorted(standing.needed_rounds)),
                )
                for client, download in downloads(setup, standing, clients)
            ]
        notify("round", {"round": number, "rounds": config.rounds, "clients": clients, "attempt": attempt})
        log = RoundLog(standing.energy, ranks.labelled(standing.table.values()))
        results = examined(timed(runner.train(number, tasks), watch, "train"), tasks, standing.norms, limits_of(config))
        updates = accept(in_client_order(results, tasks, Spool(run.folder / ".early")), tasks, log, notify)
        with watch("aggregate"):
            if config.robust and tasks:
                updates = moderated(updates, log, tasks[0].download.rule, Spool(run.folder / ".held"))
            if setup.mechanism:
                updates = iter([private_update(setup, setup.mechanism, standing, updates, secret)])
            state = aggregate(setup.method, standing, updates)
            give_back()
        # Training happens while aggregate asks for the next update.
        watch.seconds["aggregate"] -= watch.seconds.pop("train_inside", 0.0)
        if state is not None and (setup.mechanism or len(log.accepted) >= config.min_clients):
            return after_round(setup, standing, state, tasks, log), {"round": number, **log.line(), "attempt": attempt}
        answered = f"{len(log.accepted)} of {len(clients)} clients answered, {config.min_clients} needed"
        notify("note", {"text": f"round {number}: {answered}"})
    raise FlexLoraError(
        f"round {number}: too few clients answered in {ATTEMPTS} attempts ({'; '.join(log.reasons()) or answered}); "
        f"the state of round {standing.round} is saved: mend that, then `flexlora resume {run.folder}`"
    )


def limits_of(config: Config) -> guard.Limits:
    """What a client may do. With differential privacy no bound may depend on other clients: its own clipping is one."""
    factor = None if config.dp_noise else config.norm_factor
    return guard.Limits(config.max_examples, config.max_norm, factor, config.norm_action)


def after_round(setup: Setup, standing: Standing, state: Any, tasks: Sequence[TrainTask], log: RoundLog) -> Standing:
    """The standing with the new state, pruned ranks, and the norms that the guard remembers."""
    norms = standing.norms
    if tasks and not setup.mechanism:
        norms = guard.remembered(norms, guard.kind(tasks[0].download.rule), log.norms.values())
    return replace(standing, round=standing.round + 1, state=state, table={**standing.table, **log.ranks}, norms=norms)


def private_update(
    setup: Setup, mechanism: privacy.Mechanism, standing: Standing, updates: Iterator[ClientUpdate], secret: int
) -> ClientUpdate:
    """The one noised update that stands for the round, at the largest rank of any client."""
    top = setup.method.distribute(standing.state, ranks.largest(standing.table.values())).adapter
    return privacy.private_update(updates, top, mechanism, seed=secret, round=standing.round + 1)


def downloads(setup: Setup, standing: Standing, clients: Sequence[int]) -> Iterator[tuple[int, Download]]:
    """What each client gets: one call of `distribute` for each distinct ranks, cast as it will travel."""
    made: dict[tuple[tuple[str, int], ...], Download] = {}
    dtype = getattr(torch, setup.config.wire_dtype)
    for client in clients:
        mine = tuple(standing.table[client].items())
        if mine not in made:
            download = setup.method.distribute(standing.state, standing.table[client])
            base_delta = {m: x for m, x in wire.cast(download.base_delta, dtype).items() if isinstance(x, LowRank)}
            made[mine] = replace(download, adapter=wire.cast(download.adapter, dtype), base_delta=base_delta)
        yield client, made[mine]


def aggregate(method: Method, standing: Standing, updates: Iterator[ClientUpdate]) -> Any | None:
    """The next state, or None where no update came."""
    first = next(updates, None)
    return None if first is None else method.aggregate(standing.state, itertools.chain([first], updates))


def global_adapter(method: Method, state: Any, at: Ranks) -> dict[str, LowRank]:
    """The one model that is scored, kept as best and exported: per module the best approximation of delta(state) at rank `at`.

    Every module has exactly that rank: where delta(state) has less, further directions are ready to train and change nothing.
    """
    return {
        module: x
        if x.A.shape[0] == at[module]
        else lowrank.at_rank(lowrank.svd(x, at[module]), at[module], seed=state.seed, module=module, round=state.round)
        for module, x in method.delta(state).items()
        if module in at
    }


def validate(setup: Setup, runner: Runner, standing: Standing, adapter: Adapter) -> Mapping[str, Any]:
    """Scores on the fixed validation sample: the server's own where it has data, else the clients', weighted by tokens."""
    if not setup.method.personal:
        scores = setup.scorer.validate(adapter)
        if scores:
            return scores
    count = max(1, setup.config.validation_examples // EVAL_PER_CLIENT)
    share = min(1.0, count / len(setup.table))
    clients = sampling.participants(sorted(setup.table), share, seed=setup.config.seed, round=0)
    tasks = [
        EvalTask(standing.round, client, download, EVAL_PER_CLIENT)
        for client, download in (
            downloads(setup, standing, clients)
            if setup.method.personal
            else ((client, Download(adapter, {}, ClientRule())) for client in clients)
        )
    ]
    scores = [s for s in runner.evaluate(standing.round, tasks) if isinstance(s, ClientScore)]
    tokens = sum(s.tokens for s in scores)
    if not tokens:
        return {}
    # Sorted, so that the order of arrival changes no bit.
    total = sum(s.loss_sum for s in sorted(scores, key=lambda s: s.client))
    return {
        "loss": total / tokens,
        "clients": len(scores),
        "examples": sum(s.examples for s in scores),
        "tokens": tokens,
    }


def evaluate(setup: Setup, standing: Standing, adapter: Adapter) -> Mapping[str, Any]:
    """Scores on the held-out examples, and the loss at the ranks that stand for each label."""
    if setup.method.personal:
        return {}
    by_rank = {
        label: {m: lowrank.truncate(x, r[m]) for m, x in adapter.items() if isinstance(x, LowRank) and m in r}
        for label, r in ranks.labelled(standing.table.values()).items()
    }
    return setup.scorer.evaluate(adapter, by_rank)


def judge_round(config: Config, standing: Standing, validation: Mapping[str, Any]) -> Standing:
    """The standing with the best round and the early stop brought up to date.

    A round without a score is neither better nor worse than the best one; where no round has any, the last one is the best.
    """
    loss, best = validation.get("loss"), standing.best_loss
    # With differential privacy nothing may be chosen by a loss on the clients' data: that would cost epsilon too.
    if standing.best_round is None or best is None or config.dp_noise:
        return replace(standing, best_round=standing.round, best_loss=loss, stale_rounds=0)
    if loss is None:  # no site answered: nothing is known of this round
        return standing
    if not math.isfinite(best) or loss < best:
        return replace(standing, best_round=standing.round, best_loss=loss, stale_rounds=0)
    stale = standing.stale_rounds + 1
    stop = config.early_stop and stale >= config.patience
    reason = f"validation loss has not improved for {stale} rounds" if stop else None
    return replace(standing, stale_rounds=stale, stopped=reason)


def taken_up(setup: Setup, run: Run, notify: Notify, at: int | None = None) -> Standing:
    """Where the run stands (`last_standing`), with `adapter/` of its best round."""
    standing = last_standing(setup, run, notify, at)
    restore_adapter(setup, run, standing)
    return standing


def restore_adapter(setup: Setup, run: Run, standing: Standing) -> None:
    """Have `adapter/` be that of the best round again, where a round that is forgotten now left its own there."""
    best = standing.best_round
    if best is None:
        shutil.rmtree(run.adapter, ignore_errors=True)
    elif not setup.method.personal and run.adapter_round != best and (then := best_standing(run, standing)):
        adapter = global_adapter(setup.method, then.state, ranks.largest(then.table.values()))
        save_adapter(setup, run, adapter, run.line(best))


def best_standing(run: Run, standing: Standing) -> Standing | None:
    """The standing of the best round; None where its checkpoint is not whole."""
    best = standing.best_round
    if best is None or best == standing.round:
        return standing
    try:
        return standing_of(best, *read_checkpoint(checkpoint_folder(run.checkpoints, best), standing.state))
    except DamagedError:
        return None


def evaluate_best(setup: Setup, run: Run, standing: Standing) -> dict[str, Any]:
    """Held-out scores of the best round, with its number, where that is an earlier one without any; its adapter's card tells them.

    {} where there is nothing to score.
    """
    best = standing.best_round
    if best is None or best == standing.round or setup.method.personal:
        return {}
    line, then = run.line(best), best_standing(run, standing)
    if line.get("eval") or then is None:
        return {}
    adapter = global_adapter(setup.method, then.state, ranks.largest(then.table.values()))
    scores = dict(evaluate(setup, then, adapter))
    if not scores:
        return {}
    save_adapter(setup, run, adapter, {**line, "eval": scores})
    return {"round": best, **scores}


def save_adapter(setup: Setup, run: Run, adapter: Mapping[str, LowRank], facts: Mapping[str, Any]) -> None:
    """Put the adapter of this round in the place of the one before, whole or not at all."""
    temporary = run.folder / ".adapter.part"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        setup.scorer.save(temporary, adapter, facts)
        sync_files(temporary)
        replace_folder(temporary, run.adapter)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FlexLoraError(
            f"{run.adapter}: cannot be written: {reason}; make room or writable, then go on with "
            f"`flexlora resume {run.folder}`"
        ) from None
