"""Who trains at which rank: rank types, named distributions of them, and the assignment client -> ranks.

A rank type gives a rank to every adapted module. Types are drawn once per client from the run's seed, so that the
assignment depends neither on who is sampled nor on how many clients there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexlora.maps import read_map
from flexlora.randomness import derive
from flexlora.types import FlexLoraError, Ranks, Shapes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REST = "*"

PAPER_TYPES: dict[str, dict[str, int]] = {
    "type_1": {REST: 8},
    "type_2": {REST: 30},
    "type_3": {**dict.fromkeys(ATTENTION, 30), REST: 200},
    "type_4": {REST: 200},
}
"""The paper's four configurations, smallest first (its release calls them Type_0, Type_3, Type_2, Type_1)."""

SMALL_TYPES: dict[str, dict[str, int]] = {
    "type_1": {REST: 4},
    "type_2": {REST: 16},
    "type_3": {**dict.fromkeys(ATTENTION, 16), REST: 48},
    "type_4": {REST: 48},
}
"""The same four steps for models of hidden size below 1,024."""

PAPER_HIDDEN_SIZE = 1024

DISTRIBUTIONS: dict[str, tuple[float, float, float, float]] = {
    "random": (0.25, 0.25, 0.25, 0.25),
    "heavy_tail": (0.85, 0.05, 0.05, 0.05),
    "heavy_tail_strong": (0.05, 0.05, 0.05, 0.85),
    "normal": (0.0575, 0.4425, 0.4425, 0.0575),
    "heavy_tail:release": (0.80, 0.05, 0.05, 0.10),
    "heavy_tail_strong:release": (0.05, 0.05, 0.10, 0.80),
    "normal:release": (0.0575, 0.0575, 0.4425, 0.4425),
}
"""Shares of the types 1 to 4. Plain names follow the paper's README, `:release` the shares in the published code."""


@dataclass(frozen=True)
class RankPlan:
    """Rank types and how clients get theirs: by share, or named client by client."""

    types: Mapping[str, Mapping[str, int]]
    """Type name -> {last part of a module's name, or "*" for the others: rank}."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Type name -> probability; they sum to 1."""
    clients: Mapping[int, str] = field(default_factory=dict)
    """Clients whose type is fixed."""
    written: frozenset[str] = frozenset()
    """Types that the user wrote: their module names are checked against the model."""

    def type_of(self, client: int, seed: int) -> str:
        """The client's type. Raises FlexLoraError where it is neither named nor can be drawn."""
        if client in self.clients:
            return self.clients[client]
        if not self.shares:
            raise FlexLoraError(f"ranks: client {client} has no rank type; name it under clients, or give shares")
        draw = derive(seed, "rank", client) / 2**63
        for name, share in self.shares.items():
            draw -= share
            if draw < 0:
                return name
        return list(self.shares)[-1]


def named_plan(name: str, *, lora_r: int, hidden_size: int) -> RankPlan:
    """The plan of `homo` or of a named distribution; models of hidden size below 1,024 get the scaled types."""
    if name == "homo":
        return RankPlan({"homo": {REST: lora_r}}, {"homo": 1.0})
    types = PAPER_TYPES if hidden_size >= PAPER_HIDDEN_SIZE else SMALL_TYPES
    return RankPlan(types, dict(zip(types, DISTRIBUTIONS[name], strict=True)))


def _as_type(spec: Any, where: str) -> dict[str, int]:
    rows = {REST: spec} if isinstance(spec, int) else spec
    if not isinstance(rows, dict) or not rows:
        raise FlexLoraError(f"ranks: {where} is {spec!r}; write a rank, or a map of module names to ranks")
    for module, rank in rows.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise FlexLoraError(f"ranks: {where}, {module}: rank {rank!r}; write a whole number from 1")
    return {str(module): rank for module, rank in rows.items()}


def map_plan(given: Mapping[str, Any], *, lora_r: int, hidden_size: int) -> RankPlan:
    """The plan of a YAML map with the keys types, shares, distribution, clients (all optional but one of the last three).

    `clients` maps a client's number to a type's name or straight to its ranks. `distribution` is a named one over four types.
    """
    unknown = set(given) - {"types", "shares", "distribution", "clients"}
    if unknown:
        raise FlexLoraError(f"ranks: unknown key {min(map(str, unknown))}; use types, shares, distribution, clients")
    for name in ("types", "shares", "clients"):
        if given.get(name) and not isinstance(given[name], Mapping):
            raise FlexLoraError(f"ranks: {name} is no map; write `name: value`, one a line")
    default = named_plan("random", lora_r=lora_r, hidden_size=hidden_size).types
    types: dict[str, Mapping[str, int]] = (
        {str(n): _as_type(s, f"type {n}") for n, s in given["types"].items()} if given.get("types") else dict(default)
    )
    shares: dict[str, float] = {}
    if "distribution" in given and given.get("shares"):
        raise FlexLoraError("ranks: both distribution and shares say how many have each type; keep one of them")
    if "distribution" in given:
        name = given["distribution"]
        if not isinstance(name, str) or name not in DISTRIBUTIONS or len(types) != 4:
            known = ", ".join(DISTRIBUTIONS)
            raise FlexLoraError(
                f"ranks: distribution {name!r} over {len(types)} types; give four types and one of {known}"
            )
        shares = dict(zip(types, DISTRIBUTIONS[name], strict=True))
    if given.get("shares"):
        for name, share in given["shares"].items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise FlexLoraError(f"ranks: the share of {name} is {share!r}; write a number from 0 to 1")
        shares = {str(n): float(s) for n, s in given["shares"].items()}
        stray = set(shares) - set(types)
        if stray:
            raise FlexLoraError(f"ranks: shares name {min(stray)}, which is not among the types {', '.join(types)}")
        if min(shares.values()) < 0 or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
            raise FlexLoraError(f"ranks: shares sum to {sum(shares.values()):g}; they must be positive and sum to 1")
    clients: dict[int, str] = {}
    for client, spec in (given.get("clients") or {}).items():
        if not isinstance(client, int) and not str(client).isdecimal():
            raise FlexLoraError(f"ranks: clients names {client!r}; write the client's number")
        if isinstance(spec, str):
            if spec not in types:
                raise FlexLoraError(f"ranks: client {client} has type {spec}, which is not among {', '.join(types)}")
            clients[int(client)] = spec
        else:
            label = f"client_{client}"
            if label in types:
                raise FlexLoraError(
                    f"ranks: client {client} has ranks of its own, which are called {label}, as one of the types is; rename that type"
                )
            types[label] = _as_type(spec, f"client {client}")
            clients[int(client)] = label
    if not shares and not clients:
        raise FlexLoraError("ranks: the map gives types but nobody gets one; add shares, distribution or clients")
    written = frozenset(given.get("types") or ()) | {f"client_{client}" for client in clients}
    return RankPlan(types, shares, clients, frozenset(map(str, written)))


