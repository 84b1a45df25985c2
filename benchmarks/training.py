"""Local training against a plain PEFT + torch loop and transformers.Trainer: tokens a second on the same batches.

    python benchmarks/training.py                      # smollm2, r = 8 on all seven projections, batches of 8 x 128
    python benchmarks/training.py --data DIR           # also batches of 8 records of one client of that data folder

The variants take turns, batch after batch, so that a busy machine slows all of them alike; medians are compared. The
CPU column counts processor time, which other work on the machine hardly changes. The floor is four flops per frozen
weight and token (forward, and the gradient of the input), for the output layer per label.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flexlora  # noqa: F401  before torch: settles how its idle threads wait, for all variants alike

# isort: split
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from flexlora import gguf
from flexlora.modeling import SEVEN_PROJECTIONS, Model, load_model
from flexlora.products import mm
from flexlora.prompts import Encoded
from flexlora.randomness import generator
from flexlora.training import label_tokens, train_client
from flexlora.types import ClientRule, Download, LocalTraining, LowRank, TrainTask

RANK, ALPHA, BATCH = 8, 16.0, 8
Batch = list[Encoded]
Step = Callable[[Batch], float]
"""Trains on one batch, one optimiser step; returns the loss."""


def synthetic(length: int, answer: int, seed: int, vocabulary: int) -> Batch:
    draw = generator(seed, "benchmark")
    rows = torch.randint(100, vocabulary, (BATCH, length), generator=draw).tolist()
    return [Encoded(tuple(row), length - answer, 0) for row in rows]


def from_data(folder: Path, model: Model, count: int) -> list[Batch]:
    """Batches of single clients, at most 512 tokens an example."""
    chosen = []
    for file in sorted(folder.rglob("local_training_*.json"))[:count]:
        batch = []
        for record in json.loads(file.read_text(encoding="utf-8"))[:BATCH]:
            text = f"{record['instruction']}\n\n{record.get('input', '')}".strip()
            messages = [{"role": "user", "content": text}]
            prompt = model.tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
            answer = [*model.tokenizer(str(record["output"])).input_ids, model.tokenizer.eos_token_id]
            batch.append(Encoded((*prompt[-(512 - len(answer)) :], *answer), len(prompt[-(512 - len(answer)) :]), 0))
        chosen.append(batch)
    return chosen


def padded(batch: Batch, train_on_inputs: bool) -> dict[str, torch.Tensor]:
    width = max(len(x.input_ids) for x in batch)
    ids, labels = torch.zeros(len(batch), width, dtype=torch.long), torch.full((len(batch), width), -100)
    mask = torch.zeros_like(ids)
    for row, x in enumerate(batch):
        n, first = len(x.input_ids), 0 if train_on_inputs else x.response_start
        ids[row, :n] = torch.tensor(x.input_ids)
        mask[row, :n] = 1
        labels[row, first:n] = torch.tensor(x.input_ids[first:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ours(model: Model, train_on_inputs: bool) -> Step:
    draw = generator(0, "benchmark", "A")
    adapter = {
        m: LowRank(torch.zeros(d_out, RANK), torch.randn(RANK, d_in, generator=draw) / d_in**0.5)
        for m, (d_out, d_in) in model.shapes.items()
    }
    training = LocalTraining(batch_size=BATCH, micro_batch_size=BATCH, train_on_inputs=train_on_inputs, alpha=ALPHA)
    task = TrainTask(1, 0, dict.fromkeys(adapter, RANK), Download(adapter, {}, ClientRule()), training, seed=0)
    return lambda batch: train_client(model, task, batch).metrics["train_loss"]


def peft_network(folder: str) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(SEVEN_PROJECTIONS), task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)


def peft_loop(network: Any, train_on_inputs: bool) -> Step:
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, weight_decay=0.0)  # stays where it starts: losses compare
    network.train()

    def step(batch: Batch) -> float:
        loss = network(**padded(batch, train_on_inputs)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def trainer(network: Any, train_on_inputs: bool) -> Step:
    def step(batch: Batch) -> float:
        whole = padded(batch, train_on_inputs)
        rows = [{k: v[i] for k, v in whole.items()} for i in range(len(batch))]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=1e-9,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            )
            return Trainer(network, arguments, train_dataset=rows).train().training_loss  # pyright: ignore[reportArgumentType]

    return step


def gemm_rate(batch: Batch) -> float:
    """Flops a processor second of the frozen products of a SmolLM2 block, by the faster library, at this many tokens."""
    tokens, best = sum(len(x.input_ids) for x in batch), 0.0
    for d_out, d_in in ((576, 576), (1536, 576), (576, 1536)):
        x, w = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        for _ in range(6):
            for multiply in (torch.mm, mm):
                start = time.process_time()
                multiply(x, w.T)
                best = max(best, 2 * tokens * d_out * d_in / (time.process_time() - start))
    return best


def compare(title: str, batches: list[Batch], steps: dict[str, Step], repeats: int, model: Model, inputs: bool) -> None:
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for batch in batches:
            losses = {}
            for name, step in steps.items():
                start, begin = time.perf_counter(), time.process_time()
                losses[name] = step(batch)
                if repeat or len(batches) > 1:  # the first turn warms up
                    wall[name].append(time.perf_counter() - start)
                    cpu[name].append(time.process_time() - begin)
            assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    tokens = statistics.fmean(sum(len(x.input_ids) for x in batch) for batch in batches)
    labels = statistics.fmean(sum(label_tokens(x, inputs) for x in batch) for batch in batches)
    total = statistics.fmean if len(batches) > 1 else statistics.median
    print(f"\n{title}: {tokens:.0f} tokens a batch, {labels:.0f} labels", flush=True)
    first = next(iter(steps))
    for name in steps:
        w, c = total(wall[name]), total(cpu[name])
        print(
            f"  {name:22s} {tokens / w:7.1f} tokens/s   {tokens / c:7.1f} tokens per CPU second   "
            f"{total(wall[first]) / w:5.2f}x   CPU {total(cpu[first]) / c:5.2f}x",
            flush=True,
        )
    frozen = sum(d_out * d_in for d_out, d_in in model.shapes.values())
    head = model.network.get_output_embeddings().weight.numel()
    rate, seconds = gemm_rate(batches[0]), total(cpu["flexlora"])
    floor = 4 * (frozen * tokens + head * labels)
    print(
        f"  floor {floor / 1e9:.0f} Gflop a batch; measured GEMM {rate / 1e9:.0f} Gflop per CPU second; "
        f"flexlora reaches {floor / seconds / rate:.0%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data folder, for real batches")
    parser.add_argument("--clients", type=int, default=3, help="clients of the data folder, one batch each")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--answer", type=int, default=32, help="response tokens of a synthetic example")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip_synthetic", action="store_true")
    options = parser.parse_args()
    model = load_model("smollm2")
    network = peft_network(str(gguf.converted(gguf.smollm2_file())))
    print(f"smollm2, rank {RANK} on all seven projections, float32, {torch.get_num_threads()} threads")
    batch = synthetic(options.length, options.answer, 0, model.tokenizer.vocab_size)
    for inputs, title in ((False, "labels on the response"), (True, "labels on the whole sequence")):
        steps = {
            "PEFT + torch loop": peft_loop(network, inputs),
            "transformers.Trainer": trainer(network, inputs),
            "flexlora": ours(model, inputs),
        }
        if not options.skip_synthetic:
            name = f"{BATCH} x {options.length}, nothing in common, {title}"
            compare(name, [batch], steps, options.repeats, model, inputs)
        if options.data:
            real = from_data(options.data, model, options.clients)
            compare(f"{len(real)} clients of {options.data.name}, {title}", real, steps, 0, model, inputs)


if __name__ == "__main__":
    main()
