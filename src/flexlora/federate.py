"""The server of a federation: what Flower's ServerApp runs. The round loop is the engine's, the checkpoints are the same."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexlora import ranks
from flexlora.card import about, model_card
from flexlora.checkpoint import checkpoint_rounds
from flexlora.client import load
from flexlora.collection import Notify
from flexlora.config import Config, make_config
from flexlora.engine import run_rounds, taken_up
from flexlora.launch import mechanism_of, method_of, refuse_few, refuse_long, template_name
from flexlora.prompts import load_template
from flexlora.ranks import RankPlan
from flexlora.rundir import Run, create_run, environment, exclusive, open_run, with_rounds
from flexlora.runners.flower import FlowerRunner, NewSitesError
from flexlora.saved import load_adapter, save_adapter
from flexlora.standing import Setup, first_standing, wording
from flexlora.types import Adapter, ClientInfo, FlexLoraError, LowRank, Ranks, Shapes

BYTES_A_PARAMETER = 16
"""Of training one LoRA parameter in float32: itself, its gradient and AdamW's two moments."""


def serve(grid: Any, run_config: Mapping[str, Any], notify: Notify | None = None) -> Run:
    """Play or resume the run `{output_dir}/{name}` of a Flower run config, whose keys are those of `flexlora run`."""
    notify = notify or printed
    config = make_config({**run_config, "runner": "flower"}, "run config")
    if config.name is None:
        raise FlexLoraError(
            "name: a federation's run needs one, by which it is found again: add name=… to the run config"
        )
    if config.dp_noise and config.num_clients is None:
        raise FlexLoraError(
            "num_clients: dp_noise needs the number of sites, whoever is connected; add num_clients=N to the run config, "
            "number the sites from 0 to N - 1, and give a run that began without it another name"
        )
    if config.prompt_template.endswith(".json"):
        raise FlexLoraError("prompt_template: the sites do not have that file; choose a built-in template")
    if config.ranks == "auto" or config.client_memory:
        raise FlexLoraError(
            "ranks: auto and client_memory are for clients on one machine; a site states memory=… or rank=… in its node "
            "config: choose ranks='homo' or a distribution for those that state none"
        )
    method = method_of(config)
    mechanism = mechanism_of(config, config.num_clients or 0)
    if config.num_clients:  # else more sites may come, for which the runner waits
        refuse_few(config, config.num_clients)
    notify("note", {"text": f"loading {config.model}"})
    model = load(config)
    refuse_long(config, model)
    shapes, base, hidden_size = model.shapes, model.fingerprint, model.hidden_size
    template = template_name(config, model)
    words = wording(load_template(template), model.tokenizer)
    start = load_adapter(config.init_adapter, shapes) if config.init_adapter else None
    del model
    plan = ranks.read_plan(config.ranks, lora_r=config.lora_r, hidden_size=hidden_size)
    ranks.refuse_stray(plan, shapes)
    folder = config.output_dir / config.name
    with exclusive(folder):
        token, begun = token_of(folder), bool(checkpoint_rounds(folder / "checkpoints"))
        runner = FlowerRunner(grid, config, config.local_training(1, template), token, notify)
        infos, stated = arrivals(runner, config, plan, shapes)
        table = stated if begun or not method.equal_ranks else equalled(stated, config.method_name)
        scorer = Scoreless(config, template, table)
        setup = Setup(config, method, shapes, table, template, scorer, None, start, base, mechanism, words)
        if not begun:
            # What the method cannot do is said before anything is written; a start that came to no round gives way.
            if start is not None:
                first_standing(setup)
            (folder / "config.yaml").unlink(missing_ok=True)
            create_run(config, folder, environment(run=token))
        run = open_run(folder)
        notify("start", {"folder": folder, "clients": len(table), "rounds": config.rounds})
        while True:
            standing = taken_up(setup, run, notify)
            run = with_rounds(run, config.rounds)
            table = agreed(standing.table, stated, fixed=method.equal_ranks or method.fixed_ranks)
            for number in sorted(set(stated) - set(table)):
                reason = f"method {config.method_name} has no ranks as small as those that it states"
                runner.turn_away(number, infos.pop(number), reason)
                del stated[number]
            scorer.table = table
            runner.admit(infos)
            try:
                return run_rounds(replace(setup, table=table), runner, run, replace(standing, table=table), notify)
            except NewSitesError:
                came, said = arrivals(runner, config, plan, shapes)
                infos, stated = {**infos, **came}, {**stated, **said}


def token_of(folder: Path) -> str:
    """The name by which the sites know the run of this folder, a new one where none stands there.

    Raises FlexLoraError where it is no federation's.
    """
    if not (folder / "config.yaml").exists():
        return secrets.token_hex(8)
    token = Run(folder).environment.get("run")
    if token is None:
        raise FlexLoraError(f"name: {folder} is no run of a federation; choose another name")
    return token


