"""SLoRA: one fixed nested mask, the mean of the sparse deltas, the base restored, stage 2 from the stage-1 delta."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method_oracles as oracle
from flexlora import lowrank
from flexlora.methods import get_method
from flexlora.methods.flexlora import Deltas
from flexlora.methods.slora import SUCCESSORS, budget, mask
from flexlora.types import ClientRule, ClientUpdate, LowRank, Method, Sparse

Q = "q_proj"
SHAPE = (9, 14)
EXAMPLES = settings(max_examples=25, deadline=None)


@EXAMPLES
@given(st.integers(0, 2**40), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.data())
def test_masks_are_prefixes_of_one_permutation(seed: int, shape: tuple[int, int], data: st.DataObject) -> None:
    size = shape[0] * shape[1]
    small = data.draw(st.integers(0, size))
    first = mask(seed, Q, shape, small).clone()
    everything = mask(seed, Q, shape, size)
    assert sorted(everything.tolist()) == list(range(size))
    assert torch.equal(everything[:small], first)
    assert torch.equal(mask(seed, Q, shape, small), first)
    assert first.dtype == torch.int64


def test_masks_differ_by_seed_and_module_and_are_spread_evenly() -> None:
    shape, k = (200, 300), 6000
    masks = [set(mask(seed, module, shape, k).tolist()) for seed, module in ((0, "a"), (1, "a"), (0, "b"))]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            # independent subsets of a tenth overlap in a hundredth of all entries: 600, standard deviation 22
            assert abs(len(one & other) - 600) < 120
        rows = np.bincount(np.array(sorted(one)) // 300, minlength=200)
        columns = np.bincount(np.array(sorted(one)) % 300, minlength=300)
        # a row has 30 entries on average, a column 20: binomial, so χ²/n is near 0.9
        assert 0.6 < ((rows - 30) ** 2 / 30).mean() < 1.2
        assert 0.6 < ((columns - 20) ** 2 / 20).mean() < 1.2


def test_the_mask_is_the_same_on_every_machine() -> None:
    """It never travels: a site that computed another one would put its values into wrong places."""
    assert mask(42, "model.layers.0.self_attn.q_proj", (576, 576), 5).tolist() == [
        42836,
        300247,
        190945,
        40421,
        238626,
    ]


def play_stage_1(method: Method, state: Any, ranks: list[int], weights: list[float], rounds: int) -> tuple[Any, Any]:
    """Random values at each client, and the dense delta weight that the formula gives."""
    rng = np.random.default_rng(0)
    index = mask(7, Q, SHAPE, SHAPE[0] * SHAPE[1]).numpy()
    want = np.zeros(SHAPE)
    for _ in range(rounds):
        updates, values = [], []
        for i, r in enumerate(ranks):
            download = method.distribute(state, {Q: r})
            x = download.adapter[Q]
            assert isinstance(x, Sparse)
            assert download.rule == ClientRule(train=("values",), send=("values",))
            assert download.base_delta == {}
            assert len(x.values) == budget(SHAPE, r)
            # it starts from the global sparse delta, at its own budget
            assert np.allclose(x.values.numpy(), want.reshape(-1)[index[: len(x.values)]], atol=1e-6)
            new = x.values.numpy() + rng.normal(size=len(x.values))
            values.append(new)
            updates.append(ClientUpdate(i, weights[i], {Q: x._replace(values=torch.tensor(new).float())}))
        state = method.aggregate(state, iter(updates))
        want = oracle.sparse_mean(SHAPE, index, values, weights)
    return state, want


@pytest.mark.parametrize("then", SUCCESSORS)
@pytest.mark.parametrize("levels", [True, False])
def test_both_stages(then: str, levels: bool) -> None:
    ranks, weights = ([3, 3, 3] if then == "fedavg" else [1, 3, 5]), [1.0, 4.0, 2.5]
    options = {"eta": 0.5, "momentum": 0.9} if then == "flexlora-carry" else {}
    method = get_method("slora", then=then, sparse_rounds=3, **options)
    state = method.init({Q: SHAPE}, 7, [{Q: r} for r in sorted(set(ranks))] if levels else ())
    state, want = play_stage_1(method, state, ranks, weights, 2)
    np.testing.assert_allclose(lowrank.delta(method.delta(state)[Q]).numpy(), want, atol=1e-5)

    # the last sparse round
    download = method.distribute(state, {Q: max(ranks)})
    x = download.adapter[Q]
    assert isinstance(x, Sparse)
    state = method.aggregate(state, [ClientUpdate(0, 2.0, {Q: x._replace(values=x.values + 1)})])
    index = mask(7, Q, SHAPE, len(x.values)).numpy()
    delta = oracle.sparse_mean(SHAPE, index, [x.values.numpy() + 1], [1.0])

    # stage 2: the base is as it was, the adapter is the best approximation at each client's rank
    for r in ranks:
        download = method.distribute(state, {Q: r})
        y = download.adapter[Q]
        assert isinstance(y, LowRank)
        assert download.base_delta == {}
        assert download.rule.train == ("A", "B")
        assert y.A.shape[0] == r
        got = lowrank.delta(y).double().numpy()
        np.testing.assert_allclose(got, oracle.best(delta, r), atol=1e-4)
    whole = lowrank.delta(method.delta(state)[Q]).double().numpy()
    if then in ("flexlora", "flexlora-carry") or not levels:
        np.testing.assert_allclose(whole, delta, atol=1e-4)  # nothing is lost at the switch
    else:
        np.testing.assert_allclose(whole, oracle.best(delta, max(ranks)), atol=1e-4)

    # from here on it is the successor: its rule applied to what the clients send
    sent = [method.distribute(state, {Q: r}).adapter for r in ranks]
    g = torch.Generator().manual_seed(0)
    updates = []
    for i, s in enumerate(sent):
        y = s[Q]
        assert isinstance(y, LowRank)
        moved = LowRank(y.B + torch.randn(y.B.shape, generator=g), y.A + torch.randn(y.A.shape, generator=g))
        updates.append(ClientUpdate(i, weights[i], {Q: moved}, sent=s))
    after = method.aggregate(state, updates)
    if then == "flexlora":
        assert isinstance(method.delta(after), Deltas)  # modules are made one by one
    got = lowrank.delta(method.delta(after)[Q]).double().numpy()
    clients = [
        oracle.Client(u.adapter[Q].B.double().numpy(), u.adapter[Q].A.double().numpy(), 1.0, u.weight)  # pyright: ignore[reportAttributeAccessIssue]
        for u in updates
    ]
    if then == "flexlora":
        expected = oracle.flexlora(clients)
    elif then == "flexlora-carry":
        increments = oracle.carry(0 * delta, clients, [oracle.best(delta, r) for r in ranks], 1.0)
        expected = delta + 0.5 * increments
    elif then == "raflora":
        expected = oracle.raflora(whole, clients, sorted(set(ranks)) + ([] if levels else [9]))
    elif then == "fedavg":
        B, A = oracle.fedavg(clients)
        expected = B @ A
    elif then == "hetlora":
        B, A = oracle.hetlora(clients, False)
        expected = B @ A
    else:
        x = method.delta(state)[Q]
        B, A = oracle.rbla((x.B.double().numpy(), x.A.double().numpy()), clients)
        expected = B @ A
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_module_that_nobody_brings_waits_with_its_start() -> None:
    """fedavg takes its rank from the first update: until then the stage-1 delta of a module is not lost."""
    shapes = {Q: SHAPE, "v_proj": SHAPE}
    method = get_method("slora", then="fedavg", sparse_rounds=1)
    state = method.init(shapes, 7)
    sent = method.distribute(state, dict.fromkeys(shapes, 2)).adapter
    ones = {m: x._replace(values=x.values + 1) for m, x in sent.items() if isinstance(x, Sparse)}
    state = method.aggregate(state, [ClientUpdate(0, 1.0, ones)])
    v = lowrank.delta(method.delta(state)["v_proj"])
    download = method.distribute(state, {Q: 2})
    nothing = ClientUpdate(1, 0.0, method.distribute(state, dict.fromkeys(shapes, 2)).adapter)
    state = method.aggregate(state, [ClientUpdate(0, 1.0, download.adapter), nothing])
    assert torch.equal(lowrank.delta(method.delta(state)["v_proj"]), v)
    assert float(v.norm()) > 1


def test_a_round_of_the_other_stage_is_refused() -> None:
    method = get_method("slora", sparse_rounds=1)
    state = method.init({Q: SHAPE}, 7)
    x = LowRank(torch.ones(9, 2), torch.ones(2, 14))
    with pytest.raises(ValueError, match="sent factors for q_proj in slora's sparse stage"):
        method.aggregate(state, [ClientUpdate(0, 1.0, {Q: x})])


def test_the_budget_is_that_of_the_factors_and_at_most_the_matrix() -> None:
    assert budget((9, 14), 2) == 46
    assert budget((9, 14), 9) == 126
