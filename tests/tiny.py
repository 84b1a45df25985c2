"""Small things for tests: a random LLaMA of a few thousand weights, its tokenizer, and a federation of easy tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"


def tiny_tokenizer(max_length: int = 1024) -> PreTrainedTokenizerFast:
    """One token for each byte (256), then bos, eos and pad: 259 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens([BOS, EOS, PAD])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=max_length
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(folder: str | Path, seed: int = 0, **sizes: int) -> Path:
    """Save a random tiny LLaMA and a byte-level tokenizer into `folder`; both load with transformers' Auto classes.

    `sizes` are fields of LlamaConfig: hidden_size=32, num_hidden_layers=2, intermediate_size=48,
    num_attention_heads=4, num_key_value_heads=2 unless stated. The global random state stays as it is.
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,  # large enough that attention and adapters matter
        "tie_word_embeddings": True,
    }
    fields.update(sizes)
    config = LlamaConfig(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _record(kind: int, draw: random.Random) -> dict[str, str]:
    word = "".join(draw.choice("abcde") for _ in range(4))
    tasks = [
        ("Write the word backwards.", word, word[::-1], "reverse"),
        ("Write the word in capitals.", word, word.upper(), "capitals"),
        ("Give the first letter.", word, word[0], "first"),
        ("Copy the word.", word, word, "copy"),
    ]
    instruction, question, answer, category = tasks[kind % len(tasks)]
    return {"instruction": instruction, "input": question, "output": answer, "category": category}


def tiny_federation(folder: str | Path, clients: int, train: int = 6, eval: int = 3, test: int = 2) -> Path:
    """Write the data folder that `--data` takes, with `clients` clients; returns `folder`.

    Files: `{clients}/local_{training,eval,test}_{i}.json` and `{clients}/global_test.json`. Client i has one easy
    task; the global test holds `test` records of each task.
    """
    folder = Path(folder)
    inner = folder / str(clients)
    inner.mkdir(parents=True, exist_ok=True)
    for client in range(clients):
        draw = random.Random(client)
        for name, count in (("training", train), ("eval", eval), ("test", test)):
            records = [_record(client, draw) for _ in range(count)]
            (inner / f"local_{name}_{client}.json").write_text(json.dumps(records), encoding="utf-8")
    draw = random.Random(-1)
    records = [_record(kind, draw) for kind in range(4) for _ in range(test)]
    (inner / "global_test.json").write_text(json.dumps(records), encoding="utf-8")
    return folder
