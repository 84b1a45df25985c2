"""Prompt templates as data: a record becomes a prompt and a response, and these become tokens.

The response starts where the template says and ends with the end-of-turn token; prompt and response are tokenised
apart, so that no token lies across the border, and generation starts from the very tokens that training saw.

A text template has the form of the original FlexLoRA release (from alpaca-lora): a JSON object with `prompt_input`
(fields ``{instruction}`` and ``{input}``), `prompt_no_input` (``{instruction}``) and `response_split`, the marker
after which the response stands. The template `chat` is the tokenizer's own chat template.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from string import Formatter
from typing import Any

from flexlora.types import FlexLoraError


@dataclass(frozen=True)
class Record:
    """One instruction example."""

    instruction: str
    input: str
    """May be empty."""
    output: str
    """The response that is trained on; the first of `references`."""
    category: str = ""
    references: tuple[str, ...] = ()
    """All accepted responses; empty means `output` alone."""
    messages: tuple[tuple[str, str], ...] | None = None
    """A conversation as (role, content), the last one the assistant's, equal to `output`; None: instruction and input."""


@dataclass(frozen=True)
class Template:
    """How a record becomes text. The prompts of `chat` are empty: the tokenizer holds them."""

    name: str
    description: str
    prompt_input: str
    prompt_no_input: str
    response_split: str
    stop: tuple[str, ...] = ()
    """A generated response ends before the first of these."""

    @property
    def is_chat(self) -> bool:
        return not self.prompt_input


@dataclass(frozen=True)
class Encoded:
    """One tokenised example: prompt tokens, then response tokens with the end-of-turn token."""

    input_ids: tuple[int, ...]
    response_start: int
    """Index of the first response token."""
    cut: int
    """Tokens left out so that the example fits the cutoff; 0 for most."""


def _markers(*texts: str) -> tuple[str, ...]:
    """The lines `### Something:` of a template, in order, each once."""
    return tuple(dict.fromkeys(m.strip() for text in texts for m in re.findall(r"^#{2,} .*?:", text, re.MULTILINE)))


def _built_in(name: str, description: str, head: tuple[str, str], fields: tuple[str, str, str], end: str) -> Template:
    instruction, input, response = fields
    start = f"{instruction}\n{{instruction}}\n\n"
    with_input = f"{head[0]}{start}{input}\n{{input}}\n\n{response}{end}"
    without = f"{head[1]}{start}{response}{end}"
    return Template(name, description, with_input, without, response, _markers(with_input))


_ENGLISH = ("### Instruction:", "### Input:", "### Response:")
_HEAD = (
    "You are given an instruction and an input that belongs to it. Reply with what the instruction asks for.\n\n",
    "You are given an instruction. Reply with what it asks for.\n\n",
)
_TETE = (
    "Voici une instruction et l'entrée à laquelle elle s'applique. Donne la réponse demandée.\n\n",
    "Voici une instruction. Donne la réponse demandée.\n\n",
)

CHAT = Template("chat", "The tokenizer's own chat template.", "", "", "")

_templates = {
    t.name: t
    for t in (
        CHAT,
        _built_in("alpaca", "Alpaca's markers after one sentence.", _HEAD, _ENGLISH, "\n"),
        _built_in("alpaca_legacy", "As alpaca, without a line break after the response marker.", _HEAD, _ENGLISH, ""),
        _built_in("alpaca_short", "The markers alone.", ("", ""), _ENGLISH, "\n"),
        _built_in(
            "vigogne",
            "French, with Vigogne's markers.",
            _TETE,
            ("### Instruction:", "### Entrée:", "### Réponse:"),
            "\n",
        ),
    )
}


def templates() -> tuple[str, ...]:
    """Names of the built-in templates."""
    return tuple(_templates)


def load_template(name_or_path: str) -> Template:
    """A built-in template by name, or any JSON file in the original's format.

    The file may add `description` and `stop` (a list of strings); without `stop`, generation stops at the lines
    ``### …:`` of the template. Raises FlexLoraError with one line for a name that does not exist, broken JSON, an
    unknown field in braces or a response marker that does not stand in the prompts.
    """
    if name_or_path in _templates:
        return _templates[name_or_path]
    path = Path(name_or_path)
    if path.suffix != ".json" and not path.is_file():
        near = get_close_matches(name_or_path, _templates, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(_templates)} or the path of a .json file"
        raise FlexLoraError(f"prompt template {name_or_path!r} does not exist: {hint}")
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise FlexLoraError(f"{path}: cannot be read ({error.strerror}): give the path of a template file") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FlexLoraError(f"{path}: not valid JSON in UTF-8 ({reason}): mend the template file") from None
    return _checked_template(path, data)


