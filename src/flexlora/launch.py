"""From a configuration to a run: everything is checked and loaded here, then the engine plays the rounds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexlora import privacy, ranks, sampling
from flexlora.card import model_card
from flexlora.client import Site, load
from flexlora.collection import Notify
from flexlora.config import Config
from flexlora.data.federation import Federation, open_federation, spread
from flexlora.engine import Runner, run_rounds, taken_up
from flexlora.memory import Workload, affordable, read_bytes, type_memories
from flexlora.methods import get_method, method_entry
from flexlora.modeling import Model, empty_model
from flexlora.prompts import Template, TokenCache, end_of_turn, load_template
from flexlora.ranks import RankPlan
from flexlora.rundir import (
    Run,
    create_run,
    environment,
    exclusive,
    open_run,
    refuse_taken,
    resumable,
    stoppable,
    with_rounds,
    write_text,
)
from flexlora.runners.choice import open_runner, refuse_runner
from flexlora.saved import load_adapter
from flexlora.scorer import ModelScorer
from flexlora.standing import Setup, contents, first_standing, wording
from flexlora.types import FlexLoraError, Method, Ranks, Shapes

NOT_ROBUST = {
    "rbla": "averages the last directions over the few clients that hold them",
    "fedsa": "keeps B at the clients, so that the server cannot tell what an A does",
    "raflora": "averages the largest ranks' share over the clients that have them, who may all be liars",
    "flexlora-carry": "keeps what clients of the largest rank add where no other client sees it, and they may all be liars",
}
"""Method -> why `robust` promises nothing there."""

BASE_DELTA = ("flora", "florist")
"""Methods of unequal ranks that send clients a low-rank term for the base."""

DP_INSTEAD = {"robust": "clips and weighs alike", "min_clients": "counts every round, whoever came"}


SCORED_BY = (
    "model", "precision", "device", "trust_remote_code", "data", "num_clients", "prompt_template", "cutoff_len",
    "train_on_inputs", "eval_examples", "max_new_tokens", "eval_batch_size",
)  # fmt: skip
"""Keys of which the held-out scores of the base model are made."""


def silent(event: str, facts: Mapping[str, Any]) -> None:
    """The default for `notify`."""


def run(config: Config, notify: Notify = silent, *, base: Mapping[str, Any] | None = None) -> Run:
    """Play a whole run and return its folder. Raises FlexLoraError before anything is written where the input is bad.

    `base`: the base model's held-out scores where they are known, from a run that agrees in SCORED_BY.
    """
    if config.resume_from is not None:
        return resume(run_folder(config), at=config.resume_from, config=config, notify=notify)
    folder = run_folder(config)
    refuse_taken(folder)
    with assembled(config, folder, notify) as session, exclusive(folder):
        made = create_run(config, folder, environment(**session.facts), contents(session.setup))
        return play(session, made, None, notify, base)


def resume(
    folder: Path,
    *,
    rounds: int | None = None,
    at: int | None = None,
    config: Config | None = None,
    notify: Notify = silent,
) -> Run:
    """Go on with an interrupted run, from its newest whole checkpoint or that of round `at`; `rounds` may grow.

    Raises FlexLoraError where the configuration or the data differ from those that the run began with, and for fewer rounds.
    """
    found = open_run(folder)
    with stoppable(folder), exclusive(folder):
        config = (config or found.config).model_copy(update={} if rounds is None else {"rounds": rounds})
        if rounds is not None and rounds < found.config.rounds:
            raise FlexLoraError(
                f"rounds: {folder} has {found.config.rounds} rounds, and {rounds} are fewer; --rounds can only grow"
            )
        with assembled(config, found.folder, notify) as session:
            return play(session, found, at, notify)


@dataclass(frozen=True)
class Session:
    """What a run holds while it goes on."""

    setup: Setup
    runner: Runner
    scorer: ModelScorer
    facts: Mapping[str, Any]
    """For env.json and the event `start`."""


def play(session: Session, run: Run, at: int | None, notify: Notify, base: Mapping[str, Any] | None = None) -> Run:
    """Score the base model if that was not done, then the rounds that are left."""
    setup, scorer = session.setup, session.scorer
    with resumable(run.folder):
        standing = taken_up(setup, run, notify, at)
        run = with_rounds(run, setup.config.rounds)
        notify("start", {**session.facts, "folder": run.folder, "round": standing.round, "rounds": setup.config.rounds})
        if not run.base:
            scores = {"validation": scorer.validate({}), "eval": {}}
            if setup.config.eval_every:
                evaluated = base or scorer.evaluate({}, {})
                scores["eval"] = {k: v for k, v in evaluated.items() if k != "loss_by_rank"}
            write_text(run.folder / "base.json", json.dumps(scores, indent=2) + "\n")
        notify("base", run.base)
        return run_rounds(setup, session.runner, run, standing, notify)


def run_folder(config: Config) -> Path:
    """`{output_dir}/{name}`; without a name one of method, ranks and seed, numbered where it is taken.

    To go on from a round without a name: the run of the highest number. Raises FlexLoraError where there is none.
    """
    if config.name is not None:
        return config.output_dir / config.name
    kind = config.ranks if isinstance(config.ranks, str) else "map"
    stem = f"{config.method_name}-{Path(kind).stem.replace(':', '-')}-{config.seed}"
    if config.resume_from is not None:
        runs = [path.parent.name for path in config.output_dir.glob("*/config.yaml")]
        numbered = {
            int(m[1] or 1): m[0] for m in (re.fullmatch(re.escape(stem) + r"(?:-(\d+))?", n) for n in runs) if m
        }
        if not numbered:
            raise FlexLoraError(f"resume_from: no run of these settings is in {config.output_dir}; name it with --name")
        return config.output_dir / numbered[max(numbered)]
    folder = config.output_dir / stem
    number = 2
    while folder.exists():
        folder = config.output_dir / f"{stem}-{number}"
        number += 1
    return folder


def method_of(config: Config) -> Method:
    """The configured method with its options. Raises FlexLoraError for unknown names, options and impossible pairs."""
    name = config.method_name
    options = dict(config.method_options)
    if config.baseline == "slora" and name != "slora":
        then = options.setdefault("then", name)
        if config.method != "auto" and then != name:
            raise FlexLoraError(
                f"method_options: then is {then!r} and method is {name!r}, which slora is to be followed by; leave one out"
            )
        name = "slora"
    # A key of the configuration that the method, or slora's successor, takes is passed on under its own name.
    known = {*method_entry(name).options, *method_entry(options.get("then", name)).options}
    for key in ("sparse_rounds", "handle_alpha", "prune_lambda", "prune_gamma"):
        if key in known:
            options.setdefault(key, getattr(config, key))
    for method in (name, options.get("then")):
        if config.robust and method in NOT_ROBUST:
            raise FlexLoraError(
                f"robust: does not go with method {method}, which {NOT_ROBUST[method]}; use hetlora or flexlora, or leave it out"
            )
    return get_method(name, **options)


def refuse_unequal(config: Config, method: Method, plan: RankPlan) -> None:
    """Raise FlexLoraError where the method needs equal ranks and the plan has several types."""
    used = {name for name, share in plan.shares.items() if share} | set(plan.clients.values())
    if method.equal_ranks and len({tuple(plan.types[name].items()) for name in used}) > 1:
        name = config.method_options.get("then", config.method_name)
        raise FlexLoraError(
            f"method {name} needs equal ranks and ranks is {config.ranks!r}; "
            "use --ranks homo, or a method for unequal ranks such as flexlora"
        )


def refuse_strangers(config: Config, plan: RankPlan, clients: Sequence[int]) -> None:
    """Raise FlexLoraError where ranks or client_memory name a client that there is not, or nothing looks at client_memory."""
    if config.client_memory and config.ranks != "auto":
        raise FlexLoraError("client_memory: is for --ranks auto; add that, or leave it out")
    for key, names in (("ranks", map(str, plan.clients)), ("client_memory", config.client_memory)):
        for name in sorted(set(names) - {"default", *map(str, clients)}):
            raise FlexLoraError(
                f"{key}: names client {name}, and the clients are 0 to {len(clients) - 1}; mend that, or leave it out"
            )


def refuse_few(config: Config, clients: int) -> None:
    """Raise FlexLoraError where no round can have as many answers as it needs."""
    drawn = sampling.cohort(clients, config.participation)
    if not config.dp_noise and drawn < config.min_clients:
        raise FlexLoraError(
            f"min_clients: a round needs {config.min_clients} answers and participation {config.participation:g} draws "
            f"{drawn} of {clients} clients; raise --participation or lower --min_clients"
        )


def mechanism_of(config: Config, clients: int) -> privacy.Mechanism | None:
    """Differential privacy as configured. Raises FlexLoraError for what does not go with it, and where its library is missing."""
    if config.dp_noise is None:
        return None
    name = "slora" if config.baseline == "slora" else config.method_name
    mechanism = privacy.mechanism(
        name,
        noise=config.dp_noise,
        clip=config.dp_clip,
        rate=config.participation,
        clients=clients,
        delta=config.dp_delta,
    )
    for key, taken in (("robust", config.robust), ("min_clients", config.min_clients > 1)):
        if taken:
            raise FlexLoraError(f"{key}: does not go with dp_noise, which {DP_INSTEAD[key]}; leave it out")
    privacy.epsilon(mechanism, config.rounds)
    return mechanism


def stated_memory(config: Config, clients: Iterable[int]) -> dict[int, int]:
    """Client -> bytes that it can spend on training. Raises FlexLoraError where one has not said."""
    stated = {name: read_bytes(size) for name, size in config.client_memory.items()}
    memory = {client: stated.get(str(client), stated.get("default", 0)) for client in clients}
    unsaid = [client for client, size in memory.items() if not size]
    if unsaid:
        raise FlexLoraError(
            f"client_memory: client {unsaid[0]} has stated none, ranks auto needs it; add {unsaid[0]}=8GB or default=8GB"
        )
    return memory


def rank_plan(config: Config, hidden_size: int, clients: Iterable[int]) -> RankPlan:
    """The configured plan; with ranks auto each client gets the largest type whose training fits its memory."""
    if config.ranks != "auto":
        return ranks.read_plan(config.ranks, lora_r=config.lora_r, hidden_size=hidden_size)
    plan = ranks.named_plan("random", lora_r=config.lora_r, hidden_size=hidden_size)
    empty = empty_model(
        config.model,
        targets=config.lora_target_modules,
        cache_dir=config.cache_dir,
        precision=config.precision,
        trust_remote_code=config.trust_remote_code,
    )
    work = Workload(config.micro_batch_size, config.cutoff_len, config.optimizer, config.lora_dropout)
    needed = type_memories(empty, plan, work)
    # What such a method sends beside the adapter grows to full rank, and a client holds it twice, in float32.
    full = sum(min(shape) * sum(shape) for shape in empty.shapes.values())
    beside = 2 * 4 * full if config.method_name in BASE_DELTA else 0
    chosen: dict[int, str] = {}
    for client, budget in stated_memory(config, clients).items():
        best = affordable(needed, budget - beside)
        if best is None:
            least = (beside + min(memory.total for memory in needed.values())) / 1e9
            raise FlexLoraError(
                f"client_memory: client {client} cannot train even the smallest rank type, which needs {least:.2f} GB; "
                "lower --micro_batch_size or --cutoff_len, or leave it out"
            )
        chosen[client] = best
    return RankPlan(plan.types, {}, chosen)


def rank_table(
    config: Config, plan: RankPlan, shapes: Shapes, clients: Iterable[int], notify: Notify
) -> dict[int, Ranks]:
    """Client -> ranks. Clients of one type share one mapping; clipped ranks are told once for each type."""
    ranks.refuse_stray(plan, shapes)
    resolved: dict[str, Ranks] = {}
    table: dict[int, Ranks] = {}
    for client in clients:
        kind = plan.type_of(client, config.seed)
        if kind not in resolved:
            resolved[kind], clipped = ranks.resolve(plan.types[kind], shapes, config.max_rank)
            if clipped:
                worst = min(clipped, key=lambda m: resolved[kind][m])
                notify(
                    "note",
                    {
                        "text": f"rank type {kind}: {len(clipped)} modules clipped, e.g. {worst} "
                        f"from {clipped[worst]} to {resolved[kind][worst]}"
                    },
                )
            if not resolved[kind]:
                raise FlexLoraError(f"ranks: type {kind} adapts no module of the model; name its modules, or use *")
        table[client] = resolved[kind]
    return table


def template_name(config: Config, model: Model) -> str:
    """The prompt template's name, with `auto` resolved."""
    if config.prompt_template != "auto":
        return config.prompt_template
    return "chat" if model.has_chat_template else "alpaca"


