"""Scores against slow oracles: one example at a time in float64, rouge-score itself, the release's formula by hand."""

from __future__ import annotations

import copy
import random
import string
import threading
import unicodedata
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexlora import evaluation, logits
from flexlora.evaluation import exact_match, lcs, loss, rouge_l, score, stops
from flexlora.modeling import Model
from flexlora.prompts import CHAT, Encoded, Record, Template, encode_all, encode_prompts, load_template
from tiny import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    folder = tiny_model(tmp_path_factory.mktemp("tiny"))
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return network.eval(), AutoTokenizer.from_pretrained(folder)


def some_examples(count: int, seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        ids = tuple(draw.randrange(256) for _ in range(draw.randrange(2, 40)))
        examples.append(Encoded(ids, draw.randrange(len(ids)), 0))
    return examples


def nll_oracle(network, example: Encoded, train_on_inputs: bool) -> tuple[float, int]:
    with torch.inference_mode():
        logits = network(torch.tensor([example.input_ids])).logits[0]
    start = 1 if train_on_inputs else max(1, example.response_start)
    chosen = [logits[t - 1].log_softmax(-1)[example.input_ids[t]].item() for t in range(start, len(example.input_ids))]
    return -sum(chosen), len(chosen)


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_loss_equals_one_example_at_a_time(tiny, batch_size, train_on_inputs):
    network, _ = tiny
    examples = some_examples(11)
    expected = [nll_oracle(network, e, train_on_inputs) for e in examples]
    result = loss(network, examples, batch_size=batch_size, train_on_inputs=train_on_inputs)
    assert result.tokens == [n for _, n in expected]
    # cross entropy is computed in float32, as in training
    assert result.sums == pytest.approx([s for s, _ in expected], rel=1e-5)
    assert result.mean == pytest.approx(sum(s for s, _ in expected) / sum(n for _, n in expected), rel=1e-5)


def test_two_rows_are_read_at_once_where_there_are_cores_and_a_pass_changes_nothing(tiny, monkeypatch):
    network, examples = tiny[0], some_examples(11)
    threads: set[int] = set()
    hook = network.get_input_embeddings().register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    found = []
    try:
        cases = ((1, True, True, 1), (2, True, True, 2), (5, True, True, 2), (2, False, True, 1), (2, True, False, 1))
        for cores, alike, bare, expected in cases:
            torch.set_num_threads(cores)
            monkeypatch.setattr(evaluation, "side_by_side", lambda _, alike=alike: alike)
            # where logits are not bare a row makes them all: two would hold twice as many
            monkeypatch.setattr(evaluation, "bare_head", lambda _, bare=bare: object() if bare else None)
            threads.clear()
            found.append(loss(network, examples, batch_size=2))
            assert len(threads) <= expected
            assert (len(threads) > 1) is (expected > 1)
            assert torch.get_num_threads() == cores
    finally:
        hook.remove()
    assert all(x.sums == pytest.approx(found[0].sums, rel=1e-5) for x in found)


def test_loss_of_nothing(tiny):
    assert str(loss(tiny[0], [], batch_size=4).mean) == "nan"


def test_logits_in_memory_are_bounded(tiny, monkeypatch):
    network, _ = tiny
    monkeypatch.setattr(logits, "LOGITS", 100 * 259)
    seen: list[int] = []
    hook = network.get_output_embeddings().register_forward_hook(lambda *a: seen.append(a[2].numel()))
    examples = some_examples(30)
    try:
        few, _ = evaluation._read(network, examples, 64)
    finally:
        hook.remove()
    assert max(seen) <= 100 * 259
    assert few.sums == pytest.approx(loss(network, examples, batch_size=64).sums, rel=1e-5)


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("short", [True, False])
def test_what_examples_begin_with_is_read_once(tiny, train_on_inputs, short):
    """Also where answers are alike, or one example is another's beginning."""
    network, tokenizer = copy.deepcopy(tiny[0]).float(), tiny[1]
    beginning = tuple(range(60))
    ends = [(3, 5), (3, 5), (3, 5, 9), (4,), (7, 8, 9, 10)]
    examples = [*some_examples(3), *(Encoded(beginning + end, 61, 0) for end in ends)]
    examples += [Encoded(beginning, 40, 0)] if short else []
    expected = [nll_oracle(network, e, train_on_inputs) for e in examples]
    model = Model(network, tokenizer, name="tiny")
    assert model.shares_rows
    tokens: list[int] = []
    hook = network.get_input_embeddings().register_forward_hook(lambda _, x, __: tokens.append(x[0].numel()))
    result = loss(network, examples, batch_size=16, train_on_inputs=train_on_inputs)
    hook.remove()
    assert result.tokens == [n for _, n in expected]
    assert result.sums == pytest.approx([s for s, _ in expected], rel=1e-4)
    assert sum(tokens) < sum(len(e.input_ids) for e in examples) - 190


words = st.lists(
    st.sampled_from(["the", "cats", "cat", "running", "run", "dog,", "quickly", "!", "12", "a"]), max_size=9
).map(" ".join)


@settings(deadline=None)
@given(st.lists(words, min_size=1, max_size=3), words)
def test_rouge_l_is_that_of_rouge_score(references, prediction):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert rouge_l(references, prediction) == scorer.score_multi(references, prediction)["rougeL"].fmeasure


def test_rouge_l_by_hand():
    assert rouge_l(["the cat sat on the mat"], "the cat on the mat") == pytest.approx(2 * 5 / 11)
    assert rouge_l(["runs"], "Running!") == 1  # stemmed, caseless
    assert rouge_l(["yes", "it is so"], "it is") == pytest.approx(0.8)
    assert rouge_l(["yes"], "") == 0


def test_rouge_l_sees_other_scripts():
    assert RougeScorer(["rougeL"]).score("два слова", "два слова")["rougeL"].fmeasure == 0
    assert rouge_l(["два слова"], "два, СЛОВА") == 1
    assert rouge_l(["два слова"], "два других слова") == pytest.approx(0.8)
    assert rouge_l(["今日は"], "今日も") == pytest.approx(2 / 3)
    assert rouge_l(["über alles"], "über") == pytest.approx(2 / 3)
    assert rouge_l(["使用Python语言"], "Python") == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        ("की", "का"),  # Hindi vowel signs
        ("কি", "কে"),  # Bengali
        ("தீ", "தா"),  # Tamil
        ("\u0643\u064e\u062a\u064e\u0628\u064e", "\u0643\u064f\u062a\u0650\u0628\u064e"),  # Arabic: wrote, was written
        ("\u05e9\u05c1\u05b8\u05dd", "\u05e9\u05c2\u05b8\u05dd"),  # pointed Hebrew: there, put
        ("می\u200cخواهم", "می خواهم"),  # Persian, a zero-width non-joiner inside the word
        ("ক্\u200dষ", "ক্ষ"),  # a zero-width joiner
    ],
)
def test_rouge_l_keeps_vowel_signs_in_their_word(reference, other):
    assert rouge_l([reference], other) == 0
    assert rouge_l([reference], f"({reference})") == 1


