"""Dealing one file of examples out to clients: every example to exactly one client, the same for the same seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexlora.data.federation import permutation
from flexlora.data.tables import read_table
from flexlora.data.writing import Prepared, new_folder, split, write_client, write_manifest
from flexlora.randomness import derive
from flexlora.types import FlexLoraError

LEAST = 3
"""Examples that every client gets where there are enough: one each to train on, validate on and test on."""


def partition(
    source: str | Path,
    out: str | Path,
    clients: int,
    by: str = "iid",
    *,
    seed: int = 42,
    columns: Mapping[str, str] | None = None,
    drop_empty: bool = False,
) -> Prepared:
    """Write ``{out}/{clients}/local_*_{i}.json`` and `manifest.json` from one table (see `read_table`).

    `by` is one of the rules of `deal`. Each client's examples are split 80/10/10. Raises FlexLoraError, and leaves
    nothing behind, where the file or an option is not in order.
    """
    parse_rule(by)
    records, dropped = read_table(source, columns, drop_empty=drop_empty)
    dealt = deal([record.category for record in records], clients, by, seed)
    path = Path(source)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    with new_folder(Path(out)) as root:
        inner = root / str(clients)
        inner.mkdir()
        rows = []
        for client, members in enumerate(dealt):
            own = [records[place] for place in members]
            parts = split(own, seed, client)
            write_client(inner, client, parts)
            categories: dict[str, int] = {}
            for record in own:
                categories[record.category] = categories.get(record.category, 0) + 1
            counts = dict(zip(("training", "eval", "test"), map(len, parts), strict=True))
            rows.append({"client": client, **counts, "categories": categories})
        write_manifest(
            root,
            {
                "made by": "flexlora data partition",
                "source": path.name,
                "sha256": digest,
                "rows": len(records) + dropped,
                "dropped": dropped,
                "columns": dict(columns or {}),
                "by": by,
                "seed": seed,
                "clients": rows,
            },
        )
    return Prepared(Path(out), clients, sum(row["training"] for row in rows), 0, dropped)


def parse_rule(by: str) -> tuple[str, float]:
    """("iid" | "category" | "dirichlet" | "shards", its number). Raises FlexLoraError."""
    name, colon, text = by.partition(":")
    if name in ("iid", "category") and not colon:
        return name, 0.0
    try:
        number = float(text)
        if name == "dirichlet" and 0 < number < float("inf"):
            return name, number
        if name == "shards" and number >= 1 and number.is_integer():
            return name, number
    except (ValueError, OverflowError):
        pass
    raise FlexLoraError(f"--by {by}: choose iid, category, dirichlet:ALPHA (ALPHA > 0) or shards:K (K = 1, 2, …)")


def deal(categories: Sequence[str], clients: int, by: str, seed: int) -> list[list[int]]:
    """The examples of each client, as places in `categories`: a partition of them, no client left empty.

    iid: at random, sizes equal to within one.
    dirichlet:ALPHA: each category is shared out in proportions drawn from a symmetric Dirichlet distribution over the
        clients (Li et al., arXiv 2102.02079): the smaller ALPHA, the more skewed. Clients left with fewer than three
        examples get some from the largest.
    category: whole categories to the client with the fewest examples so far, the largest first; with more clients
        than categories, large categories are cut into near-equal parts.
    shards:K: sorted by category, cut into K shards a client, each client given K of them at random (McMahan et al.,
        arXiv 1602.05629).
    """
    name, number = parse_rule(by)
    n = len(categories)
    if clients < 1:
        raise FlexLoraError(f"--clients {clients}: must be at least 1")
    if n < clients:
        raise FlexLoraError(f"--clients {clients}: there are only {n} examples: choose fewer clients")
    if name == "iid":
        order = permutation(n, seed, "iid")
        return [order[client::clients] for client in range(clients)]
    if not any(categories):
        raise FlexLoraError(f"--by {by}: the examples have no category: name its column with --category")
    groups: dict[str, list[int]] = {}
    for place in permutation(n, seed, name):
        groups.setdefault(categories[place], []).append(place)
    groups = dict(sorted(groups.items()))
    if name == "dirichlet":
        return _dirichlet(groups, clients, number, seed)
    if name == "shards":
        return _shards(groups, clients, int(number), seed)
    return _by_category(groups, clients)


def _dirichlet(groups: Mapping[str, list[int]], clients: int, alpha: float, seed: int) -> list[list[int]]:
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for category, members in groups.items():
        rng = np.random.Generator(np.random.PCG64(derive(seed, "dirichlet", category)))
        # Gamma variates underflow to zero for a tiny alpha; Dirichlet then comes close to giving all to one client.
        gammas = rng.standard_gamma(alpha, clients)
        shares = gammas / gammas.sum() if gammas.sum() > 0 else np.eye(clients)[rng.integers(clients)]
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(int).clip(0, len(members))
        for client, part in enumerate(np.split(np.asarray(members), cuts)):
            dealt[client] += part.tolist()
    least = min(LEAST, sum(map(len, dealt)) // clients)
    for poor in dealt:
        while len(poor) < least:
            poor.append(max(dealt, key=len).pop())
    return dealt


def _shards(groups: Mapping[str, list[int]], clients: int, per_client: int, seed: int) -> list[list[int]]:
    ordered = [place for members in groups.values() for place in members]
    count = clients * per_client
    if len(ordered) < count:
        raise FlexLoraError(f"--by shards:{per_client}: {count} shards of only {len(ordered)} examples: lower K")
    edges = [len(ordered) * shard // count for shard in range(count + 1)]
    order = permutation(count, seed, "shards", "deal")
    return [
        [place for shard in sorted(order[client::clients]) for place in ordered[edges[shard] : edges[shard + 1]]]
        for client in range(clients)
    ]


def _by_category(groups: Mapping[str, list[int]], clients: int) -> list[list[int]]:
    by_size = sorted(groups, key=lambda category: (-len(groups[category]), category))
    parts = dict.fromkeys(by_size, 1)
    while sum(parts.values()) < clients:  # the category whose parts are largest gets one part more
        largest = max(by_size, key=lambda category: len(groups[category]) / parts[category])
        parts[largest] += 1
    dealt: list[list[int]] = [[] for _ in range(clients)]
    for category in by_size:
        for part in range(parts[category]):
            min(dealt, key=len).extend(groups[category][part :: parts[category]])
    return dealt
