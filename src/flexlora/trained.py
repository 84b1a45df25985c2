"""What can be done with a trained model: open a run, an exported adapter or a bare model; export it, score it, let it answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexlora import evaluation, generation, lowrank, ranks, wire
from flexlora.card import TOP, model_card
from flexlora.checkpoint import DamagedError, checkpoint_folder, checkpoint_rounds, read_checkpoint
from flexlora.config import Config, make_config
from flexlora.data.federation import open_federation
from flexlora.data.records import read_records
from flexlora.engine import global_adapter
from flexlora.evaluation import Scores
from flexlora.launch import load, method_of, template_name
from flexlora.modeling import Model, load_adapter, save_adapter, save_merged
from flexlora.prompts import Record, Template, encode_prompt, load_template
from flexlora.rundir import Run, open_run, write_text
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


def open_trained(target: str, changes: Mapping[str, Any] | None = None) -> Trained:
    """Open a run folder, a PEFT adapter folder, or a bare model by name, with some configuration keys changed.

    Raises FlexLoraError where it is none of these.
    """
    changes = dict(changes or {})
    folder = Path(target)
    # A slip in a path must not become the name of a model that is looked for elsewhere.
    if not folder.exists() and (_is_path(folder) or (folder.parent != Path() and folder.parent.is_dir())):
        raise FlexLoraError(f"{target}: no such folder; give a run folder, an adapter's folder or a model's name")
    if (folder / "config.yaml").is_file():
        run = open_run(folder)
        if not run.adapter.is_dir() and run.metrics and method_of(run.config).personal:
            raise FlexLoraError(
                f"{folder}: method {run.config.method_name} has no global model; choose a client with "
                f"`flexlora export {folder} --client 0 --out DIR`"
            )
        if not run.adapter.is_dir():
            raise FlexLoraError(f"{folder}: has no adapter yet; finish a round with `flexlora resume {folder}`")
        config = run.config.model_copy(update=changes)
        source: Path | None = run.adapter
    elif (folder / "adapter_config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        config = make_config({"model": base, **changes})
        source = folder
    else:
        config, source = make_config({"model": target, **changes}), None
    model = load(config)
    adapter = load_adapter(source, model.shapes) if source else {}
    model.attach(adapter)
    return Trained(model, config, adapter, load_template(template_name(config, model)))


def score(trained: Trained, records: Sequence[Record], progress: Any = None) -> Scores:
    """Generate answers to the records and score them with the settings of the configuration."""
    scorer = ModelScorer(
        trained.model, trained.config, trained.template, (), records, lambda facts: "", progress=progress
    )
    return scorer.score(records)


def _prompt(trained: Trained, record: Record) -> list[int]:
    config = trained.config
    length = max(config.cutoff_len, config.max_new_tokens + 1024)
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
        shown = ", ".join(map(str, rounds)) or "none"
        raise FlexLoraError(f"{run.folder}: round {wanted} has no checkpoint; there are: {shown}")
    folder = checkpoint_folder(run.checkpoints, wanted)
    method = method_of(run.config)
    try:
        progress = json.loads((folder / "state.json").read_text())["progress"]
        shapes = {module: (rows, columns) for module, (rows, columns) in progress["shapes"].items()}
        state, progress = read_checkpoint(folder, method.init(shapes, run.config.seed, progress["kinds"]))
    except (DamagedError, OSError, ValueError, KeyError) as error:
        raise FlexLoraError(f"{folder}: is damaged ({error}); go on with `flexlora resume {run.folder}`") from None
    return method, standing_of(wanted, state, progress), progress


def client_adapter(run: Run, method: Method, standing: Standing, client: int) -> dict[str, LowRank]:
    """What one client runs: what it would be sent, with what it kept and any base delta, as one adapter."""
    if client not in standing.table:
        raise FlexLoraError(f"client {client} is not in this run; clients are 0 to {max(standing.table)}")
    download = method.distribute(standing.state, standing.table[client])
    kept: dict[str, Any] = {}
    if download.rule.keep:
        files = sorted((run.folder / "kept" / str(client)).glob("round-*.safetensors"))
        files = [f for f in files if f.name <= f"round-{standing.round:04d}.safetensors"]
        kept = wire.decode(files[-1].read_bytes()) if files else {}
    adapter: dict[str, LowRank] = {}
    for module, x in download.adapter.items():
        if not isinstance(x, LowRank):
            raise FlexLoraError("a sparse stage has no adapter of low rank; export after it")
        x = x._replace(**kept.get(module, {}))
        base = download.base_delta.get(module)
        adapter[module] = x if base is None else lowrank.stack([base, x], [1.0, 1.0])
    return adapter


def export(run: Run, out: Path, *, rank: int | None = None, client: int | None = None, merge: bool = False) -> Path:
    """Write the best round's global model at `rank` (default: the largest of any client), or what one client runs.

    A PEFT folder, or with `merge` a whole model. Raises FlexLoraError where `out` is taken or the method has no global model.
    """
    if rank is not None and rank < 1:
        raise FlexLoraError(f"rank: {rank} is none; give a whole number from 1")
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise FlexLoraError(f"{out}: exists already; choose another --out")
    method, standing, progress = standing_at(run)
    top = ranks.largest(standing.table.values())
    if client is not None:
        adapter = client_adapter(run, method, standing, client)
        if rank is not None:
            adapter = {m: lowrank.truncate(x, rank) for m, x in adapter.items()}
    elif method.personal:
        raise FlexLoraError(f"method {run.config.method_name} has no global model; choose a client with --client")
    else:
        at = top if rank is None else {m: min(rank, *progress["shapes"][m]) for m in top}
        adapter = global_adapter(method, standing.state, at)
    config = run.config
    line = next((line for line in run.metrics if line["round"] == standing.round), {"round": standing.round})
    made = json.loads((run.folder / "env.json").read_text(encoding="utf-8"))
    facts = {
        "ranks": ranks.counts(standing.table.values()),
        "clients": len(standing.table),
        "template": made.get("template", config.prompt_template),
    }
    what = TOP
    if client is not None:
        what = f"What client {client} runs" + ("." if rank is None else f", cut to rank {rank}.")
    elif rank is not None:
        what = f"The best approximation of the global delta weight at rank {rank} in every module."
    if merge:
        save_merged(load(config, "stored"), adapter, {}, out)
        write_text(out / "README.md", model_card(config, facts, line, what, "transformers"))
        return out
    save_adapter(
        out,
        adapter,
        base_model=config.model,
        kind=config.lora_scaling,
        alpha=config.lora_alpha,
        readme=model_card(config, facts, line, what),
    )
    return out
