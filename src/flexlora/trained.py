"""What can be done with a trained model: open a run, an exported adapter or a bare model; export it, score it, let it answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora import evaluation, generation, lowrank, ranks, wire
from flexlora.card import TOP, about, model_card
from flexlora.checkpoint import DamagedError, checkpoint_folder, checkpoint_rounds, kept_up_to, read_checkpoint
from flexlora.config import Config, make_config
from flexlora.data.federation import open_federation
from flexlora.data.records import read_records
from flexlora.data.writing import new_folder
from flexlora.engine import global_adapter
from flexlora.evaluation import Scores
from flexlora.launch import load, method_of, template_name
from flexlora.modeling import Model, load_model
from flexlora.prompts import Record, Template, encode_prompt, load_template, templates
from flexlora.rundir import Run, open_run, read_object, write_text
from flexlora.saved import ABOUT, CONFIG, TEMPLATE, load_adapter, save_adapter, save_merged
from flexlora.scorer import ModelScorer
from flexlora.standing import Standing, standing_of
from flexlora.types import FlexLoraError, LowRank, Method


@dataclass(frozen=True)
class Trained:
    """A base model with the adapter of a run or of a folder attached to it, if there is one."""

    model: Model
    config: Config
    adapter: Mapping[str, LowRank]
    template: Template


def _is_path(target: Path) -> bool:
    """Whether it can only be a path, not `owner/model`: absolute, of three parts or more, or in the default output_dir."""
    home = Config.model_fields["output_dir"].default
    return target.is_absolute() or len(target.parts) > 2 or (len(target.parts) == 2 and target.parent == Path(home))


def open_trained(
    target: str, changes: Mapping[str, Any] | None = None, *, rank: int | None = None, client: int | None = None
) -> Trained:
    """Open a run folder, a PEFT adapter folder, or a bare model by name, with some configuration keys changed.

    An adapter or a merged model is asked as its folder says (`asked`). `rank` and `client`: of a run, what `export` takes.
    Code that comes with a model runs only where `changes` has `trust_remote_code`, whatever a run's configuration says.
    Raises FlexLoraError where the target is none of these, or is a run that asks for such code.
    """
    changes = dict(changes or {})
    folder = Path(target)
    # A slip in a path must not become the name of a model that is looked for elsewhere.
    if not folder.exists() and (_is_path(folder) or (folder.parent != Path() and folder.parent.is_dir())):
        raise FlexLoraError(f"{target}: no such folder; give a run folder, an adapter's folder or a model's name")
    if (folder / "config.yaml").is_file():
        return _open_run(open_run(folder), changes, rank, client)
    for name, value in (("rank", rank), ("client", client)):
        if value is not None:
            raise FlexLoraError(f"{name}: {target} is no run folder; give one, or leave --{name} out")
    adapter: dict[str, LowRank] = {}
    base = target
    if (folder / CONFIG).is_file():
        adapter = load_adapter(folder)
        base = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if "model" not in changes and not (isinstance(base, str) and base):
            raise FlexLoraError(
                f"{folder / CONFIG}: base_model_name_or_path names no model; write its name or folder there"
            )
    config = make_config({"model": base, **asked(folder, set(ASKED) - set(changes)), **changes})
    # An adapter says by itself which layers it adapts, whatever the architecture; the bare model needs none.
    model = load_model(
        config.model,
        targets=tuple(adapter),
        cache_dir=config.cache_dir,
        device=config.device,
        precision=config.precision,
        trust_remote_code=config.trust_remote_code,
        strict=False,
    )
    return _trained(model, config, load_adapter(folder, model.shapes) if adapter else {})


def _open_run(run: Run, changes: Mapping[str, Any], rank: int | None, client: int | None) -> Trained:
    folder = run.folder
    _refuse_unasked_code(run, bool(changes.get("trust_remote_code")))
    if rank is None and client is None and not run.adapter.is_dir():
        if run.metrics and method_of(run.config).personal:
            raise FlexLoraError(
                f"{folder}: method {run.config.method_name} has no global model; choose a client with "
                f"`flexlora evaluate {folder} --client 0 …` or `flexlora export {folder} --client 0 --out DIR`"
            )
        raise FlexLoraError(f"{folder}: has no adapter yet; finish a round with `flexlora resume {folder}`")
    config = make_config({**run.config.dump(), **asked(run.adapter, TEMPLATE_ONLY), **changes})
    chosen = None if rank is None and client is None else _chosen(run, rank, client)[0]
    model = load(config)
    return _trained(model, config, load_adapter(run.adapter, model.shapes) if chosen is None else chosen)


def _trained(model: Model, config: Config, adapter: Mapping[str, LowRank]) -> Trained:
    model.attach(adapter)
    most = min(config.cutoff_len, model.positions or config.cutoff_len)
    config = config.model_copy(update={"cutoff_len": most})
    return Trained(model, config, adapter, load_template(template_name(config, model)))


ASKED = ("prompt_template", "cutoff_len", "max_new_tokens")
TEMPLATE_ONLY = ASKED[:1]
"""Of a run's own adapter: the rest stands in its configuration."""
MOST_TOKENS = 2**20
"""What a folder may ask for by itself; who wants more says so."""


