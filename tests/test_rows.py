"""Examples as rows of a pass, and a common beginning that is computed once, against one example at a time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Olmo2Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from flexlora import attention
from flexlora import rows as rows_module
from flexlora.likelihood import logits, negative_log_likelihood
from flexlora.logits import said
from flexlora.rows import LANE, PAIR, Rows, Shared, collate, common_beginning, fill, halved, halves, label_tokens


@dataclass(frozen=True)
class Example:
    input_ids: tuple[int, ...]
    response_start: int
    cut: int = 0


@given(st.lists(st.integers(1, 400), min_size=1, max_size=12))
@settings(deadline=None, max_examples=100)
def test_halves_keep_the_order_and_are_cut_only_where_large(lengths: list[int]) -> None:
    examples = [Example((0,) * n, 0) for n in sorted(lengths, reverse=True)]
    parts = halved(examples)
    assert [x for part in parts for x in part] == examples
    for part in parts:
        assert len(part) == 1 or len(part) * len(part[0].input_ids) < 2 * LANE
    large = len(examples) > 1 and len(examples) * max(lengths) >= 2 * PAIR
    assert (len(parts) > 1) is large


def test_halves_have_like_padded_sizes() -> None:
    examples = [Example((0,) * n, 0) for n in (300, 120, 110, 100)]
    assert [len(part) for part in halved(examples)] == [1, 3]  # 300 and 3 x 120; two and two would be 600 and 220


HEAD = tuple(range(100, 170))
tails = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=6), min_size=2, max_size=4)


@given(tails, st.booleans(), st.data())
@settings(deadline=None, max_examples=60)
def test_one_row_has_every_label_after_what_stands_before_it(
    tails: list[list[int]], train_on_inputs: bool, data: st.DataObject
) -> None:
    """Whoever follows positions and mask of the row finds each example's tokens, and its labels as often as it has them."""
    examples = [Example((*HEAD, *t), 68 + data.draw(st.integers(0, len(t) + 1))) for t in tails]
    n = common_beginning(examples, train_on_inputs)
    rows = collate(examples, train_on_inputs, beginning=n)
    assert rows.shared is not None
    positions, mask, ids = rows.shared.positions()[0], rows.shared.mask()[0, 0], rows.input_ids[0]
    found: list[tuple[tuple[int, ...], int]] = []
    weights = rows.weights if rows.weights is not None else torch.ones(len(rows.labels))
    for k, label, weight in zip(rows.keep.tolist(), rows.labels.tolist(), weights.tolist(), strict=True):
        seen = mask[k].nonzero().flatten()
        assert positions[seen].tolist() == list(range(len(seen)))
        found += [(tuple(ids[seen].tolist()), label)] * int(weight)
    expected = [
        (x.input_ids[:k], x.input_ids[k])
        for x in examples
        for k in range(1 if train_on_inputs else max(1, x.response_start), len(x.input_ids))
    ]
    assert sorted(found) == sorted(expected)
    assert len(ids) == sum(len(x.input_ids) for x in examples) - (len(examples) - 1) * n


def sees(parts: Sequence[Rows]) -> list[tuple[tuple[int, ...], int]]:
    """What tokens each label comes after, and the label, as often as it counts, by positions and masks; of a row or its halves."""
    found: list[tuple[tuple[int, ...], int]] = []
    ids_before = places_before = torch.zeros(0, dtype=torch.long)
    for rows in parts:
        assert rows.shared is not None
        before, ends = rows.shared.before, len(ids_before) - rows.shared.cut_off
        ids, places = rows.input_ids[0], rows.shared.positions()[0]
        all_ids = torch.cat([ids_before[:before], ids_before[ends:], ids])
        all_places = torch.cat([places_before[:before], places_before[ends:], places])
        mask, weights = rows.shared.mask()[0, 0], rows.weights
        assert mask.shape == (len(ids), len(all_ids))
        for i, (k, label) in enumerate(zip(rows.keep.tolist(), rows.labels.tolist(), strict=True)):
            seen = mask[k].nonzero().flatten()
            assert all_places[seen].tolist() == list(range(len(seen)))
            found += [(tuple(all_ids[seen].tolist()), label)] * (1 if weights is None else int(weights[i]))
        ids_before, places_before = ids, places
    return sorted(found)