def _checked_template(path: Path, data: Any) -> Template:
    if not isinstance(data, dict):
        raise FlexLoraError(f"{path}: a template is a JSON object with prompt_input, prompt_no_input, response_split")
    keys = ("prompt_input", "prompt_no_input", "response_split")
    known = (*keys, "description", "stop")
    for key in keys:
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise FlexLoraError(
                f"{path}: {key} is missing or not a string: add it (a template needs {', '.join(keys)})"
            )
    for key in data:
        if key not in known:
            raise FlexLoraError(f"{path}: unknown key {key!r}: a template has {', '.join(known)}")
    if not isinstance(data.get("description", ""), str):
        raise FlexLoraError(f"{path}: description is not a string: write a sentence or leave it out")
    stop = data.get("stop")
    if stop is not None and not (isinstance(stop, list) and all(isinstance(s, str) and s for s in stop)):
        raise FlexLoraError(f"{path}: stop is not a list of non-empty strings: mend it or leave it out")
    for key, needed in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
        try:
            parsed = list(Formatter().parse(data[key]))
        except ValueError as error:
            raise FlexLoraError(f"{path}: {key} has an unbalanced brace ({error}): write {{{{ or }}}}") from None
        found = {field for _, field, _, _ in parsed if field is not None}
        for unknown in sorted(found - needed):
            raise FlexLoraError(f"{path}: unknown field {{{unknown}}} in {key}: it may hold {_fields(needed)}")
        if any(spec or conversion for _, _, spec, conversion in parsed):
            raise FlexLoraError(f"{path}: a field of {key} has a format: write {_fields(needed)} as they are")
        for missing in sorted(needed - found):
            raise FlexLoraError(f"{path}: {key} lacks the field {{{missing}}}: add it")
        if data["response_split"] not in data[key]:
            raise FlexLoraError(f"{path}: the response marker {data['response_split']!r} is not in {key}: add it there")
    if stop is None:
        stop = _markers(data["prompt_input"], data["prompt_no_input"], data["response_split"])
        stop = stop or (data["response_split"].strip(),)
    prompt_input, prompt_no_input, response_split = (data[key] for key in keys)
    return Template(path.stem, data.get("description", ""), prompt_input, prompt_no_input, response_split, tuple(stop))


def _fields(names: set[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in sorted(names, reverse=True))


def prompt_messages(record: Record) -> list[dict[str, str]]:
    """The conversation up to the response, as chat templates want it: an instruction record is one user message."""
    if record.messages is not None:
        return [{"role": role, "content": content} for role, content in record.messages[:-1]]
    content = f"{record.instruction}\n\n{record.input}" if record.input else record.instruction
    return [{"role": "user", "content": content}]


def render(template: Template, record: Record, tokenizer: Any = None) -> tuple[str, str]:
    """(prompt, response) as text, without any special token that the tokenizer adds at the start or the end.

    A text template shows a conversation as its messages in order, one paragraph each, in place of the instruction.
    `chat` needs the tokenizer; the prompt is then exactly ``apply_chat_template(..., add_generation_prompt=True)``.
    """
    if template.is_chat:
        return _chat_text(tokenizer, prompt_messages(record), add_generation_prompt=True), record.output
    if record.messages is not None:
        instruction = "\n\n".join(content for _, content in record.messages[:-1])
        return template.prompt_no_input.format(instruction=instruction), record.output
    if record.input:
        return template.prompt_input.format(instruction=record.instruction, input=record.input), record.output
    return template.prompt_no_input.format(instruction=record.instruction), record.output


def _chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise FlexLoraError(
            "prompt_template chat: this tokenizer has no chat template: choose --prompt_template alpaca"
        )
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())
        raise FlexLoraError(
            f"prompt_template chat: the tokenizer's chat template refuses a conversation of the roles {roles} "
            f"({reason}): mend the messages or choose --prompt_template alpaca"
        ) from error


def end_of_turn(template: Template, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a response: what the chat template writes after the assistant's text up to and with its
    special token, or the tokenizer's end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise FlexLoraError("the tokenizer has no end-of-sequence token: choose a model whose tokenizer has one")
    if not template.is_chat:
        return (tokenizer.eos_token_id,)
    answer = "flexlora"
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = _chat_text(tokenizer, conversation, add_generation_prompt=False)
    tail = text.rpartition(answer)[2].strip()
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids)
    for place, token in enumerate(ids):
        if token in special:
            return tuple(ids[: place + 1])
    return (*ids, tokenizer.eos_token_id)