def asked(folder: Path, wanted: Collection[str] = ASKED) -> dict[str, Any]:
    """How the model in a folder was asked while it was trained, as configuration keys, of these the `wanted` ones; {} where its
    flexlora.json says nothing.

    Raises FlexLoraError where that file is damaged.
    """
    path, remedy = folder / ABOUT, "mend or remove it"
    found = read_object(path, remedy)
    try:
        said = {key: found[key] for key in ASKED if key in found and key in wanted}
        if said.get("prompt_template", TEMPLATE) not in (TEMPLATE, *templates()):
            raise ValueError(f"prompt_template is none of {', '.join(templates())}")
        if any(type(said.get(key, 1)) is not int or said.get(key, 1) > MOST_TOKENS for key in ASKED[1:]):
            raise ValueError("cutoff_len or max_new_tokens is no number of tokens")
        make_config(said)
    except (ValueError, TypeError, FlexLoraError) as error:
        raise FlexLoraError(f"{path}: cannot be used ({error}); {remedy}") from None
    if said.get("prompt_template") == TEMPLATE:
        said["prompt_template"] = str(folder / TEMPLATE)
    return said


def score(trained: Trained, records: Sequence[Record], progress: Any = None) -> Scores:
    """Generate answers to the records and score them with the settings of the configuration."""
    scorer = ModelScorer(
        trained.model, trained.config, trained.template, (), records, lambda facts: "", progress=progress
    )
    return scorer.score(records)


def _prompt(trained: Trained, record: Record) -> list[int]:
    config = trained.config
    length = max(config.cutoff_len, config.max_new_tokens + 1024)
    length = min(length, trained.model.positions or length)
    return list(encode_prompt(record, trained.template, trained.model.tokenizer, length, config.max_new_tokens))


def answer(trained: Trained, instruction: str, input: str = "") -> Iterator[str]:
    """The model's answer to one instruction, piece by piece."""
    tokenizer = trained.model.tokenizer
    return evaluation.stream(
        trained.model.network,
        tokenizer,
        _prompt(trained, Record(instruction, input, "")),
        max_new_tokens=trained.config.max_new_tokens,
        stop=evaluation.stops(trained.template, tokenizer),
    )


