"""How much faster flexlora scores than `network.generate`, one prompt at a time: in one run, in turns.

    python benchmarks/scoring.py --data ../shared/data/ni/64/global_test.json

Timings of a shared machine move; so all ways take turns, and the ratio is that of the
seconds a record. `--sample 6` times the slow ways on every sixth record only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flexlora.batching import common, plan
from flexlora.data.records import read_records
from flexlora.evaluation import generate, score, stops
from flexlora.logits import inference
from flexlora.modeling import Model, load_model
from flexlora.prompts import encode_prompts, load_template


def one_by_one(model: Model, prompts: Sequence[Sequence[int]], new: int) -> list[str]:
    """Greedy `network.generate` on one prompt after another."""
    texts: list[str] = []
    with inference(model.network):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            out = model.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=model.tokenizer.pad_token_id,
            )
            texts.append(model.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return texts


def in_plain_batches(model: Model, prompts: Sequence[Sequence[int]], new: int, batch_size: int) -> list[str]:
    """`network.generate` on batches sorted by length and padded on the left."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with inference(model.network):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in batch)
            pad = [longest - len(prompts[i]) for i in batch]
            ids = torch.tensor([[0] * n + list(prompts[i]) for n, i in zip(pad, batch, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad])
            out = model.network.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=model.tokenizer.pad_token_id,
            )
            decoded = model.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            for i, text in zip(batch, decoded, strict=True):
                texts[i] = text
    return texts


def tokens_read(prompts: Sequence[Sequence[int]], batch_size: int) -> int:
    """Prompt tokens that pass the network, padding included."""
    total, begun = 0, []
    for chunk in plan(prompts, batch_size):
        beginning = list(prompts[chunk.members[0]][: chunk.prefix])
        total += len(beginning) - common(begun, beginning) if beginning else 0
        begun = beginning or begun
        total += len(chunk.members) * (max(len(prompts[i]) for i in chunk.members) - chunk.prefix)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True, help="a JSON file of records")
    parser.add_argument("--prompt_template", default="chat")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--sample", type=int, default=1, help="time the slow ways on every n-th record only")
    parser.add_argument("--plain", action="store_true", help="time plain batches of `network.generate` too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, template = load_model(options.model), load_template(options.prompt_template)
    records = read_records(options.data)
    prompts = encode_prompts(records, template, model.tokenizer, 512, options.max_new_tokens)
    new, stop = options.max_new_tokens, stops(template, model.tokenizer)
    ways = {"one by one": lambda part: one_by_one(model, part, new)}
    if options.plain:
        ways["plain batches of 16"] = lambda part: in_plain_batches(model, part, new, 16)
    one_by_one(model, prompts[:2], 2)

    # A third of the records each turn, whole tasks together as in a real run.
    thirds = [range(k * len(records) // 3, (k + 1) * len(records) // 3) for k in range(3)]
    seconds: dict[str, float] = {}
    texts: dict[str, dict[int, str]] = {}

    def timed(name: str, part: range, work: Callable[[list[list[int]]], list[str]]) -> None:
        begin = time.perf_counter()
        answers = work([prompts[i] for i in part])
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
        texts.setdefault(name, {}).update(zip(part, answers, strict=True))

    for part in thirds:
        for name, work in ways.items():
            timed(name, part[:: options.sample], work)
        for size in options.batch_sizes:
            timed(
                f"flexlora, {size} rows",
                part,
                lambda p, size=size: generate(
                    model.network, model.tokenizer, p, max_new_tokens=new, batch_size=size, stop=stop
                ),
            )
    begin = time.perf_counter()
    scores = score(
        model.network,
        model.tokenizer,
        records,
        template,
        cutoff_len=512,
        max_new_tokens=new,
        batch_size=max(options.batch_sizes),
    )
    whole = "flexlora, all scores"
    seconds[whole] = time.perf_counter() - begin
    texts[whole] = {i: p["prediction"] for i, p in enumerate(scores.predictions)}

    reference = texts["one by one"]
    slow = seconds["one by one"] / len(reference)
    print(f"{len(records)} records, {sum(map(len, prompts))} prompt tokens, {new} new tokens at most")
    for size in options.batch_sizes:
        print(f"prompt tokens read with {size} rows, padding included: {tokens_read(prompts, size)}")
    print(f"{'':24}{'records':>8}{'s/record':>10}{'speed-up':>10}{'same text':>11}")
    for name, t in seconds.items():
        same = sum(texts[name][i].strip() == reference[i].strip() for i in reference)
        each = t / len(texts[name])
        print(f"{name:24}{len(texts[name]):8}{each:10.3f}{slow / each:10.2f}{same:>6}/{len(reference)}")
    print(json.dumps({k: v for k, v in scores.summary().items() if k != "per_category"}))


if __name__ == "__main__":
    main()
