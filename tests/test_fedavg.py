"""FedAvg of factors: means of A and of B, equal ranks only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import lowrank
from flexlora.methods import get_method
from flexlora.types import ClientUpdate, FlexLoraError, LowRank

SHAPES = {"q": (7, 5), "up": (4, 9)}


def client(i: int, weight: float, modules: list[str], r: int = 3, dtype: torch.dtype = torch.float32) -> ClientUpdate:
    g = torch.Generator().manual_seed(i)
    return ClientUpdate(
        i,
        weight,
        {
            m: LowRank(
                torch.randn((SHAPES[m][0], r), generator=g).to(dtype),
                torch.randn((r, SHAPES[m][1]), generator=g).to(dtype),
            )
            for m in modules
        },
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 500), st.sets(st.sampled_from(list(SHAPES)))), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_means_by_loops(federation, dtype):
    method = get_method("fedavg")
    updates = [client(i, float(w), sorted(ms), dtype=dtype) for i, (w, ms) in enumerate(federation)]
    state = method.aggregate(method.init(SHAPES, 1), iter(updates))
    asked = method.distribute(state, dict.fromkeys(SHAPES, 3)).adapter
    for m in SHAPES:
        holders = [(u.weight, x) for u in updates if u.weight and isinstance(x := u.adapter.get(m), LowRank)]
        if not holders:  # nobody with an example: still the start
            assert not asked[m][0].any()
            assert torch.equal(asked[m][1], lowrank.fresh_rows(3, SHAPES[m][1], 1, m, 0))  # type: ignore[arg-type]
            continue
        total = sum(w for w, _ in holders)
        got = asked[m]
        assert isinstance(got, LowRank)
        for part in (0, 1):
            mean = torch.zeros_like(holders[0][1][part], dtype=torch.float64)
            for w, x in holders:
                mean += w / total * x[part].double()
            assert got[part].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.allclose(got[part].double(), mean, rtol=1e-5, atol=1e-6)


def test_clients_that_agree_are_their_mean_to_the_bit():
    method = get_method("fedavg")
    x = client(0, 1.0, ["q"]).adapter
    state = method.aggregate(method.init(SHAPES, 0), [ClientUpdate(i, 3.0 + i, x) for i in range(5)])
    assert all(torch.equal(a, b) for a, b in zip(method.delta(state)["q"], x["q"], strict=True))  # type: ignore[arg-type]


def test_updates_are_left_alone():
    method = get_method("fedavg")
    a, b = client(0, 1.0, ["q"]), client(1, 2.0, ["q"])
    before = a.adapter["q"][0].clone()
    method.aggregate(method.init(SHAPES, 0), [a, b])
    assert torch.equal(a.adapter["q"][0], before)


def test_unequal_ranks_and_no_update_are_errors():
    method = get_method("fedavg")
    state = method.init(SHAPES, 0)
    with pytest.raises(FlexLoraError, match=r"client 1 has rank 2 in q, others 3; use --method flexlora"):
        method.aggregate(state, [client(0, 1.0, ["q"]), client(1, 1.0, ["q"], r=2)])
    with pytest.raises(ValueError, match="at least one"):
        method.aggregate(state, [])
    state = method.aggregate(state, [client(0, 1.0, ["q"])])
    with pytest.raises(FlexLoraError, match="rank 4 is asked for"):
        method.distribute(state, {"q": 4})