def test_rouge_l_takes_composed_and_decomposed_letters_as_one():
    for text in ("über café", "Việt Nam", "한국어", "が"):
        one, other = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert one != other
        assert rouge_l([one], other) == rouge_l([other], one) == 1
    assert rouge_l([unicodedata.normalize("NFD", "café")], "cafe") == 0
    assert rouge_l(["наш дом \u0301"], "наш дом") == 1  # a mark alone is no word
    assert rouge_l(["กิน"], "กา") == pytest.approx(2 / 5)  # Thai: a vowel sign is a character like any other
    for prediction in ("cafe\u0301", "café"):  # an ASCII reference: rouge-score as it is
        plain = RougeScorer(["rougeL"], use_stemmer=True).score("cafe", prediction)["rougeL"].fmeasure
        assert rouge_l(["cafe"], prediction) == plain


def test_an_accent_is_the_same_however_it_is_encoded() -> None:
    assert exact_match(["Caf\u00e9!"], "cafe\u0301")
    assert exact_match(["cafe\u0301"], "CAF\u00c9")
    assert not exact_match(["cafe"], "caf\u00e9")


def test_exact_match():
    assert exact_match(["Yes."], " yes ")
    assert exact_match(["no", "not at  all"], "Not at all!")
    assert not exact_match(["yes"], "yes it is")
    assert exact_match([":)"], ":) ")
    assert not exact_match([":)"], "!")
    assert exact_match([""], " ")
    assert not exact_match([""], "?")


