"""What rounds without any training do to the global delta weight W.

    python benchmarks/collapse.py            # both tables, some seconds

Four clients, one of each rank type, weighted by the type's share of the data, give back exactly what they were sent.
W starts with the spectrum of a product of Gaussian factors, (2048, 200) @ (200, 2048): what a q_proj of the paper's
1.3 B model would hold at rank 200 without any structure. The ranks are those of the paper's four types in an attention
projection: 8, 30, 30, 200. Singular vectors do not matter, so the methods really run on a 224 x 208 matrix.

Table 1: share of ‖W‖² beyond rank 8 after 0 … 4 rounds of flexlora. Table 2: ‖W_4 − W_0‖ / ‖W_0‖ for every method
that keeps one global model and takes unequal ranks; fedavg and fedex at rank 200 for all.
"""

from __future__ import annotations

from functools import cache

import torch

from flexlora import lowrank
from flexlora.methods import get_method
from flexlora.ranks import DISTRIBUTIONS
from flexlora.types import ClientUpdate, LowRank, Method

RANKS = (8, 30, 30, 200)
SHAPE = (224, 208)
Q = "q_proj"
METHODS: dict[str, Method] = {
    "fedavg (equal ranks)": get_method("fedavg"),
    "flexlora": get_method("flexlora"),
    "flexlora-carry": get_method("flexlora-carry"),
    "raflora": get_method("raflora"),
    "hetlora": get_method("hetlora"),
    "flora": get_method("flora"),
    "fedex (equal ranks)": get_method("fedex"),
    "ffa": get_method("ffa"),
    "ffa, increments": get_method("ffa", increments=True),
    "rolora": get_method("rolora"),
    "rolora, increments": get_method("rolora", increments=True),
    "rbla": get_method("rbla"),
    "florist, threshold 1": get_method("florist", threshold=1.0),
}


@cache
def gaussian_spectrum(size: int = 2048, rank: int = 200) -> torch.Tensor:
    """(rank,) singular values of a product of two Gaussian factors, scaled to norm 1."""
    g = torch.Generator().manual_seed(0)
    B, A = (torch.randn(size, rank, generator=g, dtype=torch.float64) for _ in range(2))
    S = torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A)[1].T)
    return S / S.norm()


def starting(method: Method, spectrum: torch.Tensor) -> tuple[object, LowRank]:
    """A state whose global delta weight has that spectrum, and W itself."""
    g = torch.Generator().manual_seed(1)
    U, V = (torch.linalg.qr(torch.randn(n, len(spectrum), generator=g, dtype=torch.float64))[0] for n in SHAPE)
    x = LowRank((U * spectrum).float(), V.T.float().contiguous())
    state = method.init({Q: SHAPE}, 0, [{Q: r} for r in sorted(set(RANKS))])
    return method.aggregate(state, [ClientUpdate(0, 1.0, {Q: x})]), x


def idle_round(method: Method, state: object, shares: tuple[float, ...]) -> object:
    ranks = (RANKS[-1],) * len(RANKS) if method.equal_ranks else RANKS
    sent = [method.distribute(state, {Q: r}).adapter for r in ranks]
    return method.aggregate(
        state, [ClientUpdate(i, p, s, s) for i, (p, s) in enumerate(zip(shares, sent, strict=True))]
    )


def beyond_rank_8(shares: tuple[float, ...], rounds: int = 4) -> list[float]:
    method = get_method("flexlora")
    state, x = starting(method, gaussian_spectrum())
    out = [lowrank.energy_beyond(x, [8])[0]]
    for _ in range(rounds):
        state = idle_round(method, state, shares)
        out.append(lowrank.energy_beyond(method.delta(state)[Q], [8])[0])
    return out


def lost(method: Method, shares: tuple[float, ...], rounds: int = 4) -> float:
    state, x = starting(method, gaussian_spectrum())
    for _ in range(rounds):
        state = idle_round(method, state, shares)
    now = method.delta(state)[Q]
    return float(lowrank.norm(lowrank.stack([now, x], [1.0, -1.0])) / lowrank.norm(x))


def energy_table() -> str:
    lines = ["| distribution | t = 0 | 1 | 2 | 3 | 4 |", "|---|---|---|---|---|---|"]
    lines += [f"| {n} | " + " | ".join(f"{x:.2f}" for x in beyond_rank_8(s)) + " |" for n, s in DISTRIBUTIONS.items()]
    return "\n".join(lines) + "\n"


def loss_table() -> str:
    names = [n for n in DISTRIBUTIONS if ":" not in n]
    lines = ["| method | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for label, method in METHODS.items():
        losses = [lost(method, DISTRIBUTIONS[n]) for n in names]
        lines.append(f"| {label} | " + " | ".join(f"{x:.2f}" if x > 1e-5 else "nothing" for x in losses) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("share of ‖W‖² beyond rank 8 after t rounds of flexlora without training\n")
    print(energy_table())
    print("‖W_4 − W_0‖ / ‖W_0‖ after four rounds without training (nothing: below 1e-5)\n")
    print(loss_table(), end="")
