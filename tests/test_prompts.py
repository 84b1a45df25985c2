"""Templates against the original's rendering rule, and tokens against the tokenizer's own functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flexlora.prompts import (
    CHAT,
    Record,
    TokenCache,
    encode,
    encode_all,
    encode_prompt,
    end_of_turn,
    extract_response,
    load_template,
    prompt_messages,
    render,
    templates,
)
from flexlora.types import FlexLoraError
from tiny import CHATML, tiny_tokenizer

RECORD = Record("Reverse the list.", "cat, dog", "dog, cat", "reversal", ("dog, cat",))
TALK = Record(
    "?", "", "Blue.", "", ("Blue.",), (("system", "Be brief."), ("user", "Colour of the sky?"), ("assistant", "Blue."))
)
TEXT_TEMPLATES = [name for name in templates() if name != "chat"]


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A trained BPE with merges, among them line breaks with letters, that puts bos before plain text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    texts = [t.prompt_input + "dog, cat" for t in map(load_template, TEXT_TEMPLATES)] + ["assistant\ndog, cat"] * 3
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def original_prompt(data: dict[str, str], record: Record) -> str:
    """The rule of the original: the input's prompt where there is an input, filled in by str.format."""
    if record.input:
        return data["prompt_input"].format(instruction=record.instruction, input=record.input)
    return data["prompt_no_input"].format(instruction=record.instruction)


# --- templates -------------------------------------------------------------------------------------------------------


def test_built_in_templates_have_the_markers_of_the_originals():
    assert templates() == ("chat", "alpaca", "alpaca_legacy", "alpaca_short", "vigogne")
    for name in TEXT_TEMPLATES:
        template = load_template(name)
        response, field = ("### Réponse:", "### Entrée:") if name == "vigogne" else ("### Response:", "### Input:")
        assert template.response_split == response
        prompt, answer = render(template, RECORD)
        order = ["### Instruction:\nReverse the list.\n\n", f"{field}\ncat, dog\n\n", response]
        places = [prompt.index(part) for part in order]
        assert places == sorted(places)
        assert prompt.endswith(response + ("" if name == "alpaca_legacy" else "\n"))
        assert answer == "dog, cat"
        assert field not in render(template, Record("Say hi.", "", "Hi"))[0]
        assert template.stop == ("### Instruction:", field, response)
    assert render(load_template("alpaca_short"), RECORD)[0].startswith("### Instruction:")


def test_a_file_in_the_original_format_gives_the_original_prompts(tmp_path: Path):
    data = {
        "description": "mine",
        "prompt_input": "Q {{x}} {instruction}\nI {input}\nA:",
        "prompt_no_input": "Q {instruction}\nA:",
        "response_split": "A:",
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    template = load_template(str(path))
    for record in (RECORD, Record("Say {input} and {", "", "Hi"), Record("{instruction}", "{}", "Hi")):
        assert render(template, record) == (original_prompt(data, record), record.output)
    assert template.stop == ("A:",)
    path.write_text(json.dumps({**data, "stop": ["\n\n"]}))
    assert load_template(str(path)).stop == ("\n\n",)


GOOD = {
    "prompt_input": "### Q: {instruction} {input} ### A:",
    "prompt_no_input": "### Q: {instruction} ### A:",
    "response_split": "### A:",
}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "response_split"}), "response_split is missing"),
        (json.dumps({**GOOD, "response_split": " "}), "response_split is missing"),
        (json.dumps({**GOOD, "response_split": "### B:"}), "response marker '### B:' is not in prompt_input"),
        (json.dumps({**GOOD, "prompt_no_input": "{instruction}"}), "is not in prompt_no_input"),
        (json.dumps({**GOOD, "prompt_input": "{instruction} {input} {context} ### A:"}), "unknown field {context}"),
        (json.dumps({**GOOD, "prompt_no_input": "{instruction} {input} ### A:"}), "unknown field {input}"),
        (json.dumps({**GOOD, "prompt_input": "{instruction.__class__} {input} ### A:"}), "unknown field"),
        (json.dumps({**GOOD, "prompt_input": "{instruction!r} {input} ### A:"}), "has a format"),
        (json.dumps({**GOOD, "prompt_input": "{instruction} {input} { ### A:"}), "unbalanced brace"),
        (json.dumps({**GOOD, "prompt_input": "{instruction} ### A:"}), "lacks the field {input}"),
        (json.dumps({**GOOD, "prompt_input": 3}), "prompt_input is missing or not a string"),
        (json.dumps({**GOOD, "stop": "x"}), "stop is not a list"),
        (json.dumps({**GOOD, "promt": "x"}), "unknown key 'promt'"),
    ],
)
def test_a_bad_template_file_gets_one_line(tmp_path: Path, content: str, says: str):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(FlexLoraError) as error:
        load_template(str(path))
    assert says in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_template_name_says_which_is_near(tmp_path: Path):
    with pytest.raises(FlexLoraError, match="did you mean alpaca_short"):
        load_template("alpaca_shrt")
    with pytest.raises(FlexLoraError, match=r"nowhere\.json: cannot be read"):
        load_template(str(tmp_path / "nowhere.json"))


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [RECORD, Record("Say hi.", "", "Hi"), TALK])
def test_a_chat_prompt_is_the_tokenizers_own(bytes_tokenizer, merging_tokenizer, record: Record):
    for tokenizer in (bytes_tokenizer, merging_tokenizer):
        encoded = encode(record, CHAT, tokenizer, 1000)
        own = tokenizer.apply_chat_template(prompt_messages(record), add_generation_prompt=True, return_dict=False)
        assert list(encoded.input_ids[: encoded.response_start]) == own
        assert own == encode_prompt(record, CHAT, tokenizer, 1000, 10)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert end_of_turn(CHAT, tokenizer) == (end,)
        assert encoded.input_ids[-1] == end
        assert tokenizer.decode(encoded.input_ids[encoded.response_start : -1]) == record.output
        assert encoded.cut == 0


