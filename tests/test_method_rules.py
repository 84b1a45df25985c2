"""Every method against its formula in dense float64, over ranks, weights, alphas and rounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import method_oracles as oracle
from flexlora import lowrank
from flexlora.methods import get_method
from flexlora.types import ClientUpdate, Download, LowRank, Method, Sparse
from method_oracles import Client

Q = "model.layers.0.self_attn.q_proj"
EXAMPLES = settings(max_examples=25, deadline=None)


class Cohort(NamedTuple):
    shape: tuple[int, int]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    weights: tuple[float, ...]
    seed: int


@st.composite
def cohorts(draw: st.DrawFn, equal: bool = False) -> Cohort:
    shape = draw(st.tuples(st.integers(4, 9), st.integers(4, 9)))
    size = draw(st.integers(1, 4))
    rank = st.integers(1, min(shape))
    ranks = (draw(rank),) * size if equal else tuple(draw(st.lists(rank, min_size=size, max_size=size)))
    alphas = draw(st.lists(st.sampled_from([1.0, 3.7, 8.0, 16.0]), min_size=size, max_size=size))
    rslora = draw(st.booleans())
    scalings = tuple(a / (r**0.5 if rslora else r) for a, r in zip(alphas, ranks, strict=True))
    weights = tuple(draw(st.lists(st.sampled_from([1.0, 2.0, 16.0, 159.0, 0.25]), min_size=size, max_size=size)))
    return Cohort(shape, ranks, scalings, weights, draw(st.integers(0, 2**31)))


def numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def dense(x: LowRank | Sparse) -> np.ndarray:
    assert isinstance(x, LowRank)
    return numpy(x.B) @ numpy(x.A)


def train(cohort: Cohort, downloads: list[Download], rng: np.random.Generator) -> list[Client]:
    """Clients whose trained parts moved at random from what they were sent."""
    clients = []
    for i, d in enumerate(downloads):
        x, s = d.adapter[Q], cohort.scalings[i]
        assert isinstance(x, LowRank)
        B, A = numpy(x.B) / s, numpy(x.A)
        B = B + rng.normal(size=B.shape) * ("B" in d.rule.train)
        A = A + rng.normal(size=A.shape) * ("A" in d.rule.train)
        clients.append(Client(B, A, s, cohort.weights[i]))
    return clients


def updates(clients: list[Client], sent: list[Download] | None = None) -> list[ClientUpdate]:
    return [
        ClientUpdate(
            i,
            c.weight,
            {Q: LowRank(torch.tensor(c.B, dtype=torch.float32), torch.tensor(c.lora_A, dtype=torch.float32))},
            sent=sent[i].adapter if sent else None,
            scaling={Q: c.scaling},
        )
        for i, c in enumerate(clients)
    ]


class Round(NamedTuple):
    """One round as it was: state before and after, what was sent, what came back."""

    before: object
    after: object
    sent: list[Download]
    clients: list[Client]


def play(method: Method, cohort: Cohort, rounds: int = 3, levels: bool = True, send: bool = True) -> list[Round]:
    rng = np.random.default_rng(cohort.seed)
    state = method.init({Q: cohort.shape}, cohort.seed, [{Q: r} for r in cohort.ranks] if levels else ())
    played = []
    for t in range(rounds):
        # each round another part of the cohort takes part, the whole of it in the first
        here = [i for i in range(len(cohort.ranks)) if t == 0 or (i + t) % 2 == 0] or [0]
        now = cohort._replace(
            ranks=tuple(cohort.ranks[i] for i in here),
            scalings=tuple(cohort.scalings[i] for i in here),
            weights=tuple(cohort.weights[i] for i in here),
        )
        sent = [method.distribute(state, {Q: r}) for r in now.ranks]
        clients = train(now, sent, rng)
        after = method.aggregate(state, iter(updates(clients, sent if send else None)))
        played.append(Round(state, after, sent, clients))
        state = after
    return played


def close(got: np.ndarray, want: np.ndarray, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, float(np.abs(want).max())))


def delta(method: Method, state: object) -> np.ndarray:
    return dense(method.delta(state)[Q])


@EXAMPLES
@given(cohorts(equal=True))
def test_fedavg_is_the_mean_of_the_factors(cohort: Cohort) -> None:
    method = get_method("fedavg")
    for r in play(method, cohort):
        B, A = oracle.fedavg(r.clients)
        x = method.delta(r.after)[Q]
        close(numpy(x.B), B)
        close(numpy(x.A), A)


@EXAMPLES
@given(cohorts(), st.booleans())
def test_flexlora_is_the_mean_of_the_delta_weights(cohort: Cohort, levels: bool) -> None:
    method = get_method("flexlora")
    for r in play(method, cohort, levels=levels):
        W = oracle.flexlora(r.clients)
        close(delta(method, r.after), W)
        for rank in set(cohort.ranks):
            close(dense(method.distribute(r.after, {Q: rank}).adapter[Q]), oracle.best(W, rank))


@EXAMPLES
@given(cohorts(), st.sampled_from([1.0, 0.5, 1.5]), st.booleans(), st.booleans())
def test_carry_adds_the_mean_increment(cohort: Cohort, eta: float, levels: bool, send: bool) -> None:
    method = get_method("flexlora-carry", eta=eta)
    for r in play(method, cohort, levels=levels, send=send):
        W = delta(method, r.before)
        sent = [oracle.best(W, c.rank) for c in r.clients]
        want = oracle.carry(W, r.clients, sent, eta)
        close(delta(method, r.after), want)
        for rank in set(cohort.ranks):
            close(dense(method.distribute(r.after, {Q: rank}).adapter[Q]), oracle.best(want, rank), 1e-4)


@EXAMPLES
@given(cohorts(), st.sampled_from([0.3, 0.9]))
def test_carry_with_momentum_is_heavy_ball(cohort: Cohort, mu: float) -> None:
    method = get_method("flexlora-carry", eta=0.7, momentum=mu)
    M = np.zeros(cohort.shape)
    for r in play(method, cohort, rounds=4):
        W = delta(method, r.before)
        sent = [oracle.best(W, c.rank) for c in r.clients]
        M = mu * M + oracle.carry(np.zeros(cohort.shape), r.clients, sent, 1.0)
        close(delta(method, r.after), W + 0.7 * M, 1e-4)


@EXAMPLES
@given(cohorts(), st.integers(1, 4))
def test_carry_bounds_its_rank_and_says_what_it_drops(cohort: Cohort, keep: int) -> None:
    method = get_method("flexlora-carry", keep_rank=keep)
    for r in play(method, cohort):
        W = delta(method, r.before)
        whole = oracle.carry(W, r.clients, [oracle.best(W, c.rank) for c in r.clients], 1.0)
        close(delta(method, r.after), oracle.best(whole, keep), 1e-4)
        lost = ((whole - oracle.best(whole, keep)) ** 2).sum() / (whole**2).sum()
        assert r.after.dropped[Q] == pytest.approx(lost, abs=1e-5)  # pyright: ignore[reportAttributeAccessIssue]


@EXAMPLES
@given(cohorts(), st.integers(1, 4), st.sampled_from([0.3, 0.9]))
def test_carry_cuts_the_momentum_only_after_it_has_moved(cohort: Cohort, keep: int, mu: float) -> None:
    method = get_method("flexlora-carry", keep_rank=keep, momentum=mu)
    M = np.zeros(cohort.shape)
    for r in play(method, cohort):
        W = delta(method, r.before)
        sent = [oracle.best(W, c.rank) for c in r.clients]
        M = mu * M + oracle.carry(np.zeros(cohort.shape), r.clients, sent, 1.0)
        close(delta(method, r.after), oracle.best(W + M, keep), 1e-3)
        M = oracle.best(M, keep)
        assert method.figures is not None
        assert method.figures(r.after) == {"dropped": pytest.approx(r.after.dropped[Q])}  # pyright: ignore[reportAttributeAccessIssue]


@EXAMPLES
@given(cohorts(), st.booleans())
def test_raflora_averages_each_partition_over_its_holders(cohort: Cohort, levels: bool) -> None:
    method = get_method("raflora")
    for r in play(method, cohort, levels=levels):
        before = delta(method, r.before)
        # without levels no rank is known to be the largest: what lies beyond this round's stays
        edges = sorted({*cohort.ranks} if levels else {*(c.rank for c in r.clients), min(cohort.shape)})
        close(delta(method, r.after), oracle.raflora(before, r.clients, edges))


@EXAMPLES
@given(cohorts(), st.booleans())
def test_hetlora_weighs_by_norm(cohort: Cohort, handle_alpha: bool) -> None:
    method = get_method("hetlora", handle_alpha=handle_alpha)
    for r in play(method, cohort):
        B, A = oracle.hetlora(r.clients, handle_alpha)
        close(delta(method, r.after), B @ A)
        if not handle_alpha:
            x = method.delta(r.after)[Q]
            close(numpy(x.B), B)
            close(numpy(x.A), A)
        for rank in set(cohort.ranks):
            k = min(rank, A.shape[0])
            close(dense(method.distribute(r.after, {Q: rank}).adapter[Q]), B[:, :k] @ A[:k])


def test_hetlora_keeps_its_balance_with_handle_alpha() -> None:
    """√(α/r) goes in before averaging and comes out again: one client's factors come back as they were."""
    method = get_method("hetlora", handle_alpha=True)
    cohort = Cohort((6, 5), (3,), (8.0 / 3,), (4.0,), 0)
    for r in play(method, cohort):
        x = method.delta(r.after)[Q]
        close(numpy(x.B), r.clients[0].B)
        close(numpy(x.A), r.clients[0].lora_A)


