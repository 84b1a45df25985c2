"""What is saved of a trained model: an adapter's folder in PEFT's format, or a whole model's, and what flexlora says beside it.

Here B is divided by the scaling that PEFT will apply, or gets it back. Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexlora.modeling import Model, Scaling, scaling, without_bars
from flexlora.prompts import Template, load_template, templates
from flexlora.types import FlexLoraError, LowRank, Shapes

WEIGHTS, CONFIG, ABOUT = "adapter_model.safetensors", "adapter_config.json", "flexlora.json"
TEMPLATE = "prompt_template.json"
"""A template that is no built-in one, beside the model that was trained in it: the folder can then go elsewhere."""
REBASING = ("pissa", "corda", "olora", "loftq")
"""Initialisations with which PEFT changes the base weights, when it loads an adapter too."""
_PREFIX = "base_model.model."


def save_adapter(
    folder: str | Path,
    adapter: Mapping[str, LowRank],
    *,
    base_model: str,
    kind: Scaling = "alpha_over_r",
    alpha: float = 16.0,
    readme: str | None = None,
    about: Mapping[str, Any] | None = None,
    template: Template | None = None,
) -> None:
    """Write an adapter in PEFT's format, ranks by module in rank_pattern; `PeftModel.from_pretrained` loads it.

    B is divided by the scaling that PEFT will apply. A module of rank 0 is left out, as PEFT knows none; where all are,
    they are written at rank 1 with zeros. `about` and the prompt template: what flexlora.json beside it says, which PEFT does not
    read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {m: x for m, x in adapter.items() if len(x.A)}
    if not kept:
        kept = {m: LowRank(x.B.new_zeros(len(x.B), 1), x.A.new_zeros(1, x.A.shape[1])) for m, x in adapter.items()}
    tensors: dict[str, Tensor] = {}
    for module, x in kept.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = x.A.contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = (x.B / scaling(alpha, len(x.A), kind)).contiguous()
    ranks = {m: len(x.A) for m, x in kept.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": alpha,
        "use_rslora": kind == "rslora",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
        "rank_pattern": {m: r for m, r in ranks.items() if r != common},
        "alpha_pattern": {},
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _save_about(folder, about, template)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")


def _save_about(folder: Path, about: Mapping[str, Any] | None, template: Template | None) -> None:
    """Say in flexlora.json what is known of a model, its prompt template by name, or as a file that goes along."""
    if template is not None:
        built_in = template.name in templates() and load_template(template.name) == template
        about = {**(about or {}), "prompt_template": template.name if built_in else TEMPLATE}
        if not built_in:
            parts = {name: part for name, part in asdict(template).items() if name != "name"}
            (folder / TEMPLATE).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")
    if about is not None:
        (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")


def load_adapter(folder: str | Path, shapes: Shapes | None = None) -> dict[str, LowRank]:
    """Read a PEFT LoRA folder: module -> B (d_out, r), each module's scaling folded in, and A (r, d_in), float32; in the order of
    `shapes`. Only safetensors and JSON are read.

    Raises FlexLoraError for a folder that is no plain LoRA adapter, or does not fit `shapes` where they are given.
    """
    folder = Path(folder)
    config, tensors = _read(folder)
    patterns = _plain(folder, config)
    kind = "rslora" if config.get("use_rslora") else "alpha_over_r"
    adapter: dict[str, LowRank] = {}
    for module, x in _pairs(folder, tensors):
        shape, rank = (len(x.B), x.A.shape[1]), len(x.A)
        if shapes is not None and shapes.get(module) != shape:
            raise FlexLoraError(
                f"{folder}/{WEIGHTS}: {module} of shape {shape} does not fit the model "
                f"({shapes.get(module, 'not adapted')}); use the base model {config.get('base_model_name_or_path')}"
            )
        alpha = _pattern(patterns, module, config.get("lora_alpha", 8)) if isinstance(patterns, dict) else None
        if not isinstance(alpha, int | float) or not math.isfinite(alpha) or not rank:
            raise FlexLoraError(
                f"{folder}/{CONFIG}: lora_alpha or rank of {module} is no number above 0; save the adapter again"
            )
        adapter[module] = LowRank(x.B.float() * scaling(alpha, rank, kind), x.A.float())
    return adapter if shapes is None else {m: adapter[m] for m in shapes if m in adapter}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder."""
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        remedy = (
            f"save it again with safe_serialization, .bin files are never opened; {WEIGHTS}" if pickled else WEIGHTS
        )
        raise FlexLoraError(f"{folder}: no adapter in safetensors here: {remedy} is needed")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no object")
    # Shapes that no tensor can have, types that torch does not know and JSON without end have errors of their own.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FlexLoraError(
            f"{folder}: {CONFIG} or {WEIGHTS} cannot be read ({reason}); save the adapter again"
        ) from error
    return config, tensors


def _plain(folder: Path, config: Mapping[str, Any]) -> Any:
    """The alpha_pattern of a configuration that says nothing but plain LoRA; what else PEFT can say is refused."""
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("bias", "none") != "none":
        raise FlexLoraError(
            f"{folder}/{CONFIG}: only plain LoRA without DoRA and bias can be read; train such an adapter"
        )
    if str(start := config.get("init_lora_weights")).lower().startswith(REBASING):
        raise FlexLoraError(
            f"{folder}/{CONFIG}: init_lora_weights {start!r} changes the base weights too; save it as plain LoRA "
            "(PEFT's path_initial_model_for_weight_conversion) or train such an adapter"
        )
    if config.get("alora_invocation_tokens"):
        raise FlexLoraError(
            f"{folder}/{CONFIG}: an adapter that waits for alora_invocation_tokens cannot be read; train one without them"
        )
    patterns = config.get("alpha_pattern") or {}
    for key in patterns if isinstance(patterns, dict) else ():
        if not re.fullmatch(r"\^?[\w.-]+", key):
            raise FlexLoraError(
                f"{folder}/{CONFIG}: alpha_pattern has the regular expression {key!r}; write modules' names or their last parts"
            )
    return patterns


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, LowRank]]:
    """(module, its lora_B and lora_A as they are)."""
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            if not (key.endswith(".lora_B.weight") and key.replace(".lora_B.", ".lora_A.") in tensors):
                raise FlexLoraError(
                    f"{folder}/{WEIGHTS}: {key} is no LoRA factor; only plain LoRA adapters can be read"
                )
            continue
        module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        B = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if B is None or B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise FlexLoraError(
                f"{folder}/{WEIGHTS}: {module} has no lora_B that fits its lora_A; save the adapter again"
            )
        yield module, LowRank(B, A)


def _pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule without its regular expressions: a key is a module's whole name, with "^" no less, or its last parts."""
    for key, value in pattern.items():
        if module == key.removeprefix("^") or module.endswith(f".{key}"):
            return value
    return default


def save_merged(
    model: Model,
    adapter: Mapping[str, LowRank],
    base_delta: Mapping[str, LowRank],
    folder: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    template: Template | None = None,
) -> None:
    """Write a standalone Hugging Face folder whose weights are W + base_delta + B A, with the tokenizer; `model` is left as is.

    `about` and `template` as in `save_adapter`.
    """
    network = model.network
    state = dict(network.state_dict())
    for module in model.shapes:
        terms = [x for x in (adapter.get(module), base_delta.get(module)) if x is not None and len(x.A)]
        if terms:
            weight = state[f"{module}.weight"]
            delta = sum(((x.B.double() @ x.A.double()) for x in terms), torch.zeros(()))
            state[f"{module}.weight"] = (weight.double() + delta.to(weight.device)).to(weight.dtype)
    with without_bars():
        network.save_pretrained(folder, state_dict=state)
    try:
        model.tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None  # all that tokenizers says of a disk that refuses
    _save_about(Path(folder), about, template)
