"""FlexLoRA against the dense formula, and what its state promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from flexlora import lowrank
from flexlora.methods import flexlora, get_method
from flexlora.types import ClientUpdate, FlexLoraError, LowRank, Shapes

SHAPES: Shapes = {"q": (20, 12), "up": (9, 30), "k": (4, 16)}


def client(i: int, weight: float, ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> ClientUpdate:
    g = torch.Generator().manual_seed(i)
    adapter = {}
    for m, r in ranks.items():
        d_out, d_in = SHAPES[m]
        B, A = torch.randn((d_out, r), generator=g), torch.randn((r, d_in), generator=g)
        adapter[m] = LowRank(B.to(dtype), A.to(dtype))
    return ClientUpdate(i, weight, adapter)


def truth(updates: list[ClientUpdate]) -> dict[str, torch.Tensor]:
    return oracle.module_means(
        [({m: (x.B, x.A) for m, x in u.adapter.items() if isinstance(x, LowRank)}, u.weight) for u in updates],
        list(SHAPES),
    )


holdings = st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(1, 8), min_size=1)
federations = st.lists(st.tuples(st.integers(1, 500), holdings), min_size=1, max_size=7)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(max_examples=40, deadline=None)
@given(federations, dtypes, st.integers(1, 12), st.sampled_from(["B", "balanced"]))
def test_round_is_the_dense_one(federation, dtype, rank, split):
    method = get_method("flexlora", split=split)
    updates = [client(i, float(w), ranks, dtype) for i, (w, ranks) in enumerate(federation)]
    asked = {m: min(rank, *shape) for m, shape in SHAPES.items()}
    for levels in ((), [asked], [dict.fromkeys(SHAPES, 1)]):
        state = method.aggregate(method.init(SHAPES, 3, levels), (u for u in updates))
        assert (state.round, state.seed) == (1, 3)
        W = truth(updates)
        download = method.distribute(state, asked)
        assert download.base_delta == {}
        exact = method.delta(state)
        assert list(exact) == list(SHAPES)
        for m, (d_out, d_in) in SHAPES.items():
            x = download.adapter[m]
            assert isinstance(x, LowRank)
            assert (x.B.shape, x.A.shape) == ((d_out, asked[m]), (asked[m], d_in))
            Wm = W.get(m, torch.zeros((d_out, d_in), dtype=torch.float64))
            size = float(Wm.norm())
            error, least = oracle.distance(oracle.product(*x), Wm), oracle.least_error(Wm, asked[m])
            assert error <= least * (1 + 1e-5) + 2e-6 * size
            assert oracle.distance(oracle.product(*exact[m]), Wm) <= 1e-6 * size
            cut = lowrank.truncate(exact[m], asked[m])
            assert oracle.distance(oracle.product(*cut), Wm) <= least * (1 + 1e-5) + 2e-6 * size
            shares = lowrank.energy_beyond(exact[m], [1, asked[m]])
            assert shares == pytest.approx([oracle.energy_beyond(Wm, r) for r in (1, asked[m])], abs=2e-6)


def test_a_module_weighs_only_the_clients_that_have_it():
    a, b = client(0, 30.0, {"q": 2, "up": 2}), client(1, 10.0, {"q": 3})
    method = get_method("flexlora")
    W = method.delta(method.aggregate(method.init(SHAPES, 0), [a, b]))
    qa, qb, up = a.adapter["q"], b.adapter["q"], a.adapter["up"]
    assert isinstance(qa, LowRank)
    assert isinstance(qb, LowRank)
    assert isinstance(up, LowRank)
    assert torch.allclose(lowrank.delta(W["q"]), 0.75 * qa.B @ qa.A + 0.25 * qb.B @ qb.A, atol=1e-6)
    assert torch.allclose(lowrank.delta(W["up"]), up.B @ up.A, atol=1e-6)
    assert not lowrank.delta(W["k"]).any()


def test_one_factorisation_a_module_and_round(monkeypatch):
    method = get_method("flexlora")
    levels = [dict.fromkeys(SHAPES, r) for r in (1, 2, 4)]
    state = method.init(SHAPES, 0, levels)
    calls: list[int | None] = []
    real = lowrank.decompose

    def counted(x, rank=None):
        calls.append(rank)
        return real(x, rank)

    monkeypatch.setattr(lowrank, "decompose", counted)
    state = method.aggregate(state, [client(i, 1.0, dict.fromkeys(SHAPES, 4)) for i in range(5)])
    for ranks in levels:
        method.distribute(state, ranks)
    for x in method.delta(state).values():
        lowrank.energy_beyond(x, [1, 4])
    assert sorted(calls, key=str) == [4] * len(SHAPES)
    larger = method.distribute(state, {"q": 9}).adapter["q"]  # computed when it is asked for
    assert calls.count(9) == 1
    assert larger.B.shape == (20, 9)  # type: ignore[union-attr]


def test_ranks_are_nested_and_round_one_has_fresh_rows():
    method = get_method("flexlora")
    state = method.init(SHAPES, 5, [{"q": 6}])
    first = method.distribute(state, {"q": 6}).adapter["q"]
    assert isinstance(first, LowRank)
    assert not first.B.any()
    assert torch.equal(first.A, lowrank.fresh_rows(6, 12, 5, "q", 0))
    state = method.aggregate(state, [client(1, 1.0, {"q": 3})])
    small, large = (method.distribute(state, {"q": r}).adapter["q"] for r in (2, 6))
    assert torch.equal(small.A, large.A[:2])  # type: ignore[union-attr]
    assert torch.equal(large.A[3:], lowrank.fresh_rows(6, 12, 5, "q", 1)[3:])  # type: ignore[union-attr]


def test_no_update_is_an_error_and_no_example_changes_nothing():
    method = get_method("flexlora")
    state = method.aggregate(method.init(SHAPES, 0), [client(0, 5.0, {"q": 3})])
    with pytest.raises(ValueError, match="at least one"):
        method.aggregate(state, [])
    after = method.aggregate(state, [client(1, 0.0, {"q": 2, "up": 1})])
    assert after.round == state.round + 1
    assert torch.equal(lowrank.delta(method.delta(after)["q"]), lowrank.delta(method.delta(state)["q"]))
    assert not lowrank.delta(method.delta(after)["up"]).any()


def test_updates_are_read_once_and_left_alone():
    method = get_method("flexlora")
    updates = [client(i, 2.0, {"q": 7, "up": 5}) for i in range(6)]
    kept = [{m: LowRank(x.B.clone(), x.A.clone()) for m, x in u.adapter.items()} for u in updates]  # type: ignore[union-attr]
    state = method.aggregate(method.init(SHAPES, 0), iter(updates))
    for u, before in zip(updates, kept, strict=True):
        for m, x in u.adapter.items():
            assert all(torch.equal(a, b) for a, b in zip(x, before[m], strict=True))  # type: ignore[arg-type]
    again = method.aggregate(method.init(SHAPES, 0), iter(updates))
    for m in SHAPES:
        assert all(torch.equal(a, b) for a, b in zip(state.spectrum[m], again.spectrum[m], strict=True))


def test_bits_do_not_depend_on_threads():
    method = get_method("flexlora")
    updates = [client(i, 2.0 + i, dict.fromkeys(SHAPES, 4)) for i in range(9)]
    states = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        states.append(method.aggregate(method.init(SHAPES, 0), updates))
    for state in states[1:]:
        for m in SHAPES:
            assert all(torch.equal(a, b) for a, b in zip(state.spectrum[m], states[0].spectrum[m], strict=True))
            assert torch.equal(lowrank.delta(state.W[m]), lowrank.delta(states[0].W[m]))


def test_split_must_exist():
    with pytest.raises(FlexLoraError, match="B or balanced"):
        flexlora.flexlora(split="A")
