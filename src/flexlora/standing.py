"""What a run is made of, where it stands after a round, and how it is taken up again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from flexlora import lowrank, ranks, rundir
from flexlora.checkpoint import (
    DamagedError,
    checkpoint_folder,
    checkpoint_rounds,
    read_checkpoint,
    recover_folder,
    remove_checkpoints,
    remove_kept,
)
from flexlora.collection import Notify
from flexlora.config import Config
from flexlora.data.federation import Federation
from flexlora.methods.base import started
from flexlora.privacy import Mechanism
from flexlora.prompts import CHAT, Template
from flexlora.rundir import Run
from flexlora.types import Adapter, FlexLoraError, LowRank, Method, Ranks, Shapes


class Scorer(Protocol):
    """Scores and saves the global model where the server has data and the base model."""

    def validate(self, adapter: Adapter) -> Mapping[str, Any]:
        """Scores on the fixed validation sample; `loss` is what early stop and the best round look at. {}: no data here."""
        ...

    def evaluate(self, adapter: Adapter, by_rank: Mapping[str, Adapter]) -> Mapping[str, Any]:
        """Scores on the held-out examples, which are reported and never selected on. {}: there are none."""
        ...

    def save(self, folder: Path, adapter: Mapping[str, LowRank], facts: Mapping[str, Any]) -> None:
        """Write the adapter in PEFT format."""
        ...


@dataclass(frozen=True)
class Setup:
    """All that a run needs, made by `flexlora.launch`."""

    config: Config
    method: Method
    shapes: Shapes
    table: Mapping[int, Ranks]
    """Client -> ranks at the start of the run."""
    template: str
    scorer: Scorer
    data: Federation | None
    """The data, whose fingerprint resume compares; None where the server has none."""
    start: Mapping[str, LowRank] | None = None
    """Adapter that the global model starts from."""
    base: str = ""
    """Fingerprint of the base model."""
    mechanism: Mechanism | None = None
    """Differential privacy, where it is asked for."""
    wording: str = ""
    """Digest of what the template says (`wording`)."""


@dataclass(frozen=True)
class Standing:
    """Where a run stands after a round: with the method's state, all that resume needs."""

    round: int
    state: Any
    table: Mapping[int, Ranks]
    best_round: int | None = None
    best_loss: float | None = None
    stale_rounds: int = 0
    """Rounds since the best one."""
    stopped: str | None = None
    """Why the run ended before its last round."""
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Norms of the accepted increments by kind of round, for the guard."""
    energy: Mapping[str, float] = field(default_factory=dict)
    """Label of ranks -> share of ‖W‖² beyond the ranks that stand for it (`ranks.labelled`)."""
    best_before: int | None = None
    """The best round as it was a round ago."""

    @property
    def needed_rounds(self) -> set[int]:
        """Rounds whose checkpoints stay: the last two, and what was the best at either."""
        return {self.round, self.round - 1, self.best_round or self.round, self.best_before or self.round}

    def progress(self, setup: Setup) -> dict[str, Any]:
        kinds: list[Ranks] = list(ranks.distinct(self.table.values()))
        index = {tuple(kind.items()): i for i, kind in enumerate(kinds)}
        return {
            "config": setup.config.dump(),
            "data": setup.data.fingerprint() if setup.data else None,
            "base": setup.base,
            "wording": setup.wording,
            "shapes": {module: list(shape) for module, shape in setup.shapes.items()},
            "kinds": [dict(kind) for kind in kinds],
            "table": [[client, index[tuple(r.items())]] for client, r in self.table.items()],
            "best_round": self.best_round,
            "best_loss": self.best_loss,
            "stale_rounds": self.stale_rounds,
            "stopped": self.stopped,
            "norms": {kind: list(norms) for kind, norms in self.norms.items()},
            "energy": dict(self.energy),
            "best_before": self.best_before,
        }


def standing_of(round: int, state: Any, progress: Mapping[str, Any]) -> Standing:
    """The inverse of `Standing.progress`."""
    return Standing(
        round,
        state,
        {client: progress["kinds"][kind] for client, kind in progress["table"]},
        progress["best_round"],
        progress["best_loss"],
        progress["stale_rounds"],
        progress["stopped"],
        progress["norms"],
        progress["energy"],
        progress.get("best_before"),
    )


def energy_beyond(method: Method, state: Any, table: Mapping[int, Ranks]) -> dict[str, float]:
    """For each label of ranks, the share of ‖W‖² (over all modules) beyond the ranks that stand for it; {} where W = 0."""
    kinds = ranks.labelled(table.values())
    total, beyond = 0.0, [0.0] * len(kinds)
    for module, x in method.delta(state).items():
        energy = float(lowrank.norm(x)) ** 2
        total += energy
        for i, share in enumerate(lowrank.energy_beyond(x, [kind.get(module, 0) for kind in kinds.values()])):
            beyond[i] += share * energy
    return {label: part / total for label, part in zip(kinds, beyond, strict=True)} if total else {}


def first_standing(setup: Setup) -> Standing:
    """Before the first round. Raises FlexLoraError where the method cannot start from the adapter that is given."""
    levels = ranks.distinct(setup.table.values())
    state = setup.method.init(setup.shapes, setup.config.seed, levels)
    if setup.start is not None:
        state = start_from(setup, state, setup.start)
    standing = Standing(0, state, dict(setup.table))
    return replace(standing, energy=energy_beyond(setup.method, state, standing.table))


def start_from(setup: Setup, state: Any, start: Mapping[str, LowRank]) -> Any:
    """The state whose global delta weight is the adapter's best approximation at the largest ranks of the run.

    As if one client had answered with it, in factors without dead directions.
    """
    name, seed = setup.config.method_name, setup.config.seed
    top = ranks.largest(setup.table.values())
    start = {
        m: lowrank.at_rank(lowrank.svd(x, top[m]), top[m], seed=seed, module=m, round=0)
        for m, x in start.items()
        if m in top
    }
    remedy = "start without --init_adapter, or with --method flexlora"
    if setup.config.baseline == "slora" and name != "slora":
        name, remedy = f"slora before {name}", f"{remedy} and --baseline fedit"
    try:
        state = started(setup.method, state, start)
        got = setup.method.delta(state)
    except (FlexLoraError, ValueError, KeyError) as error:
        raise FlexLoraError(f"init_adapter: method {name} cannot start from it ({error}); {remedy}") from None
    for module, x in start.items():
        error = lowrank.norm(lowrank.stack([got[module], x], [1.0, -1.0])) if module in got else lowrank.norm(x)
        if float(error) > 1e-4 * float(lowrank.norm(x)):
            raise FlexLoraError(f"init_adapter: method {name} cannot start from an adapter; {remedy}")
    return state


WHERE = (
    "output_dir", "name", "resume_from", "cache_dir", "runner", "workers", "ray_address", "worker_gpus", "round_timeout"
)  # fmt: skip
"""Configuration keys that say where and how a run is played, not what comes of it."""
FREE_TO_DIFFER = ("rounds", *WHERE)
"""Those that resume lets differ from the checkpoint's: `rounds` may grow."""


