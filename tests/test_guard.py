"""What a client may send, and what is made of increments that are too large. Whole runs with liars: test_attacks.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import guard, lowrank
from flexlora.collection import RoundLog, Spool, examined, moderated
from flexlora.config import Config
from flexlora.guard import Limits
from flexlora.launch import mechanism_of, refuse_few
from flexlora.methods import get_method
from flexlora.types import (
    ClientFailure,
    ClientRule,
    ClientUpdate,
    Download,
    FlexLoraError,
    LocalTraining,
    LowRank,
    Ranks,
    Sparse,
    TrainTask,
)
from noisy import noisy_update


def factors(rank: int = 3, seed: int = 0, d_out: int = 6, d_in: int = 5) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g))


SENT: dict[str, LowRank | Sparse] = {"a": factors(3, 1), "b": factors(2, 2, 4, 7)}


def task_of(sent: Mapping[str, LowRank | Sparse] = SENT, rule: ClientRule = guard.BOTH_FACTORS) -> TrainTask:
    ranks = {m: len(x.A) for m, x in sent.items() if isinstance(x, LowRank)}
    return TrainTask(4, 9, ranks, Download(sent, {}, rule), LocalTraining(), 0, base="smol")


def good(scale: float = 0.1, **changes: Any) -> ClientUpdate:
    return replace(noisy_update(9, SENT, seed=3, scale=scale, weight=5.0), **changes)


def refused(update: ClientUpdate, **keys: Any) -> str:
    result = guard.examine(update, task_of(), **keys)
    assert isinstance(result, ClientFailure)
    assert result.client == 9
    return result.reason


# --- what is rejected --------------------------------------------------------------------------------------------------


def test_a_good_update_passes_as_it_is() -> None:
    update = good(round=4, base="smol", metrics={"train_loss": 1.5, "examples": 5, "last_loss": math.nan})
    passed = guard.examine(update, task_of())
    assert isinstance(passed, ClientUpdate)
    assert passed.adapter is update.adapter
    assert passed.sent == SENT
    assert passed.weight == 5.0
    assert dict(passed.metrics) == {"train_loss": 1.5, "examples": 5}


def at_rank(rank: int) -> ClientUpdate:
    return good(adapter={m: LowRank(x.B[:, :rank], x.A[:rank]) for m, x in good().adapter.items()})  # pyright: ignore


def test_only_who_was_asked_to_prune_sends_fewer_directions() -> None:
    """Else one client that sends rank 1 would end a run of fedavg or raflora, which take certain ranks alone."""
    pruning = task_of(rule=ClientRule(prune=(1e-3, 0.5, 2)))
    assert isinstance(guard.examine(at_rank(2), pruning), ClientUpdate)
    for rank in (0, 1):
        assert isinstance(guard.examine(at_rank(rank), pruning), ClientFailure)
        assert "a has shapes" in refused(at_rank(rank))
    assert "a has shapes" in refused(at_rank(2))


def test_a_part_that_was_not_asked_for_stays_as_it_was_sent() -> None:
    for part, rule in (("A", ClientRule(train=("B",), send=("B",))), ("B", ClientRule(train=("A",), send=("A",)))):
        result = guard.examine(good(), task_of(rule=rule))
        assert isinstance(result, ClientFailure)
        assert f"another {part} than it was sent" in result.reason
        mine = noisy_update(9, SENT, seed=3, scale=0.1, parts=rule.send)
        assert isinstance(guard.examine(mine, task_of(rule=rule)), ClientUpdate)


def with_module(x: Any) -> ClientUpdate:
    return good(adapter={**good().adapter, "a": x})


def broken(place: str, value: float) -> LowRank:
    x = LowRank(SENT["a"].B.clone(), SENT["a"].A.clone())  # pyright: ignore[reportAttributeAccessIssue]
    getattr(x, place)[1, 1] = value
    return x


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (good(adapter={"a": SENT["a"]}), "other modules"),
        (good(adapter={**SENT, "c": SENT["a"]}), "other modules"),
        (good(adapter={}), "other modules"),
        (with_module(factors(4)), "a has shapes"),
        (with_module(factors(3, d_out=7)), "a has shapes"),
        (with_module(factors(3, d_in=6)), "a has shapes"),
        (with_module(LowRank(torch.zeros(6, 3), torch.zeros(2, 5))), "a has shapes"),
        (with_module(LowRank(torch.zeros(6), torch.zeros(5))), "a has shapes"),
        (with_module(Sparse(torch.zeros(2), torch.arange(2), (6, 5))), "another form"),
        (with_module(broken("A", math.nan)), "a has values that are not finite"),
        (with_module(broken("B", math.inf)), "a has values that are not finite"),
        (with_module(LowRank(torch.zeros(6, 3).half(), torch.zeros(3, 5))), "type torch.float16, not torch.float32"),
        (with_module(LowRank(torch.zeros(6, 3).long(), torch.zeros(3, 5))), "type torch.int64"),
        (with_module(LowRank(torch.zeros(6, 0), torch.zeros(0, 5))), "a has shapes"),
        (with_module(LowRank(torch.zeros(0, 3), torch.zeros(3, 0))), "a has shapes"),
        (with_module(LowRank(torch.zeros(6, 3).double(), torch.zeros(3, 5))), "type torch.float64"),
        (with_module(LowRank(torch.full((6, 3), 65504.0).half() * 2, torch.zeros(3, 5).half())), "type torch.float16"),
        (with_module(broken("A", 1e30)), "a has values up to 1e+30, at most 1e+06 is let in"),
        (with_module(broken("B", -2e6)), "a has values up to 2e+06"),
        (good(weight=0.0), "weight 0.0"),
        (good(weight=0.5), "weight 0.5 is no number of examples"),
        (good(weight=5e-324), "weight 5e-324"),
        (good(weight=1.7e308), "weight 1.7e+308"),
        (good(weight=-3.0), "weight -3.0"),
        (good(weight=math.nan), "weight nan"),
        (good(weight=math.inf), "weight inf"),
        (good(metrics={"examples": math.nan}), "examples is nan"),
        (good(metrics={"bytes_up": -1.0}), "bytes_up is -1"),
        (good(round=3), "trained for round 3, this is round 4"),
        (good(base="llama"), "another base model"),
        (with_module(LowRank(torch.full((6, 3), 3e38), torch.full((3, 5), 3e38))), None),
    ],
)
def test_what_is_wrong_is_named(update: ClientUpdate, reason: str | None) -> None:
    said = refused(update, limits=Limits(max_norm=1e6))
    assert said.startswith("rejected: ")
    assert "\n" not in said
    if reason is not None:
        assert reason in said


def test_sparse_values_stay_in_their_places() -> None:
    sent = {"a": Sparse(torch.zeros(4), torch.arange(4), (6, 5))}
    values = torch.randn(4, generator=torch.Generator().manual_seed(0))
    task = task_of(sent)
    fine = ClientUpdate(9, 1.0, {"a": Sparse(values, torch.arange(4), (6, 5))})
    assert isinstance(guard.examine(fine, task), ClientUpdate)
    for x in (Sparse(values[:3], torch.arange(3), (6, 5)), Sparse(values, torch.arange(4) + 1, (6, 5))):
        assert isinstance(guard.examine(replace(fine, adapter={"a": x}), task), ClientFailure)
    cut = guard.examine(fine, task, limits=Limits(max_norm=0.5, action="clip"))
    assert isinstance(cut, ClientUpdate)
    assert isinstance(cut.adapter["a"], Sparse)
    assert float(cut.adapter["a"].values.norm()) == pytest.approx(0.5, rel=1e-5)


def test_weights_are_capped() -> None:
    capped = guard.examine(good(weight=1e9), task_of(), limits=Limits(max_examples=500))
    assert isinstance(capped, ClientUpdate)
    assert capped.weight == 500.0


# --- how large an increment may be -------------------------------------------------------------------------------------


def test_bounds_in_the_first_round_and_later() -> None:
    assert Limits().bound([1.0]) == math.inf
    assert Limits(max_norm=3.0, factor=10.0).bound([]) == 3.0
    assert Limits(factor=10.0).bound([]) == math.inf
    # three liars of ten do not move the median out of the honest values
    assert Limits(factor=10.0).bound([1.0] * 7 + [1e9] * 3) == 10.0
    assert Limits(max_norm=3.0, factor=10.0).bound([1.0]) == 3.0
    assert Limits(factor=10.0).bound([0.0, 0.0]) == math.inf
    assert "its increment has norm" in refused(good(100.0), norms=[1.0], limits=Limits(factor=10.0))
    assert isinstance(guard.examine(good(0.01), task_of(), norms=[1.0], limits=Limits(factor=10.0)), ClientUpdate)


def dense_pieces(update: ClientUpdate, t: float = 1.0) -> dict[str, list[torch.Tensor]]:
    """By the definition, float64: t dB A₀, t B₀ dA, t² dB dA, directions that were dropped going to zero."""
    found = {}
    assert update.sent is not None
    for m, x in update.adapter.items():
        o = update.sent[m]
        assert isinstance(x, LowRank)
        assert isinstance(o, LowRank)
        B, A = torch.zeros_like(o.B).double(), torch.zeros_like(o.A).double()
        B[:, : len(x.A)], A[: len(x.A)] = x.B.double(), x.A.double()
        B0, A0 = o.B.double(), o.A.double()
        found[m] = [t * (B - B0) @ A0, t * B0 @ (A - A0), t * t * (B - B0) @ (A - A0)]
    return found


def dense_increment(update: ClientUpdate, t: float = 1.0) -> dict[str, torch.Tensor]:
    """(B₀ + t dB)(A₀ + t dA) − B₀ A₀"""
    return {m: sum(parts[1:], parts[0]) for m, parts in dense_pieces(update, t).items()}


def whole_norm(parts: Mapping[str, Sequence[torch.Tensor]]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for xs in parts.values() for x in xs))


@settings(max_examples=60)
@given(
    scale=st.floats(1e-4, 1e3),
    share=st.floats(1e-3, 1.5),
    share_A=st.floats(1e-3, 1.5),
    rank=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    parts=st.sampled_from([("A", "B"), ("B",), ("A",)]),
)
def test_clipping_meets_the_bound_and_keeps_places(
    scale: float, share: float, share_A: float, rank: int, seed: int, parts: tuple[str, ...]
) -> None:
    update = noisy_update(9, SENT, seed=seed, scale=scale, parts=parts)
    if rank < 3:  # a client that pruned
        x = update.adapter["a"]
        assert isinstance(x, LowRank)
        update = replace(update, adapter={**update.adapter, "a": LowRank(x.B[:, :rank], x.A[:rank])})
    norm, norm_A = whole_norm(dense_pieces(update)), guard.A_norm(update)
    assert guard.increment_norm(update) == pytest.approx(norm, rel=1e-6)
    if len(parts) == 1 and rank == 3:  # one factor frozen: the norm of the product's change
        assert norm == pytest.approx(whole_norm({m: [d] for m, d in dense_increment(update).items()}), rel=1e-9)
    cut = guard.clipped(update, share * norm, bound_A=share_A * norm_A if norm_A else math.inf)
    if share >= 1 and (share_A >= 1 or not norm_A):
        assert cut is update
        return
    t = cut.metrics["clipped"]
    assert 0 < t < 1
    halved = replace(update, metrics={"clipped": 0.5})  # by a bound before this one
    again = guard.clipped(halved, share * norm, bound_A=share_A * norm_A if norm_A else math.inf)
    assert again.metrics["clipped"] == t / 2
    reached = whole_norm(dense_pieces(update, t)) / (share * norm)
    reached_A = t / share_A if norm_A else 0.0
    assert max(reached, reached_A) <= 1
    assert max(reached, reached_A) >= 1 - 1e-5
    for m, d in dense_increment(cut).items():
        torch.testing.assert_close(d, dense_increment(update, t)[m], rtol=1e-4, atol=1e-5 * max(1.0, scale))
        x, o = cut.adapter[m], SENT[m]
        assert isinstance(x, LowRank)
        assert isinstance(o, LowRank)
        assert x.A.shape == o.A.shape
        if parts == ("B",) and rank == 3:
            # what was frozen is the same to the bit, and the increment is scaled as a whole
            assert torch.equal(x.A, o.A)
            torch.testing.assert_close(d, t * dense_increment(update)[m], rtol=1e-4, atol=1e-5 * max(1.0, scale))


@settings(max_examples=60)
@given(st.floats(1e-6, 1e6), st.floats(1e-4, 1e2), st.integers(0, 10**6))
def test_the_change_of_the_product_is_exact_however_its_factors_cancel(k: float, scale: float, seed: int) -> None:
    """(B₀ / k) (k A₀) changes nothing but rounding, and hides whatever is added to it from a norm taken of Gram matrices."""
    origin = factors(3, 1)
    noise = factors(3, seed)
    x = LowRank((origin.B + scale * noise.B) / k, origin.A * k)
    found = guard.increment(x, origin)
    expected = x.B.double() @ x.A.double() - origin.B.double() @ origin.A.double()
    torch.testing.assert_close(lowrank.delta(found), expected, rtol=0, atol=1e-9 * max(1.0, float(expected.norm())))
    assert float(lowrank.norm(found)) == pytest.approx(float(lowrank.delta(found).norm()), rel=1e-9)


TRICKS = {
    "mirrored": lambda x: LowRank(-x.B, -x.A),
    "scaled": lambda x: LowRank(x.B / 1e3, x.A * 1e3),
    "scaled back": lambda x: LowRank(x.B * 1e3, x.A / 1e3),
    "A alone": lambda x: LowRank(0 * x.B, 1e4 * x.A),
    "B alone": lambda x: LowRank(torch.full_like(x.B, 1e4), 0 * x.A),
    "hidden": lambda x: LowRank((x.B + 10) / 1e5, x.A * 1e5),
}
"""What changes products little or not at all, for all that a client can see, and factors much."""


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("method", ["fedavg", "hetlora", "rbla", "fedex", "flexlora", "raflora"])
def test_factors_whose_product_hardly_changes_are_no_way_in(method: str, trick: str) -> None:
    made = get_method(method)
    ranks: Ranks = {"q": 3}
    state = made.init({"q": (12, 10)}, 0, [ranks])
    for round in (1, 2):
        sent = made.distribute(state, ranks).adapter
        honest = [noisy_update(i, sent, seed=10 * round + i, scale=0.01) for i in range(5)]
        norms = [guard.increment_norm(update) for update in honest]
        lie = ClientUpdate(9, 5.0, {"q": TRICKS[trick](sent["q"])}, sent=sent)
        task = replace(task_of(sent), round=round)
        found = guard.examine(lie, task, norms=norms, limits=Limits(factor=50.0))
        cut = guard.examine(lie, task, norms=norms, limits=Limits(factor=50.0, action="clip"))
        assert isinstance(cut, ClientUpdate)
        # As far as one may go, one of six moves the model by what one of its bound can.
        step = 50 * norms[0]
        before = lowrank.delta(made.delta(made.aggregate(state, honest))["q"])
        for update in (found, cut):
            if isinstance(update, ClientUpdate):
                after = lowrank.delta(made.delta(made.aggregate(state, [*honest, replace(update, weight=1.0)]))["q"])
                assert float((after - before).norm()) <= step
        # B is zero in the first round: its mirror image is itself, and small.
        assert isinstance(found, ClientFailure) or float(guard.increment_norm(lie)) <= step
        state = made.aggregate(state, honest)


def test_where_one_factor_stays_at_the_client_the_other_is_measured() -> None:
    """fedsa sends A alone; the server knows no B, and the product would say that nothing changed."""
    sent = {"a": LowRank(torch.zeros(6, 3), factors().A)}
    rule = ClientRule(send=("A",), keep=("B",))
    update = noisy_update(9, sent, seed=0, scale=2.0, parts=("A",))
    x = update.adapter["a"]
    assert isinstance(x, LowRank)
    norm = float((x.A - sent["a"].A).norm())
    assert guard.increment_norm(update, rule) == pytest.approx(norm, rel=1e-6)
    cut = guard.clipped(update, norm / 4, rule).adapter["a"]
    assert isinstance(cut, LowRank)
    torch.testing.assert_close(cut.A, sent["a"].A + (x.A - sent["a"].A) / 4, rtol=1e-4, atol=1e-5)


def test_norms_are_remembered_by_kind_of_round() -> None:
    norms = guard.remembered({}, "B", [1.0, 2.0])
    norms = guard.remembered(norms, "A", [30.0])
    norms = guard.remembered(norms, "B", [3.0] * guard.MEMORY)
    assert norms == {"B": (3.0,) * guard.MEMORY, "A": (30.0,)}
    assert guard.kind(ClientRule()) != guard.kind(ClientRule(train=("values",)))


# --- the robust mean, answers, options ------------------------------------------------------------------------------------


def test_the_geometric_median_against_a_dense_search() -> None:
    g = torch.Generator().manual_seed(4)
    points = torch.randn(7, 9, generator=g, dtype=torch.float64)
    points[0] *= 100
    weights = [1.0, 2.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    found = torch.tensor(guard.geometric_median(points @ points.T, weights, steps=200)).double() @ points

    def cost(z: torch.Tensor) -> torch.Tensor:
        return (torch.tensor(weights).double() * (points - z).norm(dim=1)).sum()

    z = points.mean(0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], lr=0.5, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = cost(z)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(found, z.detach(), rtol=0, atol=1e-4)
    # one point that lies however far moves it no further
    far = points.clone()
    far[0] *= 1e3
    moved = torch.tensor(guard.geometric_median(far @ far.T, weights, steps=200)).double() @ far
    assert float((moved - found).norm()) < 0.05 * float(points[1:].norm(dim=1).mean())


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 10**6))
def test_gram_is_that_of_the_dense_matrices(sizes: list[tuple[int, int]], seed: int) -> None:
    xs = [factors(2, seed + i, d_out, d_in) for i, (d_out, d_in) in enumerate(sizes)]
    dense = torch.zeros(len(xs), 200, 9, dtype=torch.float64)
    for i, x in enumerate(xs):
        dense[i, : len(x.B), : x.A.shape[1]] = x.B.double() @ x.A.double()
    flat = dense.flatten(1)
    torch.testing.assert_close(guard.gram(xs), flat @ flat.T)


def test_only_the_first_answer_counts() -> None:
    first, second, unasked = good(), good(0.2), replace(good(), client=77)
    passed = list(examined([unasked, first, second], [task_of()], {}, Limits()))
    assert len(passed) == 1
    assert isinstance(passed[0], ClientUpdate)
    assert passed[0].adapter is first.adapter


def test_min_clients_that_cannot_be_met_is_refused() -> None:
    refuse_few(Config(participation=0.5, min_clients=3), 6)
    with pytest.raises(
        FlexLoraError, match=r"min_clients: a round needs 4 answers and participation 0\.5 draws 3 of 6"
    ):
        refuse_few(Config(participation=0.5, min_clients=4), 6)


def test_options_that_do_not_go_with_privacy_are_refused() -> None:
    pytest.importorskip("dp_accounting")
    keys: dict[str, Any] = {"method": "ffa", "dp_noise": 1.0, "participation": 0.5}
    mechanism = mechanism_of(Config(**keys), 40)
    assert mechanism is not None
    assert (mechanism.cohort, mechanism.part) == (20.0, "B")
    assert mechanism_of(Config(method="fedavg"), 40) is None
    with pytest.raises(FlexLoraError, match="robust: does not go with dp_noise"):
        mechanism_of(Config(**keys, robust=True), 40)
    with pytest.raises(FlexLoraError, match="min_clients: does not go with dp_noise"):
        mechanism_of(Config(**keys, min_clients=2), 40)
    with pytest.raises(FlexLoraError, match="dp_noise: method slora"):
        mechanism_of(Config(**keys, baseline="slora"), 40)


def test_who_is_clipped_under_robust_does_not_prune(tmp_path: Path) -> None:
    """Clipping gives the directions back that the client dropped: its ranks stay as well."""
    shapes = {"m.q_proj": (6, 5), "m.down_proj": (4, 7)}
    sent = {m: factors(4, 1, a, b) for m, (a, b) in shapes.items()}
    rule = ClientRule(prune=(1e-3, 0.75, 1))
    download = Download(sent, {}, rule)
    tasks = [TrainTask(1, i, dict.fromkeys(shapes, 4), download, LocalTraining(), 0) for i in range(3)]
    updates: list[ClientUpdate] = []
    for i, scale in enumerate((0.1, 0.1, 50.0)):
        update = noisy_update(i, sent, seed=i, scale=scale)
        cut = {m: LowRank(x.B[:, :3], x.A[:3]) for m, x in update.adapter.items() if isinstance(x, LowRank)}
        updates.append(replace(update, adapter=cut, sent=sent))
    log = RoundLog({}, {})
    for task, update in zip(tasks, updates, strict=True):
        log.add(task, update)
    assert set(log.ranks) == {0, 1, 2}
    done = list(moderated(iter(updates), log, rule, Spool(tmp_path / "held")))
    ranks = [{len(x.A) for x in update.adapter.values() if isinstance(x, LowRank)} for update in done]
    clipped = [i for i, record in enumerate(log.records) if record["clipped"] < 1]
    assert 2 in clipped
    assert all(ranks[i] == {4} for i in clipped)
    assert set(log.ranks) == {0, 1, 2} - set(clipped)
    assert [i for i, record in enumerate(log.records) if "new_ranks" not in record] == clipped
