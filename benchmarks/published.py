"""A round as the published code plays it, against ours: same model, data, ranks, batches and first adapters.

    python benchmarks/results_data.py ../shared/data/ni/64 runs/published-data --examples 24
    python benchmarks/published.py --data runs/published-data
    python benchmarks/published.py --data runs/published-data --precision float32      # the same arithmetic: losses compare
    python benchmarks/published.py --data runs/published-data --spare-hashing

The published way is written here from its description. For each client: its training, evaluation and test records are
read and tokenised again, each by a function that holds the PEFT model, which `datasets.map` hashes to know its cache
(`--spare-hashing`: the function holds the tokenizer alone); a fresh `transformers.Trainer` evaluates, micro-batch by
micro-batch, another one trains and evaluates, both padding to multiples of 8, gathering the logits of whole sequences
and scoring their argmax by ROUGE; the weights go to disk. The server reads them, adds up dense products, takes one dense
SVD a module and slices it for every client there is. Labels are all tokens, or those of the response (`--labels
response`); batches of 4 in micro-batches of 2, no dropout.

Each way has a process of its own, the published one with torch as it comes; memory is the kernel's peak of it (VmHWM).
Linux only.
"""

# ruff: noqa: E402 (what is imported first matters here)
from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

PLAIN = dict(os.environ)
"""What both ways start from: flexlora, imported below, tells torch through the environment how idle threads wait."""
if "published" in sys.argv:
    import torch  # flexlora then leaves memory and threads as they are

import flexlora  # before torch: settles how its idle threads wait

# isort: split
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora import training
from flexlora.modeling import SEVEN_PROJECTIONS, load_model, scaling
from flexlora.prompts import TokenCache, load_template
from flexlora.types import TrainTask