@given(tails, st.integers(2, 69), st.booleans(), st.data())
@settings(deadline=None, max_examples=100)
def test_two_halves_of_a_row_see_what_the_row_sees(
    tails: list[list[int]], beginning: int, train_on_inputs: bool, data: st.DataObject
) -> None:
    head = HEAD[:beginning]
    starts = [len(head) + data.draw(st.integers(0, len(t) - 1)) for t in tails]
    examples = [Example((*head, *t), start) for t, start in zip(tails, starts, strict=True)]
    rows = collate(examples, train_on_inputs, beginning=common_beginning(examples, train_on_inputs) or 1)
    with patch.object(rows_module, "PAIR", 1):
        parts = halves(rows)
    first, second = (x.input_ids.shape[1] for x in parts)
    assert 0 <= second - first <= 1
    assert torch.equal(torch.cat([x.input_ids for x in parts], 1), rows.input_ids)
    assert sees(parts) == sees([rows])


def test_a_row_of_one_example_has_halves_and_a_short_one_or_several_have_not() -> None:
    long = Example(tuple(range(2 * PAIR)), 2 * PAIR - 3)
    first, second = halves(collate([long], False))
    assert first.shared == Shared(PAIR, ())
    assert second.shared == Shared(PAIR, (), before=PAIR)
    assert (len(first.labels), second.labels.tolist()) == (0, list(long.input_ids[-3:]))
    assert len(halves(collate([Example(long.input_ids[1:], 5)], False))) == 1
    assert len(halves(collate([long, long], False))) == 1


@given(tails, st.booleans(), st.data())
@settings(deadline=None, max_examples=60)
def test_the_common_beginning_is_as_long_as_it_can_be(
    tails: list[list[int]], train_on_inputs: bool, data: st.DataObject
) -> None:
    examples = [Example((*HEAD, *t), 68 + data.draw(st.integers(0, len(t) + 1))) for t in tails]
    n = common_beginning(examples, train_on_inputs)
    alike = len({x.input_ids[: n + 1] for x in examples}) == 1
    more = len({x.input_ids[: n + 2] for x in examples}) == 1 and all(n + 2 <= len(x.input_ids) for x in examples)
    assert alike, "the token after it is common: it predicts the first label of each"
    if train_on_inputs:
        assert not more
    else:
        assert all(n < x.response_start for x in examples)
        assert not more or any(n + 1 == x.response_start for x in examples)


def test_a_short_beginning_is_not_shared() -> None:
    def examples(common: int, count: int) -> list[Example]:
        return [Example((*range(common), *[200 + i] * 70), common + 1) for i in range(count)]

    assert common_beginning(examples(31, 4), True) == 30  # 90 tokens of 404 are saved
    assert common_beginning(examples(11, 4), True) == 0  # 30 of 324
    assert common_beginning(examples(31, 1), True) == 0
    assert common_beginning(examples(0, 4), True) == 0


@given(st.lists(st.integers(21, 60), min_size=1, max_size=9), st.integers(0, 20), st.integers(1, 150))
@settings(deadline=None, max_examples=60)
def test_rows_are_few_and_of_like_lengths(lengths: list[int], n: int, most: int) -> None:
    examples = [Example(tuple(range(length)), 0) for length in lengths]
    rows = fill(examples, n, most)
    assert [x for row in rows for x in row] == examples

    def longest(parts: Sequence[Sequence[Any]]) -> int:
        """Tokens of the longest row of several examples; what one example takes cannot be helped."""
        return max((n + sum(len(x.input_ids) - n for x in part) for part in parts if len(part) > 1), default=0)

    every = [
        [examples[a:b] for a, b in itertools.pairwise([0, *ends, len(examples)])]
        for count in range(len(examples))
        for ends in itertools.combinations(range(1, len(examples)), count)
    ]
    allowed = [parts for parts in every if longest(parts) <= most]
    few = min(map(len, allowed))
    assert len(rows) == few
    assert longest(rows) == min(longest(parts) for parts in allowed if len(parts) == few)


SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = SMALL | {"num_key_value_heads": 2}
KINDS: dict[str, tuple[PretrainedConfig, bool]] = {
    # configuration, whether its logits are what the output layer gives
    "llama": (LlamaConfig(**GROUPED), True),
    "qwen2": (Qwen2Config(**GROUPED), True),
    "qwen3": (Qwen3Config(**GROUPED, head_dim=8), True),
    "qwen3-moe": (
        Qwen3MoeConfig(**GROUPED, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
        True,
    ),
    "olmo2": (Olmo2Config(**GROUPED), True),
    "phi": (PhiConfig(**SMALL), True),
    "gpt-neox": (GPTNeoXConfig(**SMALL), True),
    "granite": (GraniteConfig(**GROUPED, logits_scaling=3.0), False),
    "cohere": (CohereConfig(**GROUPED, logit_scale=0.25), False),
}


def alone(network: Any, example: Example, train_on_inputs: bool) -> Tensor:
    """The loss of one example by a plain pass."""
    ids = torch.tensor([example.input_ids])
    first = 1 if train_on_inputs else max(1, example.response_start)
    log_p = network(input_ids=ids).logits[0].log_softmax(-1)
    return -torch.stack([log_p[k - 1, example.input_ids[k]] for k in range(first, len(example.input_ids))]).sum()


@pytest.mark.parametrize("train_on_inputs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_what_each_example_is_alone(kind: str, train_on_inputs: bool) -> None:
    """Loss and gradient, for architectures with biases, other norms, rotary parts, experts, scaled logits."""
    config, plain = KINDS[kind]
    torch.manual_seed(5)
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    network.set_attn_implementation("sdpa")
    examples: Sequence[Any] = [Example((*range(50, 61), *t), 12) for t in ((7, 8, 9), (3,) * 9, (4, 5), (6, 7, 8, 9))]
    expected = sum(alone(network, x, train_on_inputs) for x in examples)
    assert isinstance(expected, Tensor)
    weight = network.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(expected, [weight])
    assert not attention.can_share(network), "it does not attend by our function yet"
    attention.use(network)
    assert attention.can_share(network)
    network.get_output_embeddings().weight.requires_grad_(False)
    n = common_beginning(examples, train_on_inputs)
    assert n == 10
    rows = collate(examples, train_on_inputs, beginning=n)
    x, head = said(network, rows)
    assert (head is not None) is plain
    assert x.shape == (len(rows.labels), 32 if plain else 300)
    loss = negative_log_likelihood(x, rows.labels, rows.weights, head)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    if not network.config.tie_word_embeddings:
        (ours,) = torch.autograd.grad(loss, [weight])
        torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-5)
    assert attention.halves_rows(network)
    with patch.object(rows_module, "PAIR", 1):
        between, parts = attention.Between(), halves(rows)
    assert len(parts) == 2
    first, second = (negative_log_likelihood(said(network, p, between)[0], p.labels, p.weights, head) for p in parts)
    torch.testing.assert_close(first + second, expected.detach(), rtol=1e-5, atol=0)
    if not network.config.tie_word_embeddings:
        found = [torch.autograd.grad(x, [weight])[0] for x in (second, first)]  # on the way back the second comes first
        torch.testing.assert_close(found[0] + found[1], gradient, rtol=1e-3, atol=1e-5)
    again, _ = said(network, rows)  # what it found out it knows
    torch.testing.assert_close(logits(again, head), logits(x, head))
    assert network(input_ids=rows.input_ids).logits.shape == (*rows.input_ids.shape, 300), "nothing stays selected"


def test_labels_are_counted() -> None:
    assert label_tokens(Example((1, 2, 3, 4), 3), False) == 1
    assert label_tokens(Example((1, 2, 3, 4), 3), True) == 3
    assert label_tokens(Example((1, 2, 3, 4), 0), False) == 3


def test_a_row_of_three() -> None:
    shared = Shared(2, (1, 2))
    assert shared.positions().tolist() == [[0, 1, 2, 2, 3]]
    assert shared.mask()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
