"""Participation: how many, from the seed and the round alone, everyone in the end, every seed another sample."""

from hypothesis import given
from hypothesis import strategies as st

from flexlora.sampling import participants


@given(st.integers(1, 300), st.floats(0.001, 1.0), st.integers(0, 2**31), st.integers(1, 60))
def test_count_and_order(n: int, share: float, seed: int, round: int) -> None:
    drawn = participants(range(n), share, seed=seed, round=round)
    assert len(drawn) == max(1, int(share * n + 1e-9))
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(n))
    assert drawn == participants(list(reversed(range(n))), share, seed=seed, round=round)


def test_the_paper_draws_80_of_1613() -> None:
    assert len(participants(range(1613), 0.05, seed=42, round=1)) == 80
    assert len(participants(range(64), 0.0625, seed=42, round=1)) == 4


def test_seed_round_and_attempt_change_the_sample() -> None:
    def draw(seed: int, round: int, attempt: int) -> tuple[int, ...]:
        return tuple(participants(range(1000), 0.01, seed=seed, round=round, attempt=attempt))

    # In the published code round 0 draws the same clients for every seed.
    assert len({draw(seed, 1, 0) for seed in range(20)}) == 20
    assert len({draw(1, round, 0) for round in range(20)}) == 20
    assert len({draw(1, 1, attempt) for attempt in range(20)}) == 20


def test_everyone_takes_part_in_the_end() -> None:
    # In the published code one client can never be drawn.
    seen = {client for round in range(1, 200) for client in participants(range(20), 0.1, seed=3, round=round)}
    assert seen == set(range(20))
