"""Client-level differential privacy: each increment clipped, equal weights, a fixed divisor, Gaussian noise, an accountant.

Clients are drawn by Poisson sampling at rate q; the increment of each over all modules has Frobenius norm at most C; the
sum gets Gaussian noise of standard deviation σ C in every entry and is divided by the expected cohort q N, whoever came.
Adding or removing one client changes the sum by C at most: that is the sensitivity (arXiv 1710.06963, section 3). What is
noised is the one factor that is trained (ffa), or the dense delta weight before its SVD (flexlora, flexlora-carry). The
method then aggregates one update that holds what was sent, at the largest rank, plus this noised mean. docs/privacy.md
has the threat model.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from flexlora import guard, lowrank
from flexlora.randomness import key, secret_normals
from flexlora.types import Adapter, ClientUpdate, FlexLoraError, LowRank, Sparse

SUITED = {"ffa": "B", "flexlora": None, "flexlora-carry": None}
"""Method -> the factor that is noised; None: the dense delta weight. Why the others are left out: docs/privacy.md."""


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism of one run."""

    noise: float
    """σ: standard deviation of the noise on the sum, in multiples of `clip`."""
    clip: float
    """C: bound of one client's increment, the sensitivity of the sum."""
    rate: float
    """q: probability with which each client takes part in a round."""
    clients: int
    """N"""
    delta: float
    part: str | None
    """The factor that is noised, or None for the dense delta weight."""

    @property
    def cohort(self) -> float:
        """Expected number of clients in a round, the divisor."""
        return self.rate * self.clients

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise in every entry of the mean."""
        return self.noise * self.clip / self.cohort


def mechanism(
    method: str, *, noise: float, clip: float, rate: float, clients: int, delta: float | None = None
) -> Mechanism:
    """The mechanism of a run; delta None: clients^-1.1.

    Raises FlexLoraError for a method that it does not suit, and for a δ that would allow to publish one client whole.
    """
    if method not in SUITED:
        raise FlexLoraError(
            f"dp_noise: method {method} has no differential privacy here; use one of {', '.join(SUITED)}, ffa first"
        )
    chosen = clients**-1.1 if delta is None else delta
    if clients < 2:
        raise FlexLoraError("dp_noise: one client alone cannot hide; leave it out, or have more clients")
    if chosen > 1 / clients:
        raise FlexLoraError(
            f"dp_delta: {chosen:.3g} promises nothing among {clients} clients; choose at most {1 / clients:.3g}"
        )
    return Mechanism(noise, clip, rate, clients, chosen, SUITED[method])


def private_update(
    updates: Iterable[ClientUpdate], top: Adapter, mechanism: Mechanism, *, seed: int, round: int
) -> ClientUpdate:
    """One update that stands for the round: `top`, what is sent at the largest rank, plus the noised mean increment.

    An empty round is noise alone. seed: a secret, since who knows it can take the noise away again.
    """
    return (_private_factor if mechanism.part else _private_delta)(updates, top, mechanism, seed, round)


def _private_factor(
    updates: Iterable[ClientUpdate], top: Adapter, mechanism: Mechanism, seed: int, round: int
) -> ClientUpdate:
    """Clients of smaller rank hold the first columns of the shared factors: theirs is the sum's first part."""
    sums = {m: torch.zeros_like(_pair(x).B, dtype=torch.float64) for m, x in top.items()}
    for update in updates:
        norm = math.sqrt(guard.part_squares(update, "B"))
        share = min(1.0, mechanism.clip / norm) if norm else 1.0
        for module, x, origin in guard.pairs(update):
            dB, _ = guard.change(x, origin)
            sums[module][:, : dB.shape[1]] += share * dB
    adapter = {}
    for module, total in sums.items():
        origin = _pair(top[module])
        mean = total / mechanism.cohort
        mean += gaussian(mean, mechanism, seed, round, module)
        adapter[module] = LowRank((origin.B.double() + mean).to(origin.B.dtype), origin.A)
    return ClientUpdate(-1, 1.0, adapter, sent=top)


def _private_delta(
    updates: Iterable[ClientUpdate], top: Adapter, mechanism: Mechanism, seed: int, round: int
) -> ClientUpdate:
    sums = {m: lowrank.Sum(len(_pair(x).B), _pair(x).A.shape[1]) for m, x in top.items()}
    for update in updates:
        changed = {module: guard.increment(x, origin) for module, x, origin in guard.pairs(update)}
        norm = math.sqrt(sum(float(lowrank.norm(x)) ** 2 for x in changed.values()))
        share = mechanism.clip / norm if norm > mechanism.clip else 1.0
        for module, x in changed.items():
            sums[module].add(lowrank.factored(x), share)
    adapter = {}
    for module, total in sums.items():
        mean = lowrank.delta(total.over(mechanism.cohort)).double()
        mean += gaussian(mean, mechanism, seed, round, module)
        origin = _pair(top[module])
        adapter[module] = lowrank.factored((lowrank.delta(origin).double() + mean).to(origin.B.dtype))
    return ClientUpdate(-1, 1.0, adapter, sent=top)


def _pair(x: LowRank | Sparse) -> LowRank:
    assert isinstance(x, LowRank)
    return x


def gaussian(mean: torch.Tensor, mechanism: Mechanism, seed: int, round: int, module: str) -> torch.Tensor:
    """Noise for `mean`, of standard deviation `mechanism.deviation`, float64.

    A round that is played again with the same answers gets the same noise, so that a resumed run is the same run; with
    other answers (a site was away) or another deviation it gets other normals, or the two together would be free of them.
    """
    digest = hashlib.sha256(mean.contiguous().numpy().tobytes()).hexdigest()
    noise = secret_normals(key(seed, "noise", round, module, digest, mechanism.deviation.hex()), mean.numel())
    return noise.view(mean.shape) * mechanism.deviation


# --- what it costs -----------------------------------------------------------------------------------------------------


def event(noise: float, rate: float, rounds: int) -> Any:
    """The run as dp-accounting sees it: `rounds` times the Gaussian mechanism on a Poisson sample.

    Raises FlexLoraError where the library is missing.
    """
    try:
        import dp_accounting
    except ImportError:
        raise FlexLoraError(
            "dp_noise: needs the library dp-accounting; install it with `pip install '.[privacy]'` in flexlora's clone"
        ) from None
    once = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    return dp_accounting.SelfComposedDpEvent(once, rounds)


def epsilon(mechanism: Mechanism, rounds: int) -> float:
    """The ε of (ε, δ)-differential privacy after `rounds` rounds, neighbours differing by one client added or removed.

    By Rényi differential privacy (arXiv 1702.07476, 1908.10530), an upper bound.
    """
    composed = event(mechanism.noise, mechanism.rate, rounds)
    from dp_accounting import rdp

    # It warns, once a round, of orders that it leaves out; the bound holds without them.
    said = logging.getLogger("absl")
    level = said.level
    said.setLevel(logging.ERROR)
    try:
        accountant = rdp.RdpAccountant()
        accountant.compose(composed)
        return float(accountant.get_epsilon(mechanism.delta))
    finally:
        said.setLevel(level)


def statement(mechanism: Mechanism, rounds: int) -> dict[str, float]:
    """What metrics.jsonl and the adapter's README say after `rounds` rounds."""
    return {
        "epsilon": epsilon(mechanism, rounds),
        "delta": mechanism.delta,
        "noise": mechanism.noise,
        "clip": mechanism.clip,
        "rate": mechanism.rate,
        "deviation": mechanism.deviation,
    }