def _start(template: Template, tokenizer: Any) -> list[int]:
    """The begin-of-sequence token where the tokenizer itself would put one before plain text. A chat template writes its own."""
    if template.is_chat or tokenizer.bos_token_id is None:
        return []
    ids = tokenizer("a").input_ids
    return [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: a text beyond the model's length is cut by us, not warned about.
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []


def _prompt_tokens(records: Sequence[Record], template: Template, tokenizer: Any) -> list[list[int]]:
    start = _start(template, tokenizer)
    prompts = [render(template, record, tokenizer)[0] for record in records]
    return [start + ids for ids in _tokens(tokenizer, prompts)]


def _fit(ids: list[int], room: int) -> list[int]:
    """At most `room` tokens: the middle is left out, so that the start (begin-of-sequence token, system message,
    instruction) and the end (end of the input, response marker) both stay."""
    if len(ids) <= room:
        return ids
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


def encode_all(records: Sequence[Record], template: Template, tokenizer: Any, cutoff_len: int) -> list[Encoded]:
    """Tokenise examples so that each has at most `cutoff_len` tokens.

    Where one is longer, the middle of its prompt is left out, never a token of its answer. Only an answer that is
    longer than the cutoff by itself loses its end (and with it the end-of-turn token) and stands without a prompt.
    """
    end = list(end_of_turn(template, tokenizer))
    prompts = _prompt_tokens(records, template, tokenizer)
    responses = _tokens(tokenizer, [record.output for record in records])
    result = []
    for prompt, answer in zip(prompts, responses, strict=True):
        response = (answer + end)[:cutoff_len]
        kept = _fit(prompt, cutoff_len - len(response))
        cut = len(prompt) + len(answer) + len(end) - len(kept) - len(response)
        result.append(Encoded((*kept, *response), len(kept), cut))
    return result


def encode(record: Record, template: Template, tokenizer: Any, cutoff_len: int) -> Encoded:
    """`encode_all` of one record."""
    return encode_all([record], template, tokenizer, cutoff_len)[0]


def encode_prompts(
    records: Sequence[Record], template: Template, tokenizer: Any, cutoff_len: int, room: int
) -> list[list[int]]:
    """Prompt tokens for generation, at most ``cutoff_len - room`` each, so that `room` new tokens fit behind them."""
    if room >= cutoff_len:
        raise FlexLoraError(
            f"max_new_tokens {room} leaves no prompt within cutoff_len {cutoff_len}: lower max_new_tokens"
        )
    return [_fit(ids, cutoff_len - room) for ids in _prompt_tokens(records, template, tokenizer)]


def encode_prompt(record: Record, template: Template, tokenizer: Any, cutoff_len: int, room: int) -> list[int]:
    """`encode_prompts` of one record."""
    return encode_prompts([record], template, tokenizer, cutoff_len, room)[0]


def extract_response(template: Template, text: str) -> str:
    """The answer in newly generated text (without the prompt): what stands before the first stop string, stripped."""
    ends = [place for place in map(text.find, template.stop) if place >= 0]
    return text[: min(ends, default=len(text))].strip()


class TokenCache:
    """Tokenised examples across rounds, by content, tokenizer, template and cutoff.

    Flat memory: the examples used last stay, `capacity` tokens in all at four bytes each (64 MB at most by default).
    """

    def __init__(self, capacity: int = 16_000_000) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._examples: OrderedDict[bytes, tuple[array[int], int, int]] = OrderedDict()
        self._tokenizers: dict[int, Any] = {}  # held, so that an id names one tokenizer for as long as the cache lives

    def __len__(self) -> int:
        return len(self._examples)

    def encode_all(
        self, records: Sequence[Record], template: Template, tokenizer: Any, cutoff_len: int
    ) -> list[Encoded]:
        """As `flexlora.prompts.encode_all`; only examples that are new are tokenised."""
        self._tokenizers[id(tokenizer)] = tokenizer
        context = repr((id(tokenizer), getattr(tokenizer, "chat_template", None), template, cutoff_len)).encode()
        keys = [_content_key(context, record) for record in records]
        new = {key: record for key, record in zip(keys, records, strict=True) if key not in self._examples}
        fresh = dict(zip(new, encode_all(list(new.values()), template, tokenizer, cutoff_len), strict=True))
        result = [fresh[key] if key in fresh else self._take(key) for key in keys]
        for key, encoded in fresh.items():
            self._examples[key] = (array("i", encoded.input_ids), encoded.response_start, encoded.cut)
            self.tokens += len(encoded.input_ids)
        while self.tokens > self.capacity:
            _, (ids, _, _) = self._examples.popitem(last=False)
            self.tokens -= len(ids)
        return result

    def _take(self, key: bytes) -> Encoded:
        self._examples.move_to_end(key)
        ids, start, cut = self._examples[key]
        return Encoded(tuple(ids), start, cut)


def _content_key(context: bytes, record: Record) -> bytes:
    content = (record.instruction, record.input, record.output, record.messages)
    return hashlib.blake2b(context + repr(content).encode("utf-8", "backslashreplace"), digest_size=16).digest()
