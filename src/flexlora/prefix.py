"""A prefix that several sequences share, run through the network once, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prefix:
    """Keys and values of tokens that several sequences share, with gradients: the tokens are computed once, not n times.

    The sequences' gradients gather in copies that are leaves, so that they may come in several micro-batches; `backward`
    then sends their sum through the prefix.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        """`layers`: keys and values of each layer, (1, heads, length, head size)."""
        self._source = layers
        self._leaves = [
            tuple(x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled()) for x in pair)
            for pair in layers
        ]

    @property
    def leaves(self) -> list[Tensor]:
        """Where gradients gather: keys and values, layer after layer."""
        return [leaf for pair in self._leaves for leaf in pair if leaf.requires_grad]

    def cache(self, count: int) -> Any:
        """A transformers cache in which `count` sequences have this prefix behind them."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._leaves):
            cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), layer)
        return cache

    def backward(self, loss: Tensor | None = None) -> None:
        """Gradients of everything that used the prefix, and of the prefix tokens' own `loss`."""
        pairs = [
            (x, leaf.grad)
            for source, leaves in zip(self._source, self._leaves, strict=True)
            for x, leaf in zip(source, leaves, strict=True)
            if leaf.grad is not None
        ]
        tensors: list[Tensor] = [x for x, _ in pairs]
        gradients: list[Tensor | None] = [grad for _, grad in pairs]
        if loss is not None:
            tensors.append(loss)
            gradients.append(None)
        if tensors:
            torch.autograd.backward(tensors, gradients)


def plain_attention(network: Any) -> bool:
    """Whether every layer keeps all keys and values and nothing else: no sliding window, no recurrent state."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=network.config).layers
    return len(layers) == network.config.get_text_config().num_hidden_layers and all(
        type(x) is DynamicLayer for x in layers
    )
