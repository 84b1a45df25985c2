"""What a network says at chosen positions, without holding the logits of all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

READ_TOKENS = 2048
"""Tokens of one reading pass at most (or one row): bounds activations."""
LOGITS = 2**27
"""Logits of one pass at most (512 MB in float32), or those of one row."""
PIECE = 256
"""Positions whose logits are looked at together."""


@contextmanager
def inference(network: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; every module's mode is put back afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def logits_at(network: nn.Module, where: Tensor) -> Iterator[list[Tensor]]:
    """Have the next forward pass of this thread compute logits at the n positions `where` only, which then are (1, n, vocabulary).

    `where` is a bool mask (b, t), or numbers (n,) of positions in the flattened batch. Yields a list that receives all
    hidden states (b, t, d).
    """
    hidden: list[Tensor] = []
    mine = threading.get_ident()  # other threads may be passing through the same network

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # In front of the output layer, so that what an architecture does to its logits afterwards still happens.
        if threading.get_ident() != mine:
            return None
        hidden.append(args[0])
        return (args[0].flatten(0, 1)[where.flatten()][None], *args[1:])

    hook = _head(network).register_forward_pre_hook(select)
    try:
        yield hidden
    finally:
        hook.remove()


def _head(network: nn.Module) -> nn.Module:
    return network.get_output_embeddings()  # pyright: ignore[reportCallIssue, reportReturnType]


def pass_tokens(network: nn.Module) -> int:
    """Tokens of one reading pass at most."""
    return max(1, min(READ_TOKENS, LOGITS // int(_head(network).weight.shape[0])))  # pyright: ignore


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log likelihood (n,) in float64 of `labels` (n,) under `logits` (n, vocabulary)."""
    pieces = zip(logits.split(PIECE), labels.split(PIECE), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none").double() for x, y in pieces])


def likeliest_tokens(network: nn.Module, hidden: Tensor) -> list[list[int]]:
    """The likeliest next token at every position of the output layer's input (b, t, d), logits held piece by piece."""
    best = [_head(network).forward(piece).argmax(-1) for piece in hidden.flatten(0, 1).split(PIECE)]
    return torch.cat(best).view(hidden.shape[:2]).tolist()