def wording(template: Template, tokenizer: Any) -> str:
    """Digest of what a template makes of a record, whatever it is called; with `chat` the tokenizer's own counts."""
    texts = [template.prompt_input, template.prompt_no_input, template.response_split, template.stop]
    if template.name == CHAT.name:
        texts.append(tokenizer.chat_template)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def last_standing(setup: Setup, run: Run, notify: Notify, at: int | None = None) -> Standing:
    """The newest whole checkpoint, or that of round `at` (0: the start); later lines of metrics.jsonl are forgotten.

    Raises FlexLoraError, before anything is removed, where the run was made of something else, none is whole, or `at`'s is not.
    """
    rounds = checkpoint_rounds(run.checkpoints)
    shown = ", ".join(map(str, rounds)) or "none"
    played = len(run.metrics)
    # A line comes before its checkpoint: one alone may be of a first round that was cut off.
    if played > 1 and not rounds and at != 0:
        raise FlexLoraError(
            f"{run.checkpoints}: no checkpoint is left of {played} rounds; put them back, or start a new run"
        )
    if at is not None and at not in (0, *rounds):
        raise FlexLoraError(f"resume_from: round {at} has no checkpoint in {run.folder}; there are: {shown}")
    if at is not None and setup.config.rounds < at:
        raise FlexLoraError(f"rounds: {setup.config.rounds} are fewer than resume_from {at}; raise --rounds")
    # Before a checkpoint is read: the state of another method would look damaged.
    refuse_changes(setup, {"config": run.config.dump(), **run.contents}, run)
    prototype = setup.method.init(setup.shapes, setup.config.seed, ranks.distinct(setup.table.values()))
    standing, progress = None, {}
    for round in [at] if at else reversed(rounds):
        try:
            state, progress = read_checkpoint(checkpoint_folder(run.checkpoints, round), prototype)
        except DamagedError as error:
            if at:
                raise FlexLoraError(f"resume_from: {error}; there are: {shown}") from None
            notify("note", {"text": f"{error}; the checkpoint before it is used"})
            continue
        refuse_changes(setup, progress, run)
        standing = standing_of(round, state, progress)
        break
    if at == 0:  # what the newest one is made of was compared
        standing = None
    # Asked for more rounds than when it stopped early, a run goes on, and says so from now on.
    if standing and standing.stopped and setup.config.rounds > progress["config"]["rounds"]:
        standing = replace(standing, stopped=None, stale_rounds=0)
    if standing is None:
        if rounds and at != 0:
            raise FlexLoraError(f"{run.checkpoints}: no checkpoint is whole; start a new run")
        standing = first_standing(setup)
    recover_folder(run.adapter)
    # As after a round: the process may have been killed before it came to that. Later checkpoints go before their lines, so
    # that a kill in between leaves none without its line.
    remove_checkpoints(run.checkpoints, standing.needed_rounds)
    rundir.cut_metrics(run.folder, standing.round, stopped=standing.stopped)
    lost = standing.round - len(run.metrics)
    if lost:
        notify("note", {"text": f"{run.folder / 'metrics.jsonl'}: {lost} lines were damaged and are gone"})
    remove_kept(run.kept, standing.needed_rounds)
    return standing


