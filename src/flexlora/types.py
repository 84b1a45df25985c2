"""The vocabulary of flexlora: what a delta weight is, and what travels between server and client.

Shapes, once for the whole project: an adapted module has a base weight of shape ``(d_out, d_in)``;
a client of rank ``r`` holds ``A`` of shape ``(r, d_in)`` and ``B`` of shape ``(d_out, r)``, and its
delta weight is ``B @ A``. The scaling alpha/r is part of ``B`` everywhere outside `flexlora.modeling`.

This file imports no torch, so that the command line starts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor


def printable(text: object) -> str:
    """What somebody else says, fit for a terminal, a log and a page: one line without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).splitlines()))


class FlexLoraError(Exception):
    """Something the user can mend: the message is one line that names the option or file and the remedy."""

    def __init__(self, message: str) -> None:
        # What the message quotes (a key, a file's name) may hold a line break, or what makes a terminal obey.
        super().__init__(printable(message))


SEVEN_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block of the LLaMA kind, which are adapted unless others are named."""


class LowRank(NamedTuple):
    """One adapted module, factored: its delta weight is ``B @ A``.

    Column j of ``B`` and row j of ``A`` are one direction and keep their place on the whole way from
    the server to a client and back: nothing between training and a method re-factorises.
    """

    B: Tensor
    """(d_out, r): PEFT's lora_B times the scaling alpha/r (or alpha/sqrt(r))."""
    A: Tensor
    """(r, d_in): PEFT's lora_A as it is."""


class Sparse(NamedTuple):
    """One adapted module, sparse (SLoRA's first stage): ``delta.flatten()[index] = values``, zero elsewhere."""

    values: Tensor
    """(k,)"""
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    """(k,) int64, a prefix of one permutation per (seed, module); derived on both sides, it never travels."""
    shape: tuple[int, int]
    """(d_out, d_in)"""


Adapter: TypeAlias = Mapping[str, LowRank | Sparse]
"""Module name -> factors. A module that is missing is not adapted by this client."""

Ranks: TypeAlias = Mapping[str, int]
"""Module name -> rank, at least 1. A module that is missing is not adapted."""

Shapes: TypeAlias = Mapping[str, tuple[int, int]]
"""Module name -> (d_out, d_in)."""


@dataclass(frozen=True)
class ClientRule:
    """What a method asks of a client, as plain data: it travels, so that every runner obeys it. It may differ by round."""

    train: tuple[str, ...] = ("A", "B")
    """Parts that receive gradients: of ("A", "B"), or ("values",) for `Sparse`."""
    send: tuple[str, ...] = ("A", "B")
    """Parts that travel to the server; the engine fills the others in from what it sent."""
    keep: tuple[str, ...] = ()
    """Parts that live at the client from round to round (FedSA: B)."""
    prune: tuple[float, float, int] | None = None
    """HetLoRA's self-pruning: (lambda, gamma, smallest rank)."""


@dataclass(frozen=True)
class Download:
    """What one client gets at the start of a round."""

    adapter: Adapter
    """At the client's ranks."""
    base_delta: Mapping[str, LowRank]
    """One more low-rank term since the ORIGINAL base weights, never added into them (flora, fedex, florist)."""
    rule: ClientRule


@dataclass(frozen=True)
class ClientUpdate:
    """What one client gives back after local training."""

    client: int
    weight: float
    """Number of training examples, or 1.0; weights need not sum to 1."""
    adapter: Adapter
    """After training. Ranks may be smaller than assigned (hetlora); the engine's rank table follows."""
    sent: Adapter | None = None
    """What left the server for this client, after any cast; None: a method that needs it computes it again."""
    scaling: Mapping[str, float] = field(default_factory=dict)
    """alpha/r by module as trained; only hetlora's handle_alpha reads it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the client says of its training: train_loss, examples, tokens, cut, seconds, bytes_up, bytes_down. No method reads it."""
    round: int | None = None
    """The round that the client says it trained for."""
    base: str | None = None
    """Fingerprint of the base model that the client says it trained on."""