def test_the_end_of_turn_is_the_eos_token_where_the_chat_template_writes_no_special_token(bytes_tokenizer):
    plain = tiny_tokenizer()
    plain.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} .\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert end_of_turn(CHAT, plain) == (*plain(".", add_special_tokens=False).input_ids, plain.eos_token_id)
    assert end_of_turn(load_template("alpaca"), plain) == (plain.eos_token_id,)


@pytest.mark.parametrize("name", TEXT_TEMPLATES)
def test_no_token_lies_across_the_border_of_prompt_and_response(merging_tokenizer, name: str):
    template = load_template(name)
    prompt, response = render(template, RECORD)
    encoded = encode(RECORD, template, merging_tokenizer, 1000)
    apart = merging_tokenizer(prompt).input_ids  # with the bos that this tokenizer puts first
    assert apart[0] == merging_tokenizer.bos_token_id
    assert list(encoded.input_ids[: encoded.response_start]) == apart
    answer = merging_tokenizer(response, add_special_tokens=False).input_ids
    assert list(encoded.input_ids[encoded.response_start :]) == [*answer, merging_tokenizer.eos_token_id]
    together = merging_tokenizer(prompt + response).input_ids
    if name != "alpaca_legacy":
        assert together[: len(apart)] != apart  # the border does merge in this tokenizer: the test can fail
    assert encode_prompt(RECORD, template, merging_tokenizer, 1000, 10) == apart


@settings(max_examples=60)
@given(
    instruction=st.text("ab \n{}", min_size=1, max_size=80),
    output=st.text("xyz", min_size=1, max_size=60),
    cutoff=st.integers(8, 120),
    name=st.sampled_from(templates()),
)
def test_the_prompt_is_cut_and_never_the_answer(instruction: str, output: str, cutoff: int, name: str):
    tokenizer, template = tiny_tokenizer(), load_template(name)
    record = Record(instruction, "", output)
    whole = encode(record, template, tokenizer, 10**6)
    cut = encode(record, template, tokenizer, cutoff)
    answer = whole.input_ids[whole.response_start :]
    assert len(cut.input_ids) <= cutoff
    assert cut.cut == len(whole.input_ids) - len(cut.input_ids)
    if len(answer) <= cutoff:
        assert cut.input_ids[cut.response_start :] == answer
        prompt, kept = whole.input_ids[: whole.response_start], cut.input_ids[: cut.response_start]
        tail = len(kept) if len(kept) == len(prompt) else (cutoff - len(answer)) // 2
        assert kept == prompt[: len(kept) - tail] + prompt[len(prompt) - tail :]  # its start and its end stay
        if cut.cut:
            assert len(cut.input_ids) == cutoff
    else:
        assert cut.input_ids == answer[:cutoff]
        assert cut.response_start == 0


