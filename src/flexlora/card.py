"""The model card that stands beside an exported adapter (README.md in the Hub's format)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexlora.config import Config


def model_card(config: Config, facts: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    """Markdown with method, ranks, data and scores of the round whose metrics.jsonl line is given."""
    validation, held_out = line.get("validation") or {}, line.get("eval") or {}
    rows = [
        ("method", config.method_name),
        ("local training", f"{config.baseline} ({config.optimizer})"),
        ("ranks (label: clients)", ", ".join(f"{label}: {count}" for label, count in facts["ranks"].items())),
        ("scaling of the clients", f"alpha {config.lora_alpha:g}, {config.lora_scaling}"),
        ("clients", f"{facts['clients']}, {config.participation:.1%} a round"),
        ("round", line.get("round", "")),
        ("seed", config.seed),
        ("prompt template", facts["template"]),
    ]
    if validation:
        rows.append(("validation loss", f"{validation['loss']:.4f}"))
    if held_out:
        rows.append(("held-out ROUGE-L", f"{held_out['rougeL']:.4f}"))
        rows.append(("held-out loss", f"{held_out['loss']:.4f}"))
    if privacy := line.get("privacy"):
        promise = f"ε = {privacy['epsilon']:.2f}, δ = {privacy['delta']:.2g} for a whole client"
        rows.append(("differential privacy", f"{promise}; noise {privacy['noise']:g}, clip {privacy['clip']:g}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
base_model: {config.model}
library_name: peft
tags: [lora, federated-learning, flexlora]
---

# LoRA adapter of {config.model}, trained in a federation

The best rank approximation of the global delta weight, per module at the largest rank of any client.

| | |
|---|---|
{table}

Load it with `PeftModel.from_pretrained(base_model, folder)`. The training data stayed with the clients.
"""
