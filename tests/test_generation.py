"""Batched greedy decoding against `network.generate`, one prompt at a time, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers import MistralForCausalLM as Mistral

from flexlora import decoding, generation
from flexlora.batching import cheapest_cuts, common, plan
from flexlora.decoding import has_slots
from flexlora.generation import generate, stream
from flexlora.logits import inference, logits_at
from tiny import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return network.eval(), AutoTokenizer.from_pretrained(folder)


def oracle(network, tokenizer, prompt, new, **options) -> str:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def prompts_like(*texts: str) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


BASE = "Answer in one word. Which animal is this? It "
PROMPTS = prompts_like(
    BASE + "barks",
    "b",
    BASE + "meows all day and all night",
    BASE,
    "Count to ten.",
    BASE + "barks",
    "Count to three, then stop.",
    BASE + "swims, and it is very, very large",
)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_equals_generation_one_by_one(tiny, batch_size):
    network, tokenizer = tiny
    expected = [oracle(network, tokenizer, p, 12) for p in PROMPTS]
    assert len(set(expected)) > 3
    assert generate(network, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size) == expected


@settings(deadline=None, max_examples=12)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "abc", "abcdefgh" * 3, "xyz"]), st.text("abx", min_size=1, max_size=9)),
        min_size=1,
        max_size=9,
    ),
    st.integers(1, 5),
    st.integers(1, 6),
)
def test_any_prompts_and_sizes(tiny, texts, batch_size, new):
    network, tokenizer = tiny
    prompts = prompts_like(*(a + b for a, b in texts))
    expected = {tuple(p): oracle(network, tokenizer, p, new) for p in prompts}
    texts = generate(network, tokenizer, prompts, max_new_tokens=new, batch_size=batch_size)
    assert texts == [expected[tuple(p)] for p in prompts]


def test_rows_that_end_leave_and_others_take_their_place(tiny, monkeypatch):
    network, tokenizer = tiny
    whole = [oracle(network, tokenizer, p, 12) for p in PROMPTS]
    # let a token that some answers hold end them, early in some, never in others
    end = next(c for c in sorted(set("".join(whole))) if c.isascii() and 2 <= sum(c in w for w in whole) < len(whole))
    ends = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(end))[0]
    before = network.generation_config.eos_token_id
    sizes: list[int] = []
    step = decoding.Decoder.step
    monkeypatch.setattr(decoding.Decoder, "step", lambda self: (sizes.append(len(self.rows)), step(self))[1])
    network.generation_config.eos_token_id = [before, ends]
    try:
        expected = [oracle(network, tokenizer, p, 12) for p in PROMPTS]
        texts = generate(network, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    finally:
        network.generation_config.eos_token_id = before
    assert texts == [text.removesuffix(end) for text in expected]
    assert any(text.endswith(end) for text in expected)
    assert len(set(sizes)) > 1
    assert max(sizes) <= 3


def test_stop_string_in_the_middle(tiny):
    network, tokenizer = tiny
    whole = [oracle(network, tokenizer, p, 16) for p in PROMPTS]
    text = next(w for w in whole if len(w) > 9)
    stop = text[4:7]
    for stops in ((stop,), ("never there", stop)):
        texts = generate(network, tokenizer, PROMPTS, max_new_tokens=16, batch_size=4, stop=stops)
        assert texts == [w.split(stop)[0] for w in whole]
        assert [len(t) for t in texts] != [len(w) for w in whole]


def test_stop_string_may_be_a_special_token_and_the_answer_empty(tiny):
    network, tokenizer = tiny
    # the first token of every answer ends it
    first = {p: oracle(network, tokenizer, p, 1) for p in map(tuple, PROMPTS)}
    texts = generate(network, tokenizer, PROMPTS, max_new_tokens=8, batch_size=4, stop=tuple(set(first.values())))
    assert texts == [""] * len(PROMPTS)
    # of several, the one that stands first
    assert generation._Ending(network, tokenizer, ["d", "b"]).text(tokenizer("abcd").input_ids) == "a"
    ending = generation._Ending(network, tokenizer, ["<|im_start|>", "###"])
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in ending.tokens
    assert ending.stop == ["###"]
    assert ending.text([97, 98, tokenizer.convert_tokens_to_ids("<|im_start|>")]) == tokenizer.decode([97, 98])


def test_no_prompts_no_tokens(tiny):
    network, tokenizer = tiny
    assert generate(network, tokenizer, [], max_new_tokens=5, batch_size=4) == []
    assert generate(network, tokenizer, PROMPTS[:2], max_new_tokens=0, batch_size=4) == ["", ""]


def test_progress_ends_with_all(tiny):
    network, tokenizer = tiny
    seen: list[tuple[int, int]] = []
    generate(network, tokenizer, PROMPTS, max_new_tokens=3, batch_size=3, progress=lambda *at: seen.append(at))
    assert seen[-1] == (8, 8)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)


@pytest.mark.parametrize("stop", [(), "middle"])
def test_stream_joins_to_the_same_text(tiny, stop):
    network, tokenizer = tiny
    for prompt in PROMPTS:
        whole = oracle(network, tokenizer, prompt, 12)
        stops = (whole[5:8],) if stop and len(whole) > 8 else ()
        pieces = list(stream(network, tokenizer, prompt, max_new_tokens=12, stop=stops))
        assert "".join(pieces) == (whole.split(stops[0])[0] if stops else whole)


def test_mode_and_random_state_stay(tiny):
    network, tokenizer = tiny
    network.train()
    network.model.layers[0].eval()
    modes = [m.training for m in network.modules()]
    state = torch.get_rng_state()
    try:
        generate(network, tokenizer, PROMPTS[:3], max_new_tokens=3, batch_size=2)
        assert [m.training for m in network.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        with inference(network):
            assert not any(m.training for m in network.modules())
        assert [m.training for m in network.modules()] == modes
    finally:
        network.eval()


def test_absolute_positions_and_architectures_without_slots(tiny):
    tokenizer = tiny[1]
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 256, "eos_token_id": 257, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **sizes))
        window = Mistral(
            MistralConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=8,
                **sizes,
            )
        )
        neo: dict[str, Any] = {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 128,
            **sizes,
        }
        local = GPTNeoForCausalLM(GPTNeoConfig(attention_types=[[["global", "local"], 1]], window_size=16, **neo))
        everywhere = GPTNeoForCausalLM(GPTNeoConfig(attention_types=[[["global"], 2]], **neo))
    assert min(map(len, PROMPTS)) < 16 < max(map(len, PROMPTS))
    for network, slots in ((gpt2, True), (window, False), (local, False), (everywhere, True)):
        network = network.double().eval()
        expected = [oracle(network, tokenizer, p, 8) for p in PROMPTS]
        assert len(set(expected)) > 3
        assert generate(network, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3) == expected
        assert has_slots(network) is slots


def test_a_state_that_is_no_cache_of_keys(tiny):
    tokenizer = tiny[1]
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        networks = MambaForCausalLM(MambaConfig(initializer_range=0.3, **sizes)), RwkvForCausalLM(RwkvConfig(**sizes))
    for network in networks:
        head: Any = network.get_output_embeddings()
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(2))  # texts that differ
        expected = [oracle(network.eval(), tokenizer, p, 8) for p in PROMPTS]
        assert len(set(expected)) > 3
        assert generate(network, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3) == expected
        assert "".join(stream(network, tokenizer, PROMPTS[0], max_new_tokens=8)) == expected[0]


def test_logits_only_where_they_are_asked_for(tiny):
    network, _ = tiny
    ids = torch.tensor([PROMPTS[0], PROMPTS[5]])
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[0, 3] = where[1, 5] = True
    with torch.inference_mode():
        full = network(ids).logits
        with logits_at(network, where) as hidden:
            few = network(ids).logits
        assert few.shape == (1, 2, full.shape[-1])
        assert hidden[0].shape == (*ids.shape, 32)
        torch.testing.assert_close(few[0], torch.stack([full[0, 3], full[1, 5]]))
        assert network(ids).logits.shape == full.shape


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=25),
    st.integers(1, 7),
)
def test_plan_takes_each_prompt_once(prompts, batch_size):
    chunks = plan(prompts, batch_size)
    assert sorted(i for c in chunks for i in c.members) == list(range(len(prompts)))
    for chunk in chunks:
        assert len(chunk.members) <= batch_size
        beginnings = {tuple(prompts[i][: chunk.prefix]) for i in chunk.members}
        assert len(beginnings) == 1
        assert all(len(prompts[i]) > chunk.prefix for i in chunk.members)


def test_plan_reads_a_common_beginning_once():
    task = [[[t] * 100 + [n] * (5 + n) for n in range(6)] for t in (1, 2)]
    prompts = [p for pair in zip(*task, strict=True) for p in pair]  # the tasks interleaved
    chunks = plan(prompts, 8)
    assert {c.prefix for c in chunks} == {100}
    assert [sorted({prompts[i][0] for i in c.members}) for c in chunks] == [[1], [2]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 6), st.integers(1, 6), st.lists(st.integers(0, 9), min_size=49, max_size=49))
def test_cheapest_cuts_are_the_cheapest(count, longest, price):
    def cost(i: int, j: int) -> float:
        return price[7 * i + j]

    pieces = cheapest_cuts(count, longest, cost)
    assert [k for i, j in pieces for k in range(i, j)] == list(range(count))
    assert all(0 < j - i <= longest for i, j in pieces)
    every = [
        [*itertools.pairwise([0, *inner, count])]
        for r in range(count)
        for inner in itertools.combinations(range(1, count), r)
    ]
    fits = [cuts for cuts in every if all(j - i <= longest for i, j in cuts)] or [[]]
    assert sum(cost(*p) for p in pieces) == min(sum(cost(*p) for p in cuts) for cuts in fits)


def test_common():
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 4]) == 2
    assert common([], [1]) == 0


def test_memory_is_that_of_the_rows_in_flight(tiny, monkeypatch):
    network, tokenizer = tiny
    slots: list[decoding._Slots] = []
    start = decoding._Slots.__init__
    monkeypatch.setattr(decoding._Slots, "__init__", lambda self, *a: (slots.append(self), start(self, *a))[1])
    sizes = []
    for copies in (1, 5):
        generate(network, tokenizer, PROMPTS * copies, max_new_tokens=2, batch_size=4)
        sizes.append(sum(t.numel() for t in (*slots[-1].keys, *slots[-1].values)))
    assert sizes[0] == sizes[1] == 2 * 2 * 5 * 2 * 8 * (max(map(len, PROMPTS)) + 2)


def test_half_a_character_is_held_back(tiny, monkeypatch):
    network, tokenizer = tiny
    ids = tokenizer("é€x").input_ids
    assert len(ids) == 6
    monkeypatch.setattr(generation, "_one_by_one", lambda *_: (ids[: k + 1] for k in range(len(ids))))
    assert list(stream(network, tokenizer, [1], max_new_tokens=9)) == ["é", "€", "x"]