def test_a_prompt_for_generation_leaves_room(bytes_tokenizer):
    whole = encode_prompt(RECORD, CHAT, bytes_tokenizer, 1000, 24)
    short = encode_prompt(RECORD, CHAT, bytes_tokenizer, 60, 24)
    assert len(short) == 36
    assert short == whole[:18] + whole[-18:]
    with pytest.raises(FlexLoraError, match="within cutoff_len 24: lower max_new_tokens"):
        encode_prompt(RECORD, CHAT, bytes_tokenizer, 24, 24)


def test_a_conversation_in_a_text_template_and_chat_without_a_chat_template(bytes_tokenizer):
    prompt, response = render(load_template("alpaca_short"), TALK)
    assert prompt == "### Instruction:\nBe brief.\n\nColour of the sky?\n\n### Response:\n"
    assert response == "Blue."
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(FlexLoraError, match="no chat template: choose --prompt_template alpaca"):
        encode(RECORD, CHAT, bare, 100)
    bare.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(FlexLoraError, match=r"roles system, user \(no system role\)"):
        render(CHAT, TALK, bare)


def test_the_response_ends_at_the_first_stop_string():
    alpaca = load_template("alpaca")
    assert extract_response(alpaca, " dog, cat \n\n### Input:\nx ### Response: y") == "dog, cat"
    assert extract_response(alpaca, "### Response:") == ""
    assert extract_response(CHAT, " ### Response: yes\n") == "### Response: yes"


def test_the_cache_gives_the_same_tokens_and_stays_within_its_capacity(bytes_tokenizer, monkeypatch):
    records = [Record("Say it.", str(i), f"it {i}") for i in range(20)]
    plain = encode_all(records, CHAT, bytes_tokenizer, 64)
    cache = TokenCache(capacity=10 * 64)
    for _ in range(3):
        assert cache.encode_all(records, CHAT, bytes_tokenizer, 64) == plain
        assert cache.tokens <= cache.capacity
        assert 0 < len(cache) < 20
    recent = records[-len(cache) :]
    alpaca = load_template("alpaca_short")
    assert cache.encode_all(recent[-1:], alpaca, bytes_tokenizer, 64) == encode_all(
        recent[-1:], alpaca, bytes_tokenizer, 64
    )
    assert cache.encode_all(recent[-1:], CHAT, bytes_tokenizer, 40) == encode_all(
        recent[-1:], CHAT, bytes_tokenizer, 40
    )

    def tokenised_again(*_args: object) -> list[object]:
        if _args[0]:
            raise AssertionError("tokenised again")
        return []

    last = cache.encode_all(recent[-2:], CHAT, bytes_tokenizer, 64)
    monkeypatch.setattr("flexlora.prompts.encode_all", tokenised_again)
    assert cache.encode_all(recent[-2:], CHAT, bytes_tokenizer, 64) == last
    with pytest.raises(AssertionError, match="again"):
        cache.encode_all([Record("Say it.", "new", "new")], CHAT, bytes_tokenizer, 64)
    with pytest.raises(AssertionError, match="again"):  # another tokenizer, though it is alike
        cache.encode_all(recent[-2:], CHAT, tiny_tokenizer(), 64)


def test_the_cache_drops_the_examples_that_were_used_longest_ago(bytes_tokenizer):
    a, b, c, d = (Record("Say it.", name, name) for name in "abcd")
    size = len(encode(a, CHAT, bytes_tokenizer, 500).input_ids)
    cache = TokenCache(capacity=3 * size)
    for record in (a, b, c, a, d):  # d pushes b out, since a was used again
        cache.encode_all([record], CHAT, bytes_tokenizer, 500)
    assert len(cache) == 3
    with pytest.MonkeyPatch.context() as patch:
        tokenised: list[Record] = []

        def noted(records, *rest):
            tokenised.extend(records)
            return encode_all(records, *rest)

        patch.setattr("flexlora.prompts.encode_all", noted)
        for record in (a, c, d, b):
            cache.encode_all([record], CHAT, bytes_tokenizer, 500)
    assert tokenised == [b]
