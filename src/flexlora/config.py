"""The one configuration of a run: typed, flat, the same keys in YAML, as flags and in Python.

The names of the original FlexLoRA release are accepted as aliases. This file imports no torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from flexlora.maps import UNREADABLE, read_map
from flexlora.types import SEVEN_PROJECTIONS, FlexLoraError, LocalTraining

LEARNING_RATE = {"sgd": 0.5, "adamw": 1e-3}
"""Defaults by optimiser, from the sweep in docs/log.md; the release's 1e-6 learns nothing with LoRA."""

MOST = 2**63 - 1
"""The largest whole number that a key may have, as machines have them; seeds may be that large."""

DECAY_AFTER = 15
"""With lr_decay, rounds after this one train at half the learning rate."""


def key(default: Any, group: str, *aliases: str, **limits: Any) -> Any:
    """One configuration key: its default, the group it stands under in --help, and its old names."""
    return Field(default, json_schema_extra={"group": group, "aliases": list(aliases)}, **limits)


def _yaml_value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except UNREADABLE:
        raise ValueError(f"the value of {name} is no YAML; write a number, true, false or a word") from None


def _aliases(info: Any) -> tuple[str, ...]:
    return tuple((info.json_schema_extra or {}).get("aliases", ()))


class Config(BaseModel):
    """Everything that decides a run. Unset keys have the defaults shown; `auto` and null are chosen from the data and the model."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )

    model: str = key("smollm2", "Model", "global_model")
    """A Hugging Face name, a local folder, a GGUF file, or `smollm2` (the packaged default)."""
    precision: Literal["auto", "float32", "bfloat16", "float16", "nf4"] = key("auto", "Model")
    """Type of the base weights; auto: float32 on CPU, bfloat16 on a GPU."""
    device: str = key("auto", "Model")
    """auto, cpu, cuda, cuda:1, …"""
    cache_dir: Path | None = key(None, "Model")
    """Folder for converted models and data sets; null: the user's cache folder."""
    trust_remote_code: bool = key(False, "Model")
    """Let a model's own Python code run on this machine."""
    init_adapter: Path | None = key(None, "Model")
    """PEFT adapter folder (safetensors) that the global model starts from."""

    data: Path | None = key(None, "Data", "data_path")
    """Folder with `{num_clients}/local_training_{i}.json`, or that inner folder."""
    prompt_template: str = key("auto", "Data", "prompt_template_name")
    """alpaca, alpaca_legacy, alpaca_short, vigogne, chat (the tokenizer's own) or a JSON template file; auto: chat where there is
    one, else alpaca."""
    cutoff_len: int = key(512, "Data", ge=8)
    """Tokens of one example; a longer one loses the middle of its prompt, and where the answer alone is longer, all of the prompt and
    the answer's end."""
    train_on_inputs: bool = key(False, "Data")
    """Count the loss on the prompt too, not only on the response."""

    num_clients: int | None = key(None, "Federation", ge=1)
    """Clients of the federation; null: as many as the data folder has (1,613 in the paper)."""
    participation: float = key(0.05, "Federation", "client_selection_frac", gt=0, le=1)
    """Share of the clients that trains in a round."""
    rounds: int = key(50, "Federation", "num_communication_rounds", ge=1)
    """Communication rounds at most."""
    min_clients: int = key(1, "Federation", ge=1)
    """The fewest answers that a round needs; with fewer it is repeated with other clients."""
    max_rank: int | None = key(None, "Federation", ge=1)
    """The largest rank that a client may train."""
    max_examples: int | None = key(None, "Federation", ge=1)
    """The most training examples that a client may claim; its weight is capped there."""
    early_stop: bool = key(True, "Federation")
    """Stop when the validation loss has not improved for `patience` rounds."""
    patience: int = key(3, "Federation", ge=1)
    """Rounds without improvement before an early stop."""
    seed: int = key(42, "Federation", ge=0)
    """All randomness is derived from it."""

    method: str = key("auto", "Method")
    """How updates become the global model: see `flexlora methods`; auto: fedavg where ranks is homo, else flexlora."""
    baseline: Literal["fedavg", "fedit", "slora"] = key("fedit", "Method")
    """How a client trains: fedavg = SGD, fedit = AdamW, slora = AdamW with a sparse stage before the method."""
    ranks: str | dict[str, Any] = key("random", "Method", "aggregation")
    """homo, random, heavy_tail, heavy_tail_strong, normal (`:release` for the old shares), a YAML file or map with types and
    shares or clients, or auto: the largest that fits each client's stated memory (client_memory)."""
    client_memory: dict[str, Any] = key({}, "Method")
    """With ranks auto: client = memory for training, e.g. 0=2GB (or 2GiB, of 2³⁰ bytes each), with `default` for the others; each
    trains the largest rank type that fits."""
    method_options: dict[str, Any] = key({}, "Method")
    """Options of the method beyond the keys here, e.g. eta=0.5 (a map in YAML, key=value as a flag)."""
    sparse_rounds: int = key(5, "Method", "R_1", ge=1)
    """slora: rounds of its sparse first stage."""
    handle_alpha: bool = key(False, "Method")
    """hetlora: split alpha/r as its square root into both factors before averaging."""
    prune_lambda: float = key(1e-3, "Method", "lambd", ge=0)
    """hetlora: weight of the self-pruning penalty."""
    prune_gamma: float = key(0.99, "Method", gt=0, le=1)
    """hetlora: share of the rank that the penalty leaves alone."""

    lora_r: int = key(8, "LoRA", ge=1)
    """Rank of every client where ranks is homo."""
    lora_alpha: float = key(16.0, "LoRA", gt=0)
    """LoRA's alpha."""
    lora_scaling: Literal["alpha_over_r", "rslora"] = key("alpha_over_r", "LoRA")
    """alpha/r, or alpha/sqrt(r), with which large ranks learn as fast as small ones."""
    lora_dropout: float = key(0.05, "LoRA", ge=0, lt=1)
    """Dropout on the input of A while training."""
    lora_target_modules: tuple[str, ...] = key(SEVEN_PROJECTIONS, "LoRA")
    """Names (last parts) of the linear layers to adapt."""

    batch_size: int = key(4, "Local training", "local_batch_size", ge=1)
    """Examples of one optimiser step."""
    micro_batch_size: int = key(2, "Local training", "local_micro_batch_size", ge=1)
    """Examples of one forward pass; memory depends on it, the result only through dropout, which is drawn for each pass."""
    epochs: int = key(1, "Local training", "local_num_epochs", ge=1)
    """Passes over the client's data in one round."""
    learning_rate: float | None = key(None, "Local training", "local_learning_rate", gt=0)
    """Peak learning rate; null: 0.001 for AdamW, 0.5 for SGD."""
    warmup: int = key(0, "Local training", ge=0)
    """Optimiser steps of linear warm-up in each local run."""
    lr_decay: bool = key(False, "Local training")
    """Halve the learning rate after round 15."""
    group_by_length: bool = key(False, "Local training")
    """Batches of examples of like length: less padding, less random."""

    eval_every: int = key(5, "Evaluation", ge=0)
    """Generate and score global_test.json every so many rounds and after the last, then also the best one; 0: never."""
    eval_examples: int | None = key(None, "Evaluation", ge=1)
    """At most that many held-out examples; null: all."""
    max_new_tokens: int = key(64, "Evaluation", ge=1)
    """Tokens generated for one answer, at most."""
    eval_batch_size: int = key(32, "Evaluation", ge=1)
    """Examples of one batch in evaluation."""
    validation_examples: int = key(128, "Evaluation", ge=1)
    """Size of the fixed sample of the clients' local_eval files that early stop and the best round look at."""

    max_norm: float | None = key(None, "Trust", gt=0)
    """The largest norm of a client's increment (what it changed in the delta weights, over all modules); null: no bound."""
    norm_factor: float | None = key(50.0, "Trust", gt=0)
    """The largest norm of a client's increment in multiples of the median of those accepted before; null: no bound."""
    norm_action: Literal["reject", "clip"] = key("reject", "Trust")
    """What happens to a larger increment."""
    robust: bool = key(False, "Trust")
    """Bound what one client can do: in each round increments and weights are cut to their medians over the clients."""
    dp_noise: float | None = key(None, "Trust", gt=0, le=1e6)
    """Client-level differential privacy (ffa, flexlora, flexlora-carry): standard deviation of the noise in multiples of dp_clip;
    there is no early stop then, and the adapter is the last round's. null: none."""
    dp_clip: float = key(1.0, "Trust", gt=0, le=1e6)
    """Differential privacy: the norm to which a client's whole increment is clipped."""
    dp_delta: float | None = key(None, "Trust", gt=0, lt=1)
    """Differential privacy: the delta for which epsilon is told; null: num_clients to the power of -1.1."""

    runner: Literal["local", "ray", "flower"] = key("local", "Running")
    """Where clients train: this process, Ray workers, or a Flower federation."""
    workers: int = key(1, "Running", ge=1)
    """Clients that train at once, each in a process of its own where there are several."""
    ray_address: str | None = key(None, "Running")
    """Ray cluster to join (host:port, or auto); null: a Ray of its own on this machine."""
    worker_gpus: float = key(0.0, "Running", ge=0)
    """GPUs of one Ray worker; 0.5: two workers share one."""
    round_timeout: float | None = key(None, "Running", gt=0)
    """Federation: seconds that a round waits for its sites; null: twelve hours."""
    wire_dtype: Literal["float32", "bfloat16"] = key("float32", "Running")
    """Type in which adapters travel between server and client."""
    output_dir: Path = key(Path("runs"), "Running")
    """The run folder is `{output_dir}/{name}`."""
    name: str | None = key(None, "Running", "session_name")
    """Name of the run; null: method, ranks and seed."""
    resume_from: int | None = key(None, "Running", "resume_epoch", ge=0)
    """Go on with the run of this name from its checkpoint of this round; without a name, with the newest of these settings."""

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("a configuration is a map of keys to values")
        return new_names(given)

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """None may be a word, true is no number, and a number that no machine word holds is a slip."""
        if isinstance(value, str) and value.lower() in ("none", "null"):
            return None
        wanted = cls.model_fields[info.field_name or ""].annotation
        numeric = {int, float} & {wanted, *get_args(wanted)}
        if numeric and isinstance(value, bool):
            raise ValueError("must be a number, not true or false")
        if numeric and isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"must be a number of at most {MOST}")
        return value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            return value
        return tuple(
            name.strip(" '\"") for part in parts for name in str(part).strip("[]() ").split(",") if name.strip(" '\"")
        )

    @field_validator("method_options", "client_memory", mode="before")
    @classmethod
    def _paired(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): v for k, v in value.items()}  # a client's number is no text in YAML
        if not isinstance(value, (str, list, tuple)):
            return {} if value is None else value
        pairs = [
            part for item in ([value] if isinstance(value, str) else value) for part in str(item).split(",") if part
        ]
        if any("=" not in pair for pair in pairs):
            raise ValueError("write pairs as name=value")
        return {k.strip(): _yaml_value(k.strip(), v) for k, v in (pair.split("=", 1) for pair in pairs)}

    @field_validator("name")
    @classmethod
    def _one_folder(cls, value: str | None) -> str | None:
        if value is not None and (not value or value in (".", "..") or "/" in value or "\\" in value or "\0" in value):
            raise ValueError("a name is one folder name, without slashes")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.micro_batch_size > self.batch_size:
            object.__setattr__(self, "micro_batch_size", self.batch_size)
        return self

    @property
    def method_name(self) -> str:
        """The method's registered name, with `auto` resolved and slora's successor left out."""
        if self.method == "auto":
            return "fedavg" if self.ranks == "homo" else "flexlora"
        return self.method

    @property
    def optimizer(self) -> Literal["sgd", "adamw"]:
        return "sgd" if self.baseline == "fedavg" else "adamw"

    def local_training(self, round: int, template: str) -> LocalTraining:
        """The settings that clients of this round (counted from 1) train with."""
        rate = self.learning_rate if self.learning_rate is not None else LEARNING_RATE[self.optimizer]
        if self.lr_decay and round > DECAY_AFTER:
            rate /= 2
        return LocalTraining(
            optimizer=self.optimizer,
            learning_rate=rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            warmup=self.warmup,
            cutoff_len=self.cutoff_len,
            train_on_inputs=self.train_on_inputs,
            group_by_length=self.group_by_length,
            alpha=self.lora_alpha,
            scaling=self.lora_scaling,
            dropout=self.lora_dropout,
            template=template,
        )

    def dump(self) -> dict[str, Any]:
        """JSON-ready values under the new names."""
        return self.model_dump(mode="json")


