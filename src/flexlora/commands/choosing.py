"""Commands that help to choose before a run: methods, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flexlora.commands.options import next_step, out
from flexlora.config import make_config
from flexlora.types import SEVEN_PROJECTIONS, FlexLoraError


def methods() -> None:
    """All methods: name, paper, what the server does.

    For example:

        flexlora methods
    """
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
    next_step("flexlora run --method flexlora-carry …")


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
    lora_target_modules: Annotated[
        list[str] | None, Parameter(negative="", consume_multiple=True, allow_leading_hyphen=False)
    ] = None,
    cache_dir: Path | None = None,
) -> None:
    """Show a rank distribution: its types, their shares, and who would get which. With --model, the memory that each needs.

    For example:

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
        What a client can spend, e.g. 8GB (of 10⁹ bytes) or 8GiB (of 2³⁰): names the largest rank type that fits.
    micro_batch_size
        As the key of `flexlora run`.
    cutoff_len
        As the key of `flexlora run`; the estimate takes every example to be that long.
    lora_target_modules
        As the key of `flexlora run`; for a model that has other linear layers than LLaMA.
    cache_dir
        Where converted models are kept.
    """
    from flexlora.ranks import read_plan
    from flexlora.tables import ranks_table

    # The configuration knows what its keys may be, and reads lists of names in all their spellings.
    keys = {"lora_r": lora_r, "micro_batch_size": micro_batch_size, "cutoff_len": cutoff_len}
    targets = make_config({**keys, "lora_target_modules": lora_target_modules or SEVEN_PROJECTIONS}).lora_target_modules
    if model is None:
        if memory is not None:
            raise FlexLoraError("memory: of which model? name it with --model")
        out.print(ranks_table(read_plan(name, lora_r=lora_r, hidden_size=hidden_size), clients, seed))
        next_step(f"flexlora run --ranks {name} …")
        return
    from flexlora.memory import Workload, affordable, read_bytes, type_memories
    from flexlora.modeling import empty_model
    from flexlora.tables import memory_table

    budget = None if memory is None else read_bytes(memory)
    empty = empty_model(model, targets=targets, cache_dir=cache_dir)
    plan = read_plan(name, lora_r=lora_r, hidden_size=empty.hidden_size)
    needed = type_memories(empty, plan, Workload(micro_batch_size, cutoff_len))
    out.print(memory_table(plan, needed, budget))
    if budget is not None:
        best = affordable(needed, budget)
        remedy = "none: try a smaller --micro_batch_size or --cutoff_len, or a smaller model"
        out.print(f"largest that fits {memory}: {best or remedy}", markup=False)
        if best:
            next_step(f"flexlora run --model {model} --ranks auto --client_memory default={memory} …")
        else:
            next_step(f"flexlora ranks --model {model} --memory {memory} --cutoff_len {max(1, cutoff_len // 2)}")
        return
    next_step(f"flexlora run --model {model} --ranks {name} …")