def test_hetlora_falls_back_on_the_example_counts() -> None:
    method = get_method("hetlora")
    rng = np.random.default_rng(0)
    clients = [Client(np.zeros((6, r)), rng.normal(size=(r, 5)), 1.0, w) for r, w in ((2, 1.0), (4, 3.0))]
    x = method.delta(method.aggregate(method.init({Q: (6, 5)}, 0), updates(clients)))[Q]
    close(numpy(x.A), 0.25 * oracle.pad_rows(clients[0].lora_A, 4) + 0.75 * clients[1].lora_A)
    # one client with a norm: the weights go by norm, whatever came before it
    clients.append(Client(rng.normal(size=(6, 4)), rng.normal(size=(4, 5)), 1.0, 1.0))
    x = method.delta(method.aggregate(method.init({Q: (6, 5)}, 0), updates(clients)))[Q]
    close(numpy(x.A), clients[2].lora_A)


@EXAMPLES
@given(cohorts())
def test_rbla_averages_each_direction_over_its_holders(cohort: Cohort) -> None:
    method = get_method("rbla")
    for r in play(method, cohort):
        x = method.delta(r.before)[Q]
        B, A = oracle.rbla((numpy(x.B), numpy(x.A)), r.clients)
        y = method.delta(r.after)[Q]
        close(numpy(y.B), B)
        close(numpy(y.A), A)