def contents(setup: Setup) -> dict[str, Any]:
    """Fingerprints of what a run is made of where its configuration has but a name or a path."""
    file = isinstance(setup.config.ranks, str) and Path(setup.config.ranks).is_file()
    table = sorted((client, sorted(mine.items())) for client, mine in setup.table.items())

    def digest(x: LowRank) -> str:
        return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in x)).hexdigest()

    return {
        "base": setup.base,
        "wording": setup.wording,
        "ranks": hashlib.sha256(json.dumps(table).encode()).hexdigest() if file else None,
        "start": {m: digest(x) for m, x in (setup.start or {}).items()},
        "data": setup.data.fingerprint() if setup.data else None,
    }


def refuse_changes(setup: Setup, was: Mapping[str, Any], run: Run) -> None:
    """Raise FlexLoraError naming the first configuration key, or the weights, template or data file, that differs from what was."""
    old, new = was["config"], setup.config.dump()
    for name in new:
        if name not in FREE_TO_DIFFER and old.get(name) != new[name]:
            raise FlexLoraError(
                f"{run.folder}: {name} is {new[name]!r} now and was {old.get(name)!r} when the run began; "
                "set it back, or start a new run"
            )
    what = {
        "base": f"the weights of {setup.config.model}",
        "wording": f"the template {setup.template}",
        "ranks": f"the file {setup.config.ranks}",
        "start": f"the adapter {setup.config.init_adapter}",
    }
    for name, now in contents(setup).items():
        if name in what and was.get(name, now) != now:
            raise FlexLoraError(
                f"{run.folder}: {what[name]} changed since the run began; put back what it was, or start a new run"
            )
    if setup.data is not None and was.get("data"):
        setup.data.check_unchanged(was["data"])