@dataclass(frozen=True)
class Method:
    """How updates become the global state and the global state an adapter: pure functions, no class tree.

    A state is any frozen dataclass with the fields ``round: int`` and ``seed: int``, whose other fields are tensors,
    `LowRank`, `Sparse`, JSON scalars, such dataclasses (slora), and mappings or tuples of them. One serializer
    checkpoints every method; it may only meet dataclasses that the state of `init` shows or that stand in its module.
    """

    init: Callable[..., Any]
    """``(shapes, seed, levels=()) -> State``: levels are the ranks that may occur. They bound work; what nobody could
    be given (raflora, slora's switch) may be dropped."""
    aggregate: Callable[[Any, Iterable[ClientUpdate]], Any]
    """``(State, updates) -> State``: one pass in the caller's order, nothing of the input is changed. No update: ValueError."""
    distribute: Callable[[Any, Ranks], Download]
    """``(State, Ranks) -> Download``: pure, called once per distinct ranks; it knows no client and no round."""
    delta: Callable[[Any], Mapping[str, LowRank]]
    """``(State) -> {module: LowRank}``: global model minus original base, for evaluation, export, energy; {} where personal."""
    equal_ranks: bool = False
    """True: unequal ranks are refused with the config, before anything is loaded."""
    personal: bool = False
    """True: there is no global model; each client is evaluated and exported by itself (fedsa)."""
    fixed_ranks: bool = False
    """True: clients have one of the ranks that `init` was given; no other can join later (raflora)."""
    start: Callable[[Any, Iterable[ClientUpdate]], Any] | None = None
    """As `aggregate`, for the one update that stands for an adapter to start from, where that differs (a server's step size,
    a turn of the factors); None: it does not."""
    figures: Callable[[Any], Mapping[str, float]] | None = None
    """``(State) -> {name: number}``: what a line of metrics.jsonl says of the round's state; None: nothing."""


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in one round: plain data, it travels inside a `TrainTask`."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 1e-3
    """Peak rate of the linear schedule, after any decay over rounds."""
    epochs: int = 1
    batch_size: int = 4
    """Examples of one optimiser step."""
    micro_batch_size: int = 2
    """Examples of one forward pass; the loss of a step does not depend on it, dropout's draws do."""
    warmup: int = 0
    """Optimiser steps of linear warm-up inside this local run."""
    cutoff_len: int = 512
    """Tokens of an example; a longer one loses the middle of its prompt, at last the end of its answer."""
    train_on_inputs: bool = True
    """True: the loss counts prompt and response; False: the response only."""
    group_by_length: bool = False
    alpha: float = 16.0
    scaling: Literal["alpha_over_r", "rslora"] = "alpha_over_r"
    """alpha/r or alpha/sqrt(r)."""
    dropout: float = 0.0
    template: str = "chat"
    """Name of a built-in prompt template, `chat`, or the path of a JSON template file."""


@dataclass(frozen=True)
class TrainTask:
    """One client's work in one round: plain data, so that the same function trains it in any process."""

    round: int
    client: int
    ranks: Ranks
    download: Download
    training: LocalTraining
    seed: int
    """Derived from (run seed, "train", round, client)."""
    base: str = ""
    """Fingerprint of the base model that the global model belongs to."""
    needed: tuple[int, ...] = ()
    """Rounds that the server may go on from: of what a client keeps, the rest may go. (): nothing is said."""


@dataclass(frozen=True)
class EvalTask:
    """Validation where the data are: loss on a client's own eval examples, of the global model or of what the client gets."""

    round: int
    client: int
    download: Download
    examples: int
    """At most that many of the client's eval examples."""


@dataclass(frozen=True)
class ClientInfo:
    """What is known of a client before it trains."""

    examples: int | None = None
    """Training examples; None where the client has not said yet."""
    rank: int | None = None
    """A rank that the site itself states (a federation)."""
    memory: int | None = None
    """Bytes that the site says it can spend on training."""


@dataclass(frozen=True)
class ClientScore:
    client: int
    loss_sum: float
    """Sum of the negative log likelihood over label tokens, in nats."""
    tokens: int
    examples: int


@dataclass(frozen=True)
class ClientFailure:
    client: int
    reason: str
    """One line."""


Levels: TypeAlias = Sequence[Ranks]
