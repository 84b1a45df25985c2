"""The model card that stands beside an exported adapter or model (README.md in the Hub's format)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flexlora.config import Config

TOP = "The best approximation of the global delta weight, every module at the largest rank that a client has for it."
USE = {
    "peft": "Load it over the opened base model: `PeftModel.from_pretrained(base_model, folder)`.",
    "transformers": "The adapter is merged into the weights: load the folder with `AutoModelForCausalLM.from_pretrained`.",
}


def about(config: Config, round: int) -> dict[str, Any]:
    """What flexlora.json says beside the weights: whose round they are of, and the lengths (tokens) with which the model was asked."""
    return {"round": round, "cutoff_len": config.cutoff_len, "max_new_tokens": config.max_new_tokens}


def model_card(
    config: Config, facts: Mapping[str, Any], line: Mapping[str, Any], what: str = TOP, library: str = "peft"
) -> str:
    """Markdown with method, ranks, training data, scores and privacy.

    Args:
        facts: ranks (label -> clients), clients, template.
        line: of metrics.jsonl, for the round whose model it is.
        what: one sentence that says which approximation the folder holds; the scores are those of `TOP`.
        library: peft for an adapter, transformers for a whole model.
    """
    kind = "LoRA adapter" if library == "peft" else "Model"
    training = {
        "method": config.method_name,
        "local training": f"{config.baseline} ({config.optimizer}), epochs a round: {config.epochs}",
        "ranks (label: clients)": ", ".join(f"{label}: {count}" for label, count in facts["ranks"].items()),
        "scaling of the clients": f"alpha {config.lora_alpha:g}, {config.lora_scaling}",
        "round": line.get("round", ""),
        "seed": config.seed,
    }
    # A JSON string is a YAML string too, whatever the model is called.
    return f"""---
base_model: {json.dumps(config.model, ensure_ascii=False)}
library_name: {library}
tags: [lora, federated-learning, flexlora]
---

# {kind} from {config.model}, trained in a federation

{what} {USE[library]}

## Training

{_table(training)}

## Data

{_table(_data(config, facts, line))}

## Scores

{_scores(line) if what == TOP else "Not scored at this rank: `flexlora evaluate` does it."}

## Privacy

{_privacy(config, line.get("privacy"))}
"""


def _table(facts: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def _data(config: Config, facts: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"clients": f"{facts['clients']}, {config.participation:.1%} of them a round"}
    # How much a single client has is nobody's business where privacy was asked for.
    counts = [] if line.get("privacy") else [client["examples"] for client in line.get("clients") or ()]
    if counts:
        told["training examples in this round"] = (
            f"{sum(counts)} of {len(counts)} clients, {min(counts)} to {max(counts)} each"
        )
    told["prompt template"] = facts["template"]
    told["loss on"] = "prompt and response" if config.train_on_inputs else "the response"
    told["longest example"] = f"{config.cutoff_len} tokens"
    return told


def _scores(line: Mapping[str, Any]) -> str:
    validation, held_out = line.get("validation") or {}, line.get("eval") or {}
    rows = {}
    # A loss on the clients' own examples has no noise on it: it is not published where privacy was asked for.
    if validation and not line.get("privacy"):
        rows["validation loss"] = f"{validation['loss']:.4f} (it chose the round)"
    if held_out:
        rows["held-out ROUGE-L"] = f"{held_out['rougeL']:.4f}"
        rows["held-out loss"] = f"{held_out['loss']:.4f}"
    return _table(rows) if rows else "This round was not scored."


def _privacy(config: Config, promise: Mapping[str, float] | None) -> str:
    where = (
        "The examples stayed at the sites; the server saw their adapters, example counts and losses."
        if config.runner == "flower"
        else "The federation was simulated: one owner had the examples of all clients."
    )
    if not promise:
        return f"{where} There is no differential privacy: the weights may give away examples that were trained on."
    return (
        f"{where} Differential privacy for a whole client: ε = {promise['epsilon']:.2f}, δ = {promise['delta']:.2g} "
        f"(noise {promise['noise']:g}, clip {promise['clip']:g}, sampling rate {promise['rate']:g})."
    )