def check_schedule(config: Config, federation: Federation) -> None:
    """Read the training files of every client that the schedule will ask, so that bad data stops the run before it begins."""
    clients = sorted(federation.clients)
    # The sample of differential privacy is a secret of the run: anybody may be asked.
    asked: set[int] = set(clients) if config.dp_noise else set()
    for round in range(1, config.rounds + 1):
        asked |= set(sampling.participants(clients, config.participation, seed=config.seed, round=round))
    for client in sorted(asked):
        federation.train(client)


def refuse_long(config: Config, model: Model) -> None:
    """Raise FlexLoraError where an example may have more tokens than the model has positions."""
    if model.positions and config.cutoff_len > model.positions:
        raise FlexLoraError(
            f"cutoff_len: {config.cutoff_len} are more tokens than {config.model} has positions; "
            f"lower --cutoff_len to {model.positions} or less"
        )


@contextmanager
def assembled(config: Config, folder: Path, notify: Notify) -> Iterator[Session]:
    """Check the configuration, open the data, load the model; cheap checks first. Closes the runner in the end."""
    refuse_runner(config)
    method = method_of(config)
    if config.data is None:
        raise FlexLoraError("data: no folder given; name one with --data, or try `flexlora demo`")
    federation = open_federation(config.data, config.num_clients)
    mechanism = mechanism_of(config, len(federation))
    refuse_few(config, len(federation))
    alone = len(federation) > 1 and sampling.cohort(len(federation), config.participation) == 1
    if alone and not config.dp_noise and "participation" not in config.model_fields_set:
        text = f"draws one of {len(federation)} clients a round, so that nothing is averaged; raise --participation"
        notify("note", {"text": f"participation {config.participation:g} {text}"})
    if config.eval_every and config.max_new_tokens >= config.cutoff_len:
        raise FlexLoraError(
            f"max_new_tokens {config.max_new_tokens} leaves no prompt within cutoff_len {config.cutoff_len}: "
            "raise --cutoff_len or lower --max_new_tokens"
        )
    load_template(config.prompt_template if config.prompt_template != "auto" else "alpaca")
    # Sizes of the types do not matter yet: this only asks whether they differ.
    types = "random" if config.ranks == "auto" else config.ranks
    plan = ranks.read_plan(types, lora_r=config.lora_r, hidden_size=0)
    refuse_strangers(config, plan, federation.clients)
    if config.ranks == "auto":
        stated_memory(config, federation.clients)
    refuse_unequal(config, method, plan)
    validation = federation.validation_sample(config.validation_examples, config.seed)
    held_out = spread(federation.global_test(), config.eval_examples)
    check_schedule(config, federation)
    notify("note", {"text": f"loading {config.model}"})
    model = load(config)
    refuse_long(config, model)
    if config.precision == "auto" and model.faster_in_bfloat16:
        text = (
            "this processor multiplies bfloat16 faster than float32: with precision bfloat16 training takes less time"
        )
        notify("note", {"text": text})
    plan = rank_plan(config, model.hidden_size, federation.clients)
    table = rank_table(config, plan, model.shapes, federation.clients, notify)
    name = template_name(config, model)
    template: Template = load_template(name)
    facts = {
        "model": config.model,
        "method": config.method_name,
        "ranks": ranks.counts(table.values()),
        "clients": len(table),
        "template": name,
        "threads": torch.get_num_threads(),
        "modules": len(model.shapes),
    }
    scorer = ModelScorer(model, config, template, validation, held_out, lambda line: model_card(config, facts, line))
    start = load_adapter(config.init_adapter, model.shapes) if config.init_adapter else None
    setup = Setup(
        config,
        method,
        model.shapes,
        table,
        name,
        scorer,
        federation,
        start,
        model.fingerprint,
        mechanism,
        wording(template, model.tokenizer),
    )
    # What the template or the method cannot do is said before anything is written.
    end_of_turn(template, model.tokenizer)
    if start is not None:
        first_standing(setup)
    site = Site(
        model,
        federation,
        TokenCache(),
        Run(folder).kept,
        config.eval_batch_size,
        getattr(torch, config.wire_dtype),
    )
    runner = open_runner(config, site, federation.clients, config.local_training(1, name))
    try:
        yield Session(setup, runner, scorer, facts)
    finally:
        runner.close()
