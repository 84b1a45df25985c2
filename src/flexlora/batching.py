"""Which prompts to read together, in which order: the fewest tokens, padding and passes counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from flexlora.logits import READ_TOKENS

FORWARD_COST = 32
"""What one forward pass costs beyond its tokens, in tokens: measured on two cores with 135 M parameters."""


@dataclass(frozen=True)
class Chunk:
    """Prompts that are read in one pass, after their common beginning."""

    prefix: int
    """Tokens that all of them begin with, and the neighbours of their group too."""
    members: tuple[int, ...]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def cheapest_cuts(count: int, longest: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut 0..count into pieces [i, j) of at most `longest` so that the sum of `cost(i, j)` is smallest."""
    best, start = [0.0], [0]
    for end in range(1, count + 1):
        total, first = min((best[i] + cost(i, end), i) for i in range(max(0, end - longest), end))
        best.append(total)
        start.append(first)
    pieces: list[tuple[int, int]] = []
    while count:
        pieces.append((start[count], count))
        count = start[count]
    return pieces[::-1]


def plan(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    answers: Sequence[Sequence[int]] | None = None,
    most: int = READ_TOKENS,
) -> list[Chunk]:
    """Which prompts to read together, in which order: the fewest tokens, padding and passes counted.

    `answers` are read behind their prompts; `most` tokens, with padding, go into one pass.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    length = [len(prompts[i]) for i in order]
    shared = [0] + [common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    total = [0, *accumulate(length)]

    def prefix(i: int, j: int) -> int:
        """Common beginning of the sorted prompts i to j-1; one token at least stays for the reading of each."""
        return min(*shared[i + 1 : j], *(n - 1 for n in length[i:j])) if j - i > 1 else 0

    def group_cost(i: int, j: int) -> float:
        once = prefix(i, j)
        return total[j] - total[i] - (j - i - 1) * once + (2 if once else 1) * FORWARD_COST

    chunks: list[Chunk] = []
    for i, j in cheapest_cuts(len(order), 4 * batch_size, group_cost):
        once = prefix(i, j)
        rest = {k: len(prompts[k]) - once + (len(answers[k]) if answers else 0) for k in order[i:j]}
        members = sorted(rest, key=lambda k: (rest[k], k))

        def pass_cost(a: int, b: int, rest: Mapping[int, int] = rest, members: Sequence[int] = members) -> float:
            tokens = (b - a) * rest[members[b - 1]]
            return tokens + FORWARD_COST if tokens <= most or b - a == 1 else float("inf")

        chunks += [Chunk(once, tuple(members[a:b])) for a, b in cheapest_cuts(len(members), batch_size, pass_cost)]
    return chunks