@settings(deadline=None)
@given(st.text("abc", max_size=70), st.text("abc", max_size=70))
def test_lcs_equals_the_table(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    assert lcs(a, b) == table[-1][-1]


RECORDS = [
    Record("Write the word backwards.", "abcd", "dcba", "reverse"),
    Record("Write the word backwards.", "xyz and more of it", "zyx", "reverse"),
    Record("Copy.", "one", "one", "copy"),
    Record("Say anything.", "", "first", "say", ("first", "second one")),
    Record("Write the word backwards.", "ab", "ba", "reverse"),
]


def scored(network, tokenizer, template: Template = CHAT, batch_size: int = 3, records=RECORDS, **options):
    settings: dict[str, Any] = {"cutoff_len": 160, "max_new_tokens": 10} | options
    return score(network, tokenizer, records, template, batch_size=batch_size, **settings)


@pytest.mark.parametrize(("template", "cutoff"), [("chat", 400), ("alpaca", 400), ("chat", 60), ("no slots", 400)])
def test_scores_equal_the_slow_way(tiny, monkeypatch, template, cutoff):
    network, tokenizer = tiny
    if template == "no slots":
        template = "chat"
        monkeypatch.setattr(evaluation, "has_slots", lambda _: False)
    template = load_template(template)
    new = 10
    room = encode_prompts(RECORDS, template, tokenizer, cutoff, new)
    cut = [
        list(e.input_ids[: e.response_start]) != p
        for e, p in zip(encode_all(RECORDS, template, tokenizer, cutoff), room, strict=True)
    ]
    assert any(cut) is (cutoff < 100)
    assert not all(cut)
    expected = []
    for record, prompt, example in zip(
        RECORDS,
        encode_prompts(RECORDS, template, tokenizer, cutoff, new),
        encode_all(RECORDS, template, tokenizer, cutoff),
        strict=True,
    ):
        with torch.inference_mode():
            out = network.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=258)
        text = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
        references = record.references or (record.output,)
        rouge = max(rouge_l([r], text.strip()) for r in references)
        expected.append((text.strip(), rouge, *nll_oracle(network, example, False)))
    result = score(network, tokenizer, RECORDS, template, cutoff_len=cutoff, max_new_tokens=new, batch_size=3)
    assert [p["prediction"] for p in result.predictions] == [e[0] for e in expected]
    assert [p["category"] for p in result.predictions] == [r.category for r in RECORDS]
    assert result.predictions[3]["references"] == ["first", "second one"]
    assert result.examples == 5
    assert result.rougeL == pytest.approx(fmean(e[1] for e in expected))
    assert result.loss == pytest.approx(sum(e[2] for e in expected) / sum(e[3] for e in expected), rel=1e-5)
    reverse = [expected[i] for i in (0, 1, 4)]
    part = result.per_category["reverse"]
    assert part["examples"] == 3
    assert part["rougeL"] == pytest.approx(fmean(e[1] for e in reverse))
    assert part["loss"] == pytest.approx(sum(e[2] for e in reverse) / sum(e[3] for e in reverse), rel=1e-5)
    assert set(result.per_category) == {"reverse", "copy", "say"}