def answers(
    trained: Trained, prompts: Sequence[Record], progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """The model's answer to each instruction, in order, `eval_batch_size` at a time: what `answer` gives, sooner."""
    tokenizer = trained.model.tokenizer
    return generation.generate(
        trained.model.network,
        tokenizer,
        [_prompt(trained, record) for record in prompts],
        max_new_tokens=trained.config.max_new_tokens,
        batch_size=trained.config.eval_batch_size,
        stop=evaluation.stops(trained.template, tokenizer),
        progress=progress,
    )


def records_of(data: Path, split: str, num_clients: int | None = None) -> list[Record]:
    """The held-out examples of a federation (`global`), all clients' own (`test`, `eval`), or those of one JSON file."""
    if data.is_file():
        return read_records(data)
    federation = open_federation(data, num_clients)
    if split == "global":
        records = federation.global_test()
        if not records:
            raise FlexLoraError(f"{data}: has no global_test.json; score the clients' own with --split test")
        return records
    read = {"test": federation.test, "eval": federation.eval}[split]
    records = [record for client in federation.clients for record in read(client)]
    if not records:
        raise FlexLoraError(f"{data}: no client has a local_{split} file; choose another --split")
    return records


def standing_at(run: Run, round: int | None = None) -> tuple[Method, Standing, Mapping[str, Any]]:
    """(method, standing, progress) of a run at a round, the best one by default; no model is loaded."""
    rounds = checkpoint_rounds(run.checkpoints)
    wanted = round if round is not None else run.best_round
    if wanted not in rounds:
        again = f"`flexlora resume {run.folder}`"
        if wanted is None:
            raise FlexLoraError(f"{run.folder}: has no best round yet; finish a round with {again}")
        shown = ", ".join(map(str, rounds)) or f"none, play it with {again}"
        raise FlexLoraError(f"{run.folder}: round {wanted} has no checkpoint; there are: {shown}")
    folder = checkpoint_folder(run.checkpoints, wanted)
    method = method_of(run.config)
    try:
        progress = json.loads((folder / "state.json").read_text())["progress"]
        shapes = {module: (rows, columns) for module, (rows, columns) in progress["shapes"].items()}
        state, progress = read_checkpoint(folder, method.init(shapes, run.config.seed, progress["kinds"]))
    except (DamagedError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FlexLoraError(f"{folder}: is damaged ({error}); go on with `flexlora resume {run.folder}`") from None
    return method, standing_of(wanted, state, progress), progress


def client_adapter(run: Run, method: Method, standing: Standing, client: int) -> dict[str, LowRank]:
    """What one client runs: what it would be sent, with what it kept and any base delta, as one adapter."""
    if client not in standing.table:
        raise FlexLoraError(f"client {client} is not in this run; clients are 0 to {max(standing.table)}")
    download = method.distribute(standing.state, standing.table[client])
    kept: dict[str, Any] = {}
    if parts := " and ".join(download.rule.keep):
        file = kept_up_to(run.kept / str(client), standing.round)
        if file is None and run.config.runner == "flower":
            raise FlexLoraError(
                f"client {client}: its {parts} stays at the site and is not here; with the site's consent, put what it keeps into "
                f"{run.kept / str(client)}"
            )
        kept = wire.decode(file.read_bytes()) if file else {}
    adapter: dict[str, LowRank] = {}
    for module, x in download.adapter.items():
        if not isinstance(x, LowRank):
            raise FlexLoraError("a sparse stage has no adapter of low rank; export after it")
        x = x._replace(**kept.get(module, {}))
        base = download.base_delta.get(module)
        adapter[module] = x if base is None else lowrank.stack([base, x], [1.0, 1.0])
    # The base delta is the client's base model, also where it adapts nothing.
    return adapter | {module: x for module, x in download.base_delta.items() if module not in adapter}


def _chosen(run: Run, rank: int | None, client: int | None) -> tuple[dict[str, LowRank], str, Standing]:
    """(adapter, what it is in a sentence, standing) of the best round: at one rank or the largest of each module, or a client's."""
    if rank is not None and rank < 1:
        raise FlexLoraError(f"rank: {rank} is none; give a whole number from 1")
    method, standing, progress = standing_at(run)
    if client is not None:
        adapter = client_adapter(run, method, standing, client)
        what = f"What client {client} runs" + ("." if rank is None else f", cut to rank {rank}.")
        if method.personal and kept_up_to(run.kept / str(client), standing.round) is None:
            what += " It has not trained yet, and has nothing of its own."
        return adapter if rank is None else {m: lowrank.truncate(x, rank) for m, x in adapter.items()}, what, standing
    if method.personal:
        raise FlexLoraError(f"method {run.config.method_name} has no global model; choose a client with --client")
    top = ranks.largest(standing.table.values())
    if rank is None:
        return global_adapter(method, standing.state, top), TOP, standing
    at = {m: min(rank, *progress["shapes"][m]) for m in top}
    what = f"The best approximation of the global delta weight at rank {rank} in every module"
    what += "." if min(at.values()) == rank else ", or at the largest that its shape allows."
    return global_adapter(method, standing.state, at), what, standing


def export(
    run: Run,
    out: Path,
    *,
    rank: int | None = None,
    client: int | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write the best round's global model at `rank` (default: the largest of any client), or what one client runs.

    A PEFT folder, or with `merge` a whole model; complete or not at all. Raises FlexLoraError where `out` is taken, the disk
    refuses, the method has no global model, or the run asks for code of the model (`merge` loads it) that nobody trusts here.
    """
    if merge:
        _refuse_unasked_code(run, trust_remote_code)
    with new_folder(out) as folder:
        adapter, what, standing = _chosen(run, rank, client)
        config = run.config
        line = run.line(standing.round)
        facts = {
            "ranks": ranks.counts(standing.table.values()),
            "clients": len(standing.table),
            "template": run.environment.get("template", config.prompt_template),
        }
        # The run's own copy first: a template file may have been changed or moved since. `auto` is left to the tokenizer.
        name = asked(run.adapter, TEMPLATE_ONLY).get("prompt_template", facts["template"])
        gone = name not in templates() and not Path(name).is_file()  # then only the name is known
        template = None if gone else load_template(name)
        said = about(config, standing.round)
        if merge:
            config = config.model_copy(update={"trust_remote_code": trust_remote_code})
            save_merged(load(config, "stored"), adapter, {}, folder, about=said, template=template)
            write_text(folder / "README.md", model_card(config, facts, line, what, "transformers"))
        else:
            save_adapter(
                folder,
                adapter,
                base_model=config.model,
                kind=config.lora_scaling,
                alpha=config.lora_alpha,
                readme=model_card(config, facts, line, what),
                about=said,
                template=template,
            )
    return out


def _refuse_unasked_code(run: Run, asked_for: bool) -> None:
    """A run folder may be somebody else's: it cannot have code run on this machine by itself."""
    if run.config.trust_remote_code and not asked_for:
        raise FlexLoraError(
            f"{run.folder / 'config.yaml'}: trust_remote_code lets the model's own Python code run on this machine; where you "
            "trust that model, say --trust_remote_code"
        )
