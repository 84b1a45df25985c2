"""What a client does with a task, the same function in this process, in a Ray actor and at a Flower site."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from flexlora import evaluation, training, wire
from flexlora.checkpoint import kept_file, kept_up_to, sync_folder, thin_out, write_durably
from flexlora.config import Config
from flexlora.data.federation import open_federation
from flexlora.data.records import Record
from flexlora.modeling import Model, load_model, scalings
from flexlora.processor import give_back
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
from flexlora.wire import Parcel

FAILURES = (FlexLoraError, ValueError, IndexError, RuntimeError, MemoryError, OSError)
"""What ends one client's work in a round and not the round. IndexError: more tokens than a model has positions."""


class Examples(Protocol):
    """The data of the clients at a site: a `Federation`, or one site's own."""

    def train(self, client: int) -> list[Record]: ...
    def eval(self, client: int) -> list[Record]: ...


@dataclass
class Site:
    """Where clients work: one base model for all of them, their data, and what they keep between rounds."""

    model: Model
    federation: Examples
    tokens: TokenCache
    kept: Path
    """Folder of the parts that never leave a client (FedSA's B): `{client}/round-0003.safetensors`."""
    eval_batch_size: int = 16
    wire_dtype: torch.dtype = torch.float32
    says: Callable[[BaseException], str] | None = None
    """What of an error leaves the site; None: all of it, on one line."""


def open_site(config: Config, kept: Path) -> Site:
    """The base model and the data that a configuration names. Raises FlexLoraError where they cannot be had."""
    if config.data is None:
        raise FlexLoraError("data: no folder given; name one with --data, or try `flexlora demo`")
    federation = open_federation(config.data, config.num_clients)
    return Site(load(config), federation, TokenCache(), kept, config.eval_batch_size)


def load(config: Config, precision: str | None = None) -> Model:
    """The configured base model, its linear layers ready for adapters; `precision` wins over the configured one."""
    return load_model(
        config.model,
        targets=config.lora_target_modules,
        cache_dir=config.cache_dir,
        device=config.device,
        precision=precision or config.precision,
        trust_remote_code=config.trust_remote_code,
    )


def train(site: Site, task: TrainTask) -> ClientUpdate | ClientFailure:
    """Train one client and return its update as it arrives at the server, or why there is none."""
    return arrived(work(site, task, site.wire_dtype), task, site.wire_dtype)


def perform(site: Site, parcel: Parcel) -> Parcel:
    """The task in a parcel, done; the answer is all that leaves the client."""
    try:
        task, training_settings, dtype = wire.unpack_task(parcel)
    except FlexLoraError as error:
        return wire.pack_failure(ClientFailure(-1, reason(error)))
    if isinstance(task, TrainTask):
        answer = work(site, task, dtype)
        give_back()  # a process may wait long for its next task
        return answer
    score = evaluate(site, task, training_settings)
    return wire.pack_failure(score) if isinstance(score, ClientFailure) else wire.pack_score(score)


def work(site: Site, task: TrainTask, dtype: torch.dtype) -> Parcel:
    """Train one client; what it sends back."""
    begin = time.perf_counter()
    base = site.model.fingerprint
    rule = task.download.rule
    try:
        if task.base not in ("", base):
            raise FlexLoraError("this site has another base model than the server")
        download = with_kept(site, task.client, task.round, task.download)
        template = load_template(task.training.template)
        records = site.federation.train(task.client)
        examples = site.tokens.encode_all(records, template, site.model.tokenizer, task.training.cutoff_len)
        update = training.train_client(site.model, replace(task, download=download), examples)
        keep(site, task, update.adapter)
    except FAILURES as error:
        return wire.pack_failure(ClientFailure(task.client, (site.says or reason)(error)))
    metrics = {**update.metrics, "seconds": time.perf_counter() - begin}
    return wire.pack_update(replace(update, metrics=metrics, round=task.round, base=base), rule, dtype)


def arrived(answer: Parcel, task: TrainTask, dtype: torch.dtype) -> ClientUpdate | ClientFailure:
    """A client's answer as the server sees it, parts that stayed or did not travel filled in, bytes counted."""
    try:
        update = wire.unpack_update(answer, task)
    except FlexLoraError as error:
        return ClientFailure(task.client, f"rejected: {error}")
    if isinstance(update, ClientFailure):
        return update
    # The scaling follows from the task: it need not be asked for, and cannot be lied about.
    scales = scalings(task.download.adapter, task.training.alpha, task.training.scaling)
    metrics = {**update.metrics, "bytes_down": wire.bytes_down(task.download, dtype)}
    return replace(update, scaling=scales, metrics=metrics)


def scored(answer: Parcel, task: EvalTask) -> ClientScore | ClientFailure:
    """A client's score as the server sees it."""
    try:
        return wire.unpack_score(answer, task)
    except FlexLoraError as error:
        return ClientFailure(task.client, f"rejected: {error}")


def evaluate(site: Site, task: EvalTask, training_settings: LocalTraining) -> ClientScore | ClientFailure:
    """Loss on the client's own eval examples, with what it would train from."""
    try:
        download = with_kept(site, task.client, task.round + 1, task.download)
        template = load_template(training_settings.template)
        records = site.federation.eval(task.client)[: task.examples]
        examples = site.tokens.encode_all(records, template, site.model.tokenizer, training_settings.cutoff_len)
        factors = scalings(download.adapter, training_settings.alpha, training_settings.scaling)
        site.model.attach(download.adapter, base_delta=download.base_delta, scaling=factors)
        result = evaluation.loss(
            site.model.network,
            examples,
            batch_size=site.eval_batch_size,
            train_on_inputs=training_settings.train_on_inputs,
        )
    except FAILURES as error:
        return ClientFailure(task.client, (site.says or reason)(error))
    finally:
        site.model.detach()
    return ClientScore(task.client, sum(result.sums), sum(result.tokens), len(examples))


def reason(error: BaseException) -> str:
    """An error's message on one line, with its kind where it is not meant for the user."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, FlexLoraError) else f"{type(error).__name__}: {text}"


def with_kept(site: Site, client: int, round: int, download: Download) -> Download:
    """The download with the parts that this client kept from its last round before `round`, cut or zero-padded to its rank of now."""
    if not download.rule.keep:
        return download
    file = kept_up_to(site.kept / str(client), round - 1)
    if file is None:
        return download
    kept = wire.decode(file.read_bytes())
    adapter = dict(download.adapter)
    for module, parts in kept.items():
        origin = adapter.get(module)
        if isinstance(origin, LowRank):
            adapter[module] = origin._replace(**{part: _resized(t, getattr(origin, part)) for part, t in parts.items()})
    return replace(download, adapter=adapter)


def _resized(kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What was kept, at the rank that the client has now: its first directions, zero where it had fewer."""
    now = torch.zeros_like(like)
    rows, columns = (min(a, b) for a, b in zip(kept.shape, like.shape, strict=True))
    now[:rows, :columns] = kept[:rows, :columns]
    return now


def keep(site: Site, task: TrainTask, adapter: Adapter) -> None:
    """Store the parts that stay at the client; earlier ones go when the server can go on from none of their rounds."""
    parts = task.download.rule.keep
    if not parts:
        return
    path = kept_file(site.kept / str(task.client), task.round)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        write_durably(temporary, wire.encode(adapter, parts))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    if task.needed:
        thin_out(path.parent, {*task.needed, task.round})