CLIENTS, SETTINGS = (
    64,
    {"batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-4, "lora_dropout": 0.0, "prompt_template": "alpaca"},
)


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def ours(data: Path, rounds: int, ranks: str, precision: Any, everything: bool, out: Path) -> dict[str, Any]:
    """Run flexlora; writes down who trained at which ranks from which seed, and the adapters of the first round."""
    config = flexlora.Config(
        data=data, num_clients=CLIENTS, method="flexlora", ranks=ranks, rounds=rounds, participation=4 / CLIENTS,
        early_stop=False, eval_every=0, validation_examples=32, train_on_inputs=everything, output_dir=out, name="run",
        precision=precision, **SETTINGS,
    )  # fmt: skip
    tasks: list[dict[str, Any]] = []
    train = training.train_client

    def noted(model: Any, task: TrainTask, examples: Any) -> Any:
        if task.round == 1:
            parts = {f"{m}.{p}": getattr(x, p) for m, x in task.download.adapter.items() for p in "AB"}
            save_file({k: x.contiguous() for k, x in parts.items()}, out / f"first-{task.client}.safetensors")
        batches = training.batches([len(x.input_ids) for x in examples], task.training, task.seed)
        order = [i for batch in batches for i in batch]
        tasks.append({"round": task.round, "client": task.client, "ranks": dict(task.ranks), "order": order})
        return train(model, task, examples)

    marks: list[float] = []

    def notify(event: str, _: Any) -> None:
        if event in ("base", "saved"):
            marks.append(time.perf_counter())

    with patch.object(training, "train_client", noted):
        run = flexlora.run(config, notify)
    (out / "tasks.json").write_text(json.dumps(tasks))
    return {
        "rounds": [b - a for a, b in itertools.pairwise(marks)],
        "parts": [line["seconds"] for line in run.metrics],
        "losses": [{c["id"]: c["loss"] for c in line["clients"]} for line in run.metrics],
        "peak": peak(),
    }


class Tokeniser:
    """What the published code maps over a data set."""

    def __init__(self, tokenizer: Any, held: Any, everything: bool) -> None:
        self.tokenizer, self.held, self.everything = tokenizer, held, everything

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        from flexlora.data.records import Record

        kept = Record(record["instruction"], record["input"], record["output"])
        (x,) = TokenCache().encode_all([kept], load_template("alpaca"), self.tokenizer, 512)
        first = 1 if self.everything else max(1, x.response_start)  # nothing predicts the first token
        labels = [*[-100] * first, *x.input_ids[first:]]
        return {"input_ids": list(x.input_ids), "labels": labels, "attention_mask": [1] * len(labels)}


def teacher_forced_rouge(tokenizer: Any) -> Any:
    """The published metric: the argmax at every position against the labels, neither shifted nor cut to the answer."""
    from rouge_score import rouge_scorer, scoring

    def compute(found: Any) -> dict[str, float]:
        labels = found.label_ids
        labels[labels == -100] = tokenizer.eos_token_id
        texts = (
            tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (labels, found.predictions.argmax(-1))
        )
        scorer, total = (
            rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"]),
            scoring.BootstrapAggregator(),
        )
        for target, prediction in zip(*texts, strict=True):
            total.add_scores(scorer.score(target, prediction))
        return {name: score.mid.fmeasure for name, score in total.aggregate().items()}

    return compute


def published(data: Path, rounds: int, everything: bool, out: Path, hashing: bool) -> dict[str, Any]:
    import datasets
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from flexlora import gguf

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows: Any = self.train_dataset if train_dataset is None else train_dataset
            return SequentialSampler(rows)

    def arguments(evaluated: int) -> Any:
        return TrainingArguments(
            str(out / "trainer"), per_device_train_batch_size=2, per_device_eval_batch_size=evaluated,
            gradient_accumulation_steps=2, learning_rate=SETTINGS["learning_rate"], num_train_epochs=1,
            eval_accumulation_steps=4, eval_strategy="no", save_strategy="no", logging_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip

    datasets.disable_progress_bars()
    tokenizer = load_model("smollm2").tokenizer
    base: Any = AutoModelForCausalLM.from_pretrained(str(gguf.converted(gguf.smollm2_file())), dtype=torch.float32)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=8)
    compute = teacher_forced_rouge(tokenizer)
    tasks = json.loads((out / "tasks.json").read_text())
    given: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    result: dict[str, Any] = {"rounds": [], "parts": [], "losses": []}
    for number in range(1, rounds + 1):
        begin, parts, losses = time.perf_counter(), defaultdict[str, float](float), {}
        mine = [t for t in tasks if t["round"] == number]
        for task in mine:
            client, ranks = task["client"], task["ranks"]
            network: Any = get_peft_model(
                base,
                LoraConfig(
                    r=8, lora_alpha=16, target_modules=list(SEVEN_PROJECTIONS), task_type="CAUSAL_LM",
                    rank_pattern=ranks, alpha_pattern=dict.fromkeys(ranks, 16),
                ),
            )  # fmt: skip
            if number == 1:
                first = load_file(out / f"first-{client}.safetensors")
                given[client] = {m: (first[f"{m}.B"], first[f"{m}.A"]) for m in ranks}
            for m, (B, A) in given[client].items():
                layer = base.get_submodule(m)
                layer.lora_A["default"].weight.data.copy_(A)
                layer.lora_B["default"].weight.data.copy_(B / scaling(16, len(A), "alpha_over_r"))
            start = time.perf_counter()
            files = {k: str(data / str(CLIENTS) / f"local_{k}_{client}.json") for k in ("training", "eval", "test")}
            tokenise = Tokeniser(tokenizer, network if hashing else None, everything)
            sets: Any = datasets.load_dataset("json", data_files=files, cache_dir=str(out / f"cache-{number}-{client}"))
            sets = {k: s.map(tokenise, remove_columns=s.column_names) for k, s in sets.items()}
            parts["data"] += time.perf_counter() - start

            sides = {
                "train_dataset": sets["training"].select(task["order"]),
                "eval_dataset": sets["eval"],
                "data_collator": collator,
                "compute_metrics": compute,
            }
            start = time.perf_counter()
            InOrder(network, arguments(2), **sides).evaluate()
            parts["evaluation before"] += time.perf_counter() - start
            start = time.perf_counter()
            second = InOrder(network, arguments(8), **sides)
            losses[client] = second.train().training_loss
            parts["train"] += time.perf_counter() - start
            start = time.perf_counter()
            second.evaluate()
            parts["evaluation after"] += time.perf_counter() - start
            start = time.perf_counter()
            weights = {n: p.detach().contiguous() for n, p in network.named_parameters() if "lora_" in n}
            save_file(weights, out / f"client-{number}-{client}.safetensors")
            network.unload()
            parts["disk"] += time.perf_counter() - start
        start = time.perf_counter()
        sizes = {t["client"]: len(t["order"]) for t in mine}
        sums: dict[str, Tensor] = {}
        for task in mine:
            weights = load_file(out / f"client-{number}-{task['client']}.safetensors")
            for m, r in task["ranks"].items():
                A, B = (weights[f"base_model.model.{m}.lora_{p}.default.weight"] for p in "AB")
                W = (16 / r) * (B @ A) * (sizes[task["client"]] / sum(sizes.values()))
                sums[m] = sums[m] + W if m in sums else W
        after = {t["client"]: t["ranks"] for t in tasks}
        everyone = list(after) + list(after)[:1] * (CLIENTS - len(after))
        for m, W in sums.items():
            U, S, V = torch.svd(W)
            for client in everyone:
                r = after[client][m]
                given.setdefault(client, {})[m] = (U[:, :r] @ torch.diag(S[:r]), V[:, :r].T.contiguous())
        parts["server"] += time.perf_counter() - start
        result["rounds"].append(time.perf_counter() - begin)
        result["parts"].append(dict(parts))
        result["losses"].append(losses)
    return {**result, "peak": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder of 64 clients")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", default="random")
    parser.add_argument("--labels", choices=("all", "response"), default="all", help="tokens that the loss counts")
    parser.add_argument("--precision", default="auto", help="of ours; the published way computes in float32")
    parser.add_argument("--spare-hashing", action="store_true", help="spare the published way the hashing of the model")
    parser.add_argument("--way", choices=("ours", "published"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        made = (
            ours(given.data, given.rounds, given.ranks, given.precision, given.labels == "all", given.out)
            if given.way == "ours"
            else published(given.data, given.rounds, given.labels == "all", given.out, not given.spare_hashing)
        )
        (given.out / f"{given.way}.json").write_text(json.dumps(made))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as out:
        for way in ("ours", "published"):
            subprocess.run([sys.executable, *sys.argv, "--way", way, "--out", out], check=True, env=PLAIN)
            found[way] = json.loads((Path(out) / f"{way}.json").read_text())
    we, they = found["ours"], found["published"]
    threads = torch.get_num_threads()
    print(
        f"\nsmollm2, 4 clients a round, ranks {given.ranks}, labels: {given.labels}, ours in {given.precision}, {threads} threads\n"
    )
    print("| round | ours s | published s | ratio | largest difference of a client's loss |\n|---|---|---|---|---|")
    for i in range(given.rounds):
        apart = max(abs(we["losses"][i][c] - they["losses"][i][c]) for c in they["losses"][i])
        ratio = they["rounds"][i] / we["rounds"][i]
        print(f"| {i + 1} | {we['rounds'][i]:.1f} | {they['rounds'][i]:.1f} | {ratio:.2f} | {apart:.1e} |")
    for name, one in found.items():
        last = ", ".join(f"{part} {seconds:.1f}" for part, seconds in one["parts"][-1].items())
        print(f"\n{name}, last round, seconds: {last}; peak {one['peak'] / 1e6:.0f} MB")
    print(f"\npeak: ours is {we['peak'] / they['peak']:.0%} of the published way's")


if __name__ == "__main__":
    main()
