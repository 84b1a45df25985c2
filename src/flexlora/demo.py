"""`flexlora demo`: the main job on a built-in federation, with a table of what it brought."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from flexlora.config import make_config
from flexlora.data.demo import write_demo
from flexlora.data.federation import open_federation
from flexlora.data.records import Record
from flexlora.display import display
from flexlora.evaluation import Scores
from flexlora.launch import run as launch
from flexlora.report import write_report
from flexlora.rundir import Run, refuse_taken, write_text
from flexlora.tables import demo_clients_table, demo_scores_table
from flexlora.trained import Trained, open_trained, score

RANKS: dict[str, Any] = {
    "types": {
        "small": 4,
        "medium": 16,
        "mixed": {"q_proj": 16, "k_proj": 16, "v_proj": 16, "o_proj": 16, "*": 48},
        "large": 48,
    },
    "clients": {0: "small", 1: "small", 2: "small", 3: "small", 4: "medium", 5: "medium", 6: "mixed", 7: "large"},
}
"""Eight clients, half of them small, one large."""

SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "precision": "float32",
    "rounds": 4,
    "participation": 1.0,
    "method": "flexlora",
    "baseline": "fedit",
    "ranks": RANKS,
    "lora_scaling": "rslora",
    "lora_dropout": 0.0,
    "learning_rate": 5e-4,
    "batch_size": 8,
    "micro_batch_size": 8,
    "cutoff_len": 160,
    "max_new_tokens": 24,
    "eval_every": 2,
    "early_stop": False,
    "validation_examples": 48,
}


def demo(
    console: Console, *, output_dir: Path, name: str | None, seed: int, cache_dir: Path | None, quiet: bool
) -> Run:
    """Write the federation, fine-tune, score the base and the federated model, and say what came out."""
    begin = time.perf_counter()
    # Checked before anything is written.
    config = make_config(SETTINGS | {"seed": seed, "output_dir": output_dir, "name": name, "cache_dir": cache_dir})
    name = config.name or _free_name(output_dir)
    folder, data = output_dir / name, output_dir / name / "data"
    refuse_taken(folder)
    if not data.exists():
        write_demo(data, seed=seed)
    config = config.model_copy(update={"name": name, "data": data})
    with display("quiet" if quiet else "auto", console) as notify:
        done = launch(config, notify)
    federation = open_federation(data, None)
    own = [record for client in federation.clients for record in federation.test(client)]
    assert done.best_round is not None
    best = done.line(done.best_round)
    trained = open_trained(str(done.folder))
    blocks: dict[str, Mapping[str, Scores]] = {}
    with console.status("generating answers") as status:
        for title, records, before, after in (
            ("new examples, own families", own, {}, {}),
            ("families nobody trained on", federation.global_test(), done.base["eval"], best["eval"]),
        ):
            status.update(f"generating answers: {title}")
            trained.model.detach()
            base = _scores(trained, records, before)
            trained.model.attach(trained.adapter)
            blocks[title] = {"base": base, "federated": _scores(trained, records, after)}
    # The families nobody trained on stand in the run's own metrics.
    title, pair = next(iter(blocks.items()))
    answers = {title: {who: scores.summary() for who, scores in pair.items()}}
    write_text(done.folder / "answers.json", json.dumps(answers, indent=2) + "\n")
    console.print(demo_scores_table(blocks))
    console.print()
    console.print(demo_clients_table(done, federation))
    console.print()
    seconds = time.perf_counter() - begin
    prompt = own[0]
    for line in (
        f"adapter of round {done.best_round}: {done.adapter}",
        f"report: {write_report([done.folder])}",
        f"run folder: {done.folder} ({seconds:.0f} s)",
        f'next: flexlora generate {done.folder} --prompt "{prompt.instruction}" --input "{prompt.input}"',
    ):
        console.print(line, markup=False, soft_wrap=True)
    return done


def _scores(trained: Trained, records: Sequence[Record], known: Mapping[str, Any]) -> Scores:
    """Scores of the records; those that the run has logged are not computed again."""
    if not known:
        return score(trained, records)
    return Scores(**{key: value for key, value in known.items() if key != "loss_by_rank"}, predictions=[])


def _free_name(output_dir: Path) -> str:
    return next(name for n in count(1) if not (output_dir / (name := f"demo-{n}")).exists())