def alias_table() -> dict[str, str]:
    """Every accepted spelling of a key -> its name: new names and old ones."""
    table: dict[str, str] = {}
    for name, info in Config.model_fields.items():
        for spelling in (name, *_aliases(info)):
            table[spelling] = name
    return table


def new_names(given: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """The same map under the new names of its keys. Raises FlexLoraError for an unknown key and for one given twice.

    Maps of which one wins over another are put under new names one by one, before they are merged.
    """
    where = f"{source}: " if source else ""
    known = alias_table()
    new: dict[str, Any] = {}
    for name, value in given.items():
        target = known.get(str(name))
        if target is None:
            near = get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`flexlora run --help` lists the keys"
            raise FlexLoraError(f"{where}unknown key {name}: {hint}")
        if target in new:
            old = f"it is the old name of {target}" if name != target else "once under its old name"
            raise FlexLoraError(f"{where}{name} is given twice ({old}): keep one of them")
        new[target] = value
    return new


def key_group(name: str) -> str:
    """The group under which --help shows a key."""
    extra = Config.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def key_aliases(name: str) -> tuple[str, ...]:
    """Old names of a key."""
    return _aliases(Config.model_fields[name])


def make_config(values: dict[str, Any], source: str = "") -> Config:
    """A checked Config. Raises FlexLoraError with one line that names the key and the remedy."""
    where = f"{source}: " if source else ""
    try:
        return Config(**values)
    except FlexLoraError as error:
        raise FlexLoraError(f"{where}{error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:1]) or "configuration"
        reason = first["msg"].removeprefix("Value error, ")
        given = reprlib.repr(first["input"]) if isinstance(first["input"], (dict, list)) else repr(first["input"])
        shown = given if len(given) < 60 else given[:57] + "…"
        raise FlexLoraError(f"{where}{name}: {reason[0].lower() + reason[1:]} (got {shown})") from None


def read_config(path: Path) -> dict[str, Any]:
    """The map in a YAML file. Raises FlexLoraError where there is no such file or no map in it."""
    values = read_map(path, f"a YAML file of configuration keys (to go on with a run: flexlora resume {path})")
    return {str(k): v for k, v in values.items()}
