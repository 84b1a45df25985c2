"""Scores of the global model where the server has the base model and data: what early stop sees, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexlora import evaluation
from flexlora.card import about
from flexlora.config import Config
from flexlora.data.records import Record
from flexlora.modeling import Model
from flexlora.prompts import Template, TokenCache
from flexlora.saved import save_adapter
from flexlora.types import Adapter, LowRank


class ModelScorer:
    """Scores adapters on one base model: validation on a fixed sample, evaluation on held-out examples."""

    def __init__(
        self,
        model: Model,
        config: Config,
        template: Template,
        validation: Sequence[Record],
        held_out: Sequence[Record],
        card: Callable[[Mapping[str, Any]], str],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model, self.config, self.template = model, config, template
        self.validation, self.held_out = validation, held_out
        self.card, self.progress = card, progress
        self.tokens = TokenCache()

    def _loss(self, records: Sequence[Record], adapter: Adapter) -> evaluation.Loss:
        examples = self.tokens.encode_all(records, self.template, self.model.tokenizer, self.config.cutoff_len)
        self.model.attach(adapter)
        return evaluation.loss(
            self.model.network,
            examples,
            batch_size=self.config.eval_batch_size,
            train_on_inputs=self.config.train_on_inputs,
        )

    def validate(self, adapter: Adapter) -> Mapping[str, Any]:
        loss = self._loss(self.validation, adapter)
        return {"loss": loss.mean, "examples": len(loss.tokens), "tokens": sum(loss.tokens)}

    def evaluate(self, adapter: Adapter, by_rank: Mapping[str, Adapter]) -> Mapping[str, Any]:
        if not self.held_out:
            return {}
        loss_by_rank = {label: self._loss(self.held_out, smaller).mean for label, smaller in by_rank.items()}
        self.model.attach(adapter)
        scores = self.score(self.held_out)
        return {**scores.summary(), "loss_by_rank": loss_by_rank}

    def score(self, records: Sequence[Record]) -> evaluation.Scores:
        """Generate and score with what is attached to the model now."""
        return evaluation.score(
            self.model.network,
            self.model.tokenizer,
            records,
            self.template,
            cutoff_len=self.config.cutoff_len,
            max_new_tokens=self.config.max_new_tokens,
            batch_size=self.config.eval_batch_size,
            progress=self.progress,
        )

    def save(self, folder: Path, adapter: Mapping[str, LowRank], facts: Mapping[str, Any]) -> None:
        save_adapter(
            folder,
            adapter,
            base_model=self.config.model,
            kind=self.config.lora_scaling,
            alpha=self.config.lora_alpha,
            readme=self.card(facts),
            about=about(self.config, facts["round"]),
            template=self.template,
        )
