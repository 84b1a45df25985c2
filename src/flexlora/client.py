"""What a client does with a task, the same function in this process, in a Ray actor and at a Flower site."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flexlora import evaluation, training, wire
from flexlora.data.federation import Federation
from flexlora.modeling import Model, scaling
from flexlora.prompts import TokenCache, load_template
from flexlora.types import (
    Adapter,
    ClientFailure,
    ClientScore,
    ClientUpdate,
    Download,
    EvalTask,
    FlexLoraError,
    LocalTraining,
    LowRank,
    TrainTask,
)

FAILURES = (FlexLoraError, ValueError, RuntimeError, MemoryError, OSError)
"""What ends one client's work in a round and not the round."""


@dataclass
class Site:
    """Where clients work: one base model for all of them, their data, and what they keep between rounds."""

    model: Model
    federation: Federation
    tokens: TokenCache
    kept: Path
    """Folder of the parts that never leave a client (FedSA's B): `{client}/round-0003.safetensors`."""
    eval_batch_size: int = 16
    wire_dtype: torch.dtype = torch.float32


def train(site: Site, task: TrainTask) -> ClientUpdate | ClientFailure:
    """Train one client and return its update as it arrives at the server, or why there is none."""
    begin = time.perf_counter()
    try:
        rule = task.download.rule
        download = with_kept(site, task.client, task.round, task.download)
        template = load_template(task.training.template)
        records = site.federation.train(task.client)
        examples = site.tokens.encode_all(records, template, site.model.tokenizer, task.training.cutoff_len)
        update = training.train_client(site.model, replace(task, download=download), examples)
    except FAILURES as error:
        return ClientFailure(task.client, one_line(error))
    keep(site, task.client, task.round, update.adapter, rule.keep)
    message = wire.encode(update.adapter, rule.send, dtype=site.wire_dtype)
    arrived = wire.complete(wire.decode(message), task.download.adapter)
    travelled = [part for part in wire.PARTS if part not in rule.keep]
    bytes_down = wire.size(task.download.adapter, travelled, dtype=site.wire_dtype)
    if task.download.base_delta:
        bytes_down += wire.size(task.download.base_delta, dtype=site.wire_dtype)
    traffic = {"bytes_up": len(message), "bytes_down": bytes_down, "seconds": time.perf_counter() - begin}
    return replace(update, adapter=arrived, sent=task.download.adapter, metrics={**update.metrics, **traffic})


def evaluate(site: Site, task: EvalTask, training_settings: LocalTraining) -> ClientScore | ClientFailure:
    """Loss on the client's own eval examples, with what it would train from."""
    try:
        download = with_kept(site, task.client, task.round + 1, task.download)
        template = load_template(training_settings.template)
        records = site.federation.eval(task.client)[: task.examples]
        examples = site.tokens.encode_all(records, template, site.model.tokenizer, training_settings.cutoff_len)
        ranks = {m: x.A.shape[0] for m, x in download.adapter.items() if isinstance(x, LowRank)}
        factors = {m: scaling(training_settings.alpha, max(1, r), training_settings.scaling) for m, r in ranks.items()}
        site.model.attach(download.adapter, base_delta=download.base_delta, scaling=factors)
        result = evaluation.loss(
            site.model.network, examples, batch_size=site.eval_batch_size, pad_id=site.model.tokenizer.pad_token_id
        )
    except FAILURES as error:
        return ClientFailure(task.client, one_line(error))
    return ClientScore(task.client, sum(result.sums), sum(result.tokens), len(examples))


def one_line(error: BaseException) -> str:
    """An error's message on one line, with its kind where it is not meant for the user."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, FlexLoraError) else f"{type(error).__name__}: {text}"


def _kept_file(site: Site, client: int, round: int) -> Path:
    return site.kept / str(client) / f"round-{round:04d}.safetensors"


def with_kept(site: Site, client: int, round: int, download: Download) -> Download:
    """The download with the parts that this client kept from its last round before `round`, where they still fit."""
    if not download.rule.keep:
        return download
    files = sorted((site.kept / str(client)).glob("round-*.safetensors"))
    files = [f for f in files if f < _kept_file(site, client, round)]
    if not files:
        return download
    kept = wire.decode(files[-1].read_bytes())
    adapter = dict(download.adapter)
    for module, parts in kept.items():
        origin = adapter.get(module)
        if isinstance(origin, LowRank):
            fitting = {part: t for part, t in parts.items() if t.shape == getattr(origin, part).shape}
            adapter[module] = origin._replace(**fitting)
    return replace(download, adapter=adapter)


def keep(site: Site, client: int, round: int, adapter: Adapter, parts: tuple[str, ...]) -> None:
    """Store the parts that stay at the client. Files of earlier rounds go, but the last two: an interrupted round starts from them."""
    if not parts:
        return
    path = _kept_file(site, client, round)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(wire.encode(adapter, parts))
    temporary.replace(path)
    for old in sorted(path.parent.glob("round-*.safetensors"))[:-3]:
        old.unlink()


def forget(site: Site) -> None:
    """Remove everything that clients kept."""
    shutil.rmtree(site.kept, ignore_errors=True)
