"""What a network says at chosen positions, without holding the logits of all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flexlora.attention import Between, sharing
from flexlora.rows import Rows

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


def side_by_side(network: nn.Module) -> bool:
    """Whether several threads may pass through a network at once: on a processor, where a pass neither draws random numbers nor
    changes it.
    """
    config: Any = network.config
    keys = config.get_text_config().to_dict()
    rotary = keys.get("rope_parameters") or {}
    # One for all layers, or one for each type of them.
    kinds = [x for x in (rotary, *rotary.values()) if isinstance(x, Mapping)]
    changes = any(str(x.get("rope_type")) in ("dynamic", "longrope") for x in kinds)
    draws = any(("drop" in k or "jitter" in k) and isinstance(v, (int, float)) and v > 0 for k, v in keys.items())
    draws = draws or any(isinstance(x, nn.Dropout) and x.p > 0 for x in network.modules())
    return next(network.parameters()).device.type == "cpu" and not draws and not changes


@contextmanager
def logits_at(network: nn.Module, where: Tensor) -> Iterator[list[Tensor]]:
    """Have the next forward pass of this thread compute logits at the n positions `where` only, which then are (1, n, vocabulary).

    `where` is a bool mask (b, t), or numbers (n,) of positions in the flattened batch. Yields a list that receives all
    hidden states (b, t, d).
    """
    hidden: list[Tensor] = []
    with _at_head(network, where, lambda x: x, hidden):
        yield hidden


@contextmanager
def _at_head(
    network: nn.Module, where: Tensor, use: Callable[[Tensor], Tensor], hidden: list[Tensor] | None = None
) -> Iterator[None]:
    """Give the output layer, in this thread, what `use` makes of its input at the positions `where`, (1, n, d)."""
    mine = threading.get_ident()  # other threads may be passing through the same network

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # In front of the output layer, so that what an architecture does to its logits afterwards still happens.
        if threading.get_ident() != mine:
            return None
        if hidden is not None:
            hidden.append(args[0])
        return (use(args[0].flatten(0, 1)[where.flatten()][None]), *args[1:])

    hook = _head(network).register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def said(network: nn.Module, rows: Rows, between: Between | None = None) -> tuple[Tensor, nn.Linear | None]:
    """What the network says at the n positions `rows.keep`: (n, d) states and the output layer that makes logits of them.

    Where an architecture does more to its logits (a cap, a scale) they are (n, vocabulary) logits, and None. `between`: with the
    other half of a row that was cut in two.
    """
    more: dict[str, Any] = {"use_cache": False}
    if rows.shared is not None:
        device = rows.input_ids.device
        # Half a row attends without its mask, which is but a sign that the layer makes none of its own.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool) if between else rows.shared.mask(device)
        more |= {"position_ids": rows.shared.positions(device), "attention_mask": mask}
    head = bare_head(network)
    with (
        (logits_at if head is None else states_at)(network, rows.keep),
        sharing(rows.shared, more.get("attention_mask"), between),
    ):
        return network(input_ids=rows.input_ids, **more).logits.flatten(0, 1), head


def bare_head(network: nn.Module) -> nn.Linear | None:
    """The output layer of a network that returns what it gives as it is; None for another.

    One token is passed to find out, once, in evaluation mode: ask before several threads pass through the network.
    """
    if network not in _bare_heads:
        head = _head(network)
        first = torch.zeros(1, dtype=torch.long, device=head.weight.device)  # pyright: ignore[reportArgumentType, reportCallIssue]
        with inference(network), states_at(network, first) as states:
            bare = network(input_ids=first[None], use_cache=False).logits is states[0]
        _bare_heads[network] = head if bare and isinstance(head, nn.Linear) else None
    return _bare_heads[network]


_bare_heads: WeakKeyDictionary[nn.Module, nn.Linear | None] = WeakKeyDictionary()


@contextmanager
def states_at(network: nn.Module, where: Tensor) -> Iterator[list[Tensor]]:
    """As `logits_at`, but what its input at the n positions is takes the place of the output layer's output, (1, n, d)."""
    states: list[Tensor] = []
    mine = threading.get_ident()

    def answer(_: nn.Module, __: Any, ___: Any) -> Tensor | None:
        return states[0] if threading.get_ident() == mine else None

    def nothing(x: Tensor) -> Tensor:
        states.append(x)
        return x[:, :0]

    with _at_head(network, where, nothing):
        hook = _head(network).register_forward_hook(answer)
        try:
            yield states
        finally:
            hook.remove()


def _head(network: nn.Module) -> nn.Module:
    return network.get_output_embeddings()  # pyright: ignore[reportCallIssue, reportReturnType]


def pass_tokens(network: nn.Module) -> int:
    """Tokens of one reading pass at most."""
    return max(1, min(READ_TOKENS, LOGITS // int(_head(network).weight.shape[0])))  # pyright: ignore


def likeliest_tokens(network: nn.Module, hidden: Tensor) -> list[list[int]]:
    """The likeliest next token at every position of the output layer's input (b, t, d), logits held piece by piece."""
    best = [_head(network).forward(piece).argmax(-1) for piece in hidden.flatten(0, 1).split(PIECE)]
    return torch.cat(best).view(hidden.shape[:2]).tolist()