def test_means_over_examples_and_over_tasks(tiny, monkeypatch):
    network, tokenizer = tiny
    answers, read = ["dcba", "no", "one", "second", "ba"], evaluation.generate_and_read
    monkeypatch.setattr(evaluation, "generate_and_read", lambda *a, **k: (answers, *read(*a, **k)[1:]))
    result = scored(network, tokenizer)
    assert result.rougeL == pytest.approx((1 + 0 + 1 + 2 / 3 + 1) / 5)
    assert result.rougeL_by_task == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert result.exact_match == pytest.approx(3 / 5)
    assert {c: v["exact_match"] for c, v in result.per_category.items()} == {"reverse": 2 / 3, "copy": 1, "say": 0}
    summary = result.summary()
    assert "predictions" not in summary
    assert summary["per_category"]["copy"]["rougeL"] == 1


def test_batch_size_changes_nothing(tiny):
    network, tokenizer = tiny
    one, many = (scored(network, tokenizer, batch_size=b) for b in (1, 16))
    assert [p["prediction"] for p in one.predictions] == [p["prediction"] for p in many.predictions]
    assert one.rougeL_teacher_forced == many.rougeL_teacher_forced
    assert one.loss == pytest.approx(many.loss, rel=1e-6)
    alone = scored(network, tokenizer, records=RECORDS[1:2])
    assert alone.predictions[0]["prediction"] == one.predictions[1]["prediction"]


@pytest.mark.parametrize("pad_label", [1829, 80])  # 80 is a letter, so that padding makes words
def test_teacher_forced_as_the_release_computes_it(tiny, monkeypatch, pad_label):
    network, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad():
        network.get_input_embeddings().weight *= 12  # the likeliest next token is now often the token itself
    monkeypatch.setattr(evaluation, "RELEASE_PAD_LABEL", pad_label)
    filler = min(pad_label, len(tokenizer) - 1)  # the tiny vocabulary ends before 1829
    records = RECORDS[:3]
    examples = encode_all(records, CHAT, tokenizer, 160)
    longest = max(len(e.input_ids) for e in examples)
    longest += -longest % 8
    expected = []
    for example in examples:
        ids = list(example.input_ids)
        with torch.inference_mode():
            best = network(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        label = tokenizer.decode(ids + [filler] * (longest - len(ids)), skip_special_tokens=True)
        guess = tokenizer.decode(best, skip_special_tokens=True)
        expected.append(RougeScorer(["rougeL"]).score(label, guess)["rougeL"].fmeasure)
    assert 0 < fmean(expected) < 1
    assert scored(network, tokenizer, records=records).rougeL_teacher_forced == pytest.approx(fmean(expected))


def test_a_model_that_learnt_the_answer_scores_full_marks(tiny):
    network, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    records = [Record("Say it.", word, "abc", "one") for word in ("x", "yy")]
    (before, *_), examples = (
        scored(network, tokenizer, records=records).predictions,
        encode_all(records, CHAT, tokenizer, 99),
    )
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        for example in examples:
            labels = torch.tensor([example.input_ids])
            labels[:, : example.response_start] = -100
            network(torch.tensor([example.input_ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = scored(network, tokenizer, records=records)
    assert before["rougeL"] == 0
    assert [p["prediction"] for p in result.predictions] == ["abc"] * 2
    assert result.rougeL == result.rougeL_by_task == result.exact_match == 1
    assert result.loss < 0.1 < before["loss"]


def test_an_answer_ends_where_training_ended_it(tiny):
    _, tokenizer = tiny
    assert stops(CHAT, tokenizer) == ("<|im_end|>",)
    assert stops(load_template("alpaca"), tokenizer)[-1] == "<|im_end|>"
    assert "### Instruction:" in stops(load_template("alpaca"), tokenizer)


def test_random_state_and_mode_stay(tiny):
    network, tokenizer = tiny
    network.train()
    state = torch.get_rng_state()
    try:
        scored(network, tokenizer)
        assert all(m.training for m in network.modules())
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        network.eval()


def test_progress_counts_records(tiny):
    network, tokenizer = tiny
    seen: list[tuple[int, int]] = []
    scored(network, tokenizer, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (5, 5)


def test_punctuation_of_natural_instructions():
    assert exact_match([string.punctuation + "a"], "A")