def read_plan(ranks: str | Mapping[str, Any], *, lora_r: int, hidden_size: int) -> RankPlan:
    """The plan of the configuration key `ranks`: a distribution's name, a YAML file, or its map."""
    if not isinstance(ranks, str):
        return map_plan(ranks, lora_r=lora_r, hidden_size=hidden_size)
    if ranks == "homo" or ranks in DISTRIBUTIONS:
        return named_plan(ranks, lora_r=lora_r, hidden_size=hidden_size)
    path = Path(ranks)
    if not path.is_file():
        raise FlexLoraError(f"ranks: {ranks!r} is neither a file nor one of homo, {', '.join(DISTRIBUTIONS)}")
    return map_plan(read_map(path, "a map of types, shares and clients"), lora_r=lora_r, hidden_size=hidden_size)


def resolve(
    rank_type: Mapping[str, int], shapes: Shapes, max_rank: int | None = None
) -> tuple[Ranks, Mapping[str, int]]:
    """A rank for every module of `shapes`, clipped to min(d_out, d_in) and max_rank, and the ranks that were clipped.

    A module that no row of the type covers is not adapted; a row that covers no module does nothing (see `refuse_stray`).
    """
    ranks: dict[str, int] = {}
    clipped: dict[str, int] = {}
    for module, shape in shapes.items():
        wanted = rank_type.get(module, rank_type.get(module.rsplit(".", 1)[-1], rank_type.get(REST)))
        if wanted is None:
            continue
        ranks[module] = min(wanted, *shape, *([max_rank] if max_rank else []))
        if ranks[module] < wanted:
            clipped[module] = wanted
    return ranks, clipped


def refuse_stray(plan: RankPlan, shapes: Shapes) -> None:
    """Raise FlexLoraError where a plan written by the user has a row that covers no adapted module: a slip of the pen."""
    names = {module.rsplit(".", 1)[-1] for module in shapes}
    for kind, rows in plan.types.items():
        for row in rows:
            if kind in plan.written and row not in (REST, *names, *shapes):
                raise FlexLoraError(
                    f"ranks: type {kind} names {row}, which is no adapted module; the model has {', '.join(sorted(names))}"
                )


def distinct(table: Iterable[Ranks]) -> tuple[Ranks, ...]:
    """The different rank configurations of a table, smallest first by their sum."""
    seen: dict[tuple[tuple[str, int], ...], Ranks] = {}
    identities: set[int] = set()
    for ranks in table:
        if id(ranks) not in identities:
            identities.add(id(ranks))
            seen.setdefault(tuple(ranks.items()), ranks)
    return tuple(sorted(seen.values(), key=lambda r: (sum(r.values()), tuple(r.values()))))


def largest(table: Iterable[Ranks]) -> Ranks:
    """Per module the largest rank of the table: what the global model is scored and exported at."""
    top: dict[str, int] = {}
    for ranks in distinct(table):
        for module, rank in ranks.items():
            top[module] = max(top.get(module, 0), rank)
    return top


def label(ranks: Ranks) -> str:
    """A short name of a rank configuration for people and logs: its distinct ranks in the order in which modules have them.

    "8"; "16+48" where the first modules have 16, "48+16" where they have 48; "3…17" for more than three ranks.
    """
    values: Sequence[int] = list(dict.fromkeys(ranks.values()))
    return "+".join(map(str, values)) if len(values) <= 3 else f"{min(values)}…{max(values)}"


def labelled(table: Iterable[Ranks]) -> dict[str, Ranks]:
    """Label -> the configuration of a table that stands for it, smallest first: of several with one label the smallest.

    Clients that prune by module soon have a configuration each; what is computed for each of a table keeps to these.
    """
    kinds: dict[str, Ranks] = {}
    for ranks in distinct(table):
        kinds.setdefault(label(ranks), ranks)
    return kinds


def counts(table: Iterable[Ranks]) -> dict[str, int]:
    """Label -> number of clients, smallest ranks first; configurations of one label are counted together."""
    sorted_table = sorted(table, key=lambda r: (sum(r.values()), tuple(r.values())))
    return dict(Counter(label(ranks) for ranks in sorted_table))