@EXAMPLES
@given(cohorts())
def test_flora_adds_the_mean_to_the_base(cohort: Cohort) -> None:
    method = get_method("flora")
    base = np.zeros(cohort.shape)
    for r in play(method, cohort):
        for d in r.sent:
            close(dense(d.base_delta[Q]) if Q in d.base_delta else np.zeros(cohort.shape), base)
            x = d.adapter[Q]
            assert isinstance(x, LowRank)
            assert not x.B.any()
            assert x.A.any()
        base = base + oracle.flexlora(r.clients)
        close(delta(method, r.after), base)
        assert method.delta(r.after)[Q].A.shape[0] <= min(cohort.shape)


@EXAMPLES
@given(cohorts(), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_florist_cuts_at_a_share_of_the_energy(cohort: Cohort, threshold: float) -> None:
    method = get_method("florist", threshold=threshold)
    base = np.zeros(cohort.shape)
    for r in play(method, cohort):
        base = base + oracle.florist(r.clients, threshold)
        close(delta(method, r.after), base)


@EXAMPLES
@given(cohorts(equal=True))
def test_fedex_is_exact(cohort: Cohort) -> None:
    """Over rounds too: the clients' model is base delta + factors, and the next one is its mean."""
    method = get_method("fedex")
    base = np.zeros(cohort.shape)
    for r in play(method, cohort):
        B, A = oracle.fedavg(r.clients)
        whole = base + oracle.flexlora(r.clients)
        close(delta(method, r.after), whole)
        d = method.distribute(r.after, {Q: cohort.ranks[0]})
        close(dense(d.adapter[Q]), B @ A)
        base = dense(d.base_delta[Q])
        close(base, whole - B @ A, 2e-5 * max(1.0, float(np.abs(whole).max())))


@EXAMPLES
@given(cohorts(), st.sampled_from(["ffa", "rolora"]))
def test_one_frozen_factor_makes_the_mean_exact(cohort: Cohort, name: str) -> None:
    method = get_method(name)
    for t, r in enumerate(play(method, cohort)):
        part = "B" if name == "ffa" or t % 2 == 0 else "A"
        assert {d.rule.train for d in r.sent} == {d.rule.send for d in r.sent} == {(part,)}
        close(delta(method, r.after), oracle.flexlora(r.clients))


@EXAMPLES
@given(cohorts(), st.sampled_from(["ffa", "rolora"]))
def test_increments_move_the_trained_factor_by_the_mean_change(cohort: Cohort, name: str) -> None:
    method = get_method(name, increments=True)
    for t, r in enumerate(play(method, cohort)):
        part = "B" if name == "ffa" or t % 2 == 0 else "A"
        x = method.delta(r.before)[Q]
        want = dense(x)
        frozen = max(r.sent, key=lambda d: d.adapter[Q].A.shape[0]).adapter[Q]  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(frozen, LowRank)
        rank = frozen.A.shape[0]
        change_B, change_A = np.zeros((cohort.shape[0], rank)), np.zeros((rank, cohort.shape[1]))
        for p, c, d in zip(oracle.shares(r.clients), r.clients, r.sent, strict=True):
            sent = d.adapter[Q]
            assert isinstance(sent, LowRank)
            change_B[:, : c.rank] += p * (c.B - numpy(sent.B))
            change_A[: c.rank] += p * (c.lora_A - numpy(sent.A))
        step = change_B @ numpy(frozen.A) if part == "B" else numpy(frozen.B) @ change_A
        close(delta(method, r.after), want + step)


@EXAMPLES
@given(cohorts(equal=True), st.sampled_from(["ffa", "rolora"]))
def test_increments_change_nothing_at_equal_ranks(cohort: Cohort, name: str) -> None:
    plain = play(get_method(name), cohort)
    increments = play(get_method(name, increments=True), cohort)
    for a, b in zip(plain, increments, strict=True):
        close(delta(get_method(name), b.after), delta(get_method(name), a.after))


@EXAMPLES
@given(cohorts())
def test_fedsa_averages_rows_of_a_and_leaves_b_to_the_client(cohort: Cohort) -> None:
    method = get_method("fedsa")
    assert method.personal
    for r in play(method, cohort):
        assert all(d.rule.send == ("A",) and d.rule.keep == ("B",) for d in r.sent)
        assert not any(d.adapter[Q].B.any() for d in r.sent)  # pyright: ignore[reportAttributeAccessIssue]
        rank = max(c.rank for c in r.clients)
        zero = np.zeros((cohort.shape[0], 0)), np.zeros((0, cohort.shape[1]))
        _, A = oracle.rbla(zero, r.clients)
        x = method.distribute(r.after, {Q: rank}).adapter[Q]
        assert isinstance(x, LowRank)
        close(numpy(x.A), A)
        assert method.delta(r.after) == {}


@EXAMPLES
@given(cohorts(), st.sampled_from(["flexlora", "flexlora-carry", "raflora", "rbla", "hetlora", "flora"]))
def test_a_module_counts_for_those_who_have_it(cohort: Cohort, name: str) -> None:
    """A second module that only the first client adapts: its weights are those of its holders alone."""
    method = get_method(name)
    V = "model.layers.0.self_attn.v_proj"
    shapes = {Q: cohort.shape, V: cohort.shape}
    state = method.init(shapes, cohort.seed)
    sent = [method.distribute(state, {Q: r}) for r in cohort.ranks]
    clients = train(cohort, sent, np.random.default_rng(cohort.seed))
    came = updates(clients)
    first = ClientUpdate(0, came[0].weight, {**came[0].adapter, V: came[0].adapter[Q]})
    after = method.aggregate(state, [first, *came[1:]])
    close(dense(method.delta(after)[V]), clients[0].delta)
    close(delta(method, after), delta(method, method.aggregate(method.init({Q: cohort.shape}, cohort.seed), came)))
    # in a round in which nobody has it, it stays
    later = method.aggregate(after, came)
    close(dense(method.delta(later)[V]), clients[0].delta)


def test_peft_agrees_on_the_mean() -> None:
    """PEFT's own merge of adapters of different ranks and alphas is a second oracle of the mean."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(10, 8)), LoraConfig(r=2, lora_alpha=5, target_modules=["0"])
    )
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=16, target_modules=["0"]))
    layer: Any = model.base_model.model[0]  # pyright: ignore[reportIndexIssue]
    clients = []
    for name, weight in (("default", 0.25), ("second", 0.75)):
        with torch.no_grad():
            layer.lora_B[name].weight.normal_()
        B, A = numpy(layer.lora_B[name].weight), numpy(layer.lora_A[name].weight)
        clients.append(Client(B, A, layer.scaling[name], weight))
    for kind in ("svd", "cat"):
        model.add_weighted_adapter(["default", "second"], [0.25, 0.75], kind, combination_type=kind)
        merged = numpy(layer.get_delta_weight(kind))
        for name in ("flexlora", "flexlora-carry", "flora"):
            method = get_method(name)
            state = method.aggregate(method.init({Q: (8, 10)}, 0), updates(clients))
            got = dense(method.delta(state)[Q])
            close(got if kind == "cat" else oracle.best(got, 4), merged)


def test_norms_need_no_dense_matrix() -> None:
    x = LowRank(torch.randn(7, 3), torch.randn(3, 5))
    assert float(lowrank.norm(x)) == pytest.approx(float(np.linalg.norm(dense(x))))