def arrivals(
    runner: FlowerRunner, config: Config, plan: RankPlan, shapes: Shapes
) -> tuple[dict[int, ClientInfo], dict[int, Ranks]]:
    """What the sites say, and the ranks of each, once there are enough of them; those that can have none are turned away."""
    while True:
        infos = runner.infos()
        stated: dict[int, Ranks] = {}
        for number, info in infos.items():
            try:
                stated[number] = ranks_of(config, plan, shapes, number, info)
            except FlexLoraError as error:
                runner.turn_away(number, info, error)
        if len(stated) == len(infos):
            return infos, stated


def equalled(stated: Mapping[int, Ranks], method: str) -> dict[int, Ranks]:
    """Site -> ranks at the start of a method of equal ranks: those that most sites state, for all that can hold them.

    Raises FlexLoraError where no ranks are stated more often than others.
    """
    (usual, count), *others = Counter(tuple(said.items()) for said in stated.values()).most_common(2)
    if others and others[0][1] == count:
        raise FlexLoraError(
            f"method {method} needs equal ranks, and the sites say different ones, none more often; agree on one rank=…"
        )
    return agreed({number: said for number, said in stated.items() if said == dict(usual)}, stated, fixed=True)


def agreed(table: Mapping[int, Ranks], stated: Mapping[int, Ranks], *, fixed: bool) -> dict[int, Ranks]:
    """Site -> ranks: those of `table`, less where a site states less now; of one that is new what it states.

    Where the method's ranks are `fixed`, the largest of the table's that a site can hold; one that can hold none is left out.
    """
    new = dict(table)
    kinds = ranks.distinct(table.values())
    for number, said in stated.items():
        most = table.get(number, said)
        wanted = {module: min(rank, most.get(module, rank)) for module, rank in said.items()}
        if not fixed:
            new[number] = wanted
            continue
        held = [kind for kind in kinds if all(rank <= wanted.get(module, 0) for module, rank in kind.items())]
        if held:
            new[number] = held[-1]
        else:
            new.pop(number, None)
    return new


def ranks_of(config: Config, plan: RankPlan, shapes: Shapes, client: int, info: ClientInfo) -> Ranks:
    """The ranks of a site: the one that it says, what its memory holds, or those of the run's distribution."""
    if info.rank is not None:
        kind: Mapping[str, int] = {ranks.REST: info.rank}
    elif info.memory is not None:
        per_rank = BYTES_A_PARAMETER * sum(rows + columns for rows, columns in shapes.values())
        kind = {ranks.REST: max(1, info.memory // per_rank)}
    else:
        kind = plan.types[plan.type_of(client, config.seed)]
    return ranks.resolve(kind, shapes, config.max_rank)[0]


@dataclass
class Scoreless:
    """The server has no data: validation is the sites' own. It can still write the adapter."""

    config: Config
    template: str
    table: Mapping[int, Ranks]

    def validate(self, adapter: Adapter) -> Mapping[str, Any]:
        return {}

    def evaluate(self, adapter: Adapter, by_rank: Mapping[str, Adapter]) -> Mapping[str, Any]:
        return {}

    def save(self, folder: Path, adapter: Mapping[str, LowRank], facts: Mapping[str, Any]) -> None:
        known = {"ranks": ranks.counts(self.table.values()), "clients": len(self.table), "template": self.template}
        config = self.config
        save_adapter(
            folder,
            adapter,
            base_model=config.model,
            kind=config.lora_scaling,
            alpha=config.lora_alpha,
            readme=model_card(config, known, facts),
            about=about(config, facts["round"]),
            template=load_template(self.template),
        )


def printed(event: str, facts: Mapping[str, Any]) -> None:
    """The run as lines, which Flower puts into its log."""
    line = ""
    if event == "note":
        line = facts["text"]
    elif event == "start":
        line = f"run folder {facts['folder']}, {facts['clients']} sites, {facts['rounds']} rounds"
    elif event == "client":
        record = facts["record"]
        # A site need not say its loss, and what it says may have been no number.
        loss = "no loss" if record.get("loss") is None else f"loss {record['loss']:.4f}"
        said = record.get("failed") or f"{loss}, {record['bytes_up']} bytes up"
        line = f"round {facts['round']}: site {facts['client']} at rank {record['ranks']}: {said}"
    elif event == "saved":
        loss = facts["line"]["validation"].get("loss")
        line = f"round {facts['round']} saved" + ("" if loss is None else f", validation loss {loss:.4f}")
    elif event == "stop":
        line = f"done after round {facts['round']}: {facts['reason']}"
    if line:
        print(f"flexlora: {line}", flush=True)
