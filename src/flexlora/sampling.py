"""Participation: the clients of a round, from (seed, round) alone, so that resume needs no generator state."""

from __future__ import annotations

import random
from collections.abc import Sequence

from flexlora.randomness import derive


def cohort(clients: int, participation: float) -> int:
    """How many of so many clients a round draws: ⌊participation · N⌋, at least one where there are any."""
    return min(clients, max(1, int(participation * clients + 1e-9)))


def participants(clients: Sequence[int], participation: float, *, seed: int, round: int, attempt: int = 0) -> list[int]:
    """`cohort` clients, drawn without replacement; in ascending order.

    `attempt` counts repetitions of the round after too few clients answered: each draws anew.
    """
    purpose = ("sampling", round) if not attempt else ("sampling", round, attempt)
    return sorted(random.Random(derive(seed, *purpose)).sample(sorted(clients), cohort(len(clients), participation)))


def poisson(clients: Sequence[int], rate: float, *, seed: int, round: int) -> list[int]:
    """Each client with probability `rate`, independently of the others; ascending, perhaps nobody.

    What the accounting of differential privacy assumes. `seed` is a secret there: the sample is part of the guarantee.
    """
    return [
        client for client in sorted(clients) if random.Random(derive(seed, "poisson", round, client)).random() < rate
    ]
