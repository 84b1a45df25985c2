"""The contract that every method keeps, the identities between them, and what idle rounds do to W."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexlora import lowrank, methods, wire
from flexlora.checkpoint import read_checkpoint, write_checkpoint
from flexlora.methods import get_method
from flexlora.methods.base import _entries, register
from flexlora.ranks import DISTRIBUTIONS
from flexlora.types import ClientUpdate, Download, FlexLoraError, LowRank, Method, Ranks, Sparse

NAMES = (
    "fedavg",
    "flexlora",
    "flexlora-carry",
    "raflora",
    "hetlora",
    "slora",
    "flora",
    "fedex",
    "ffa",
    "rolora",
    "fedsa",
    "rbla",
    "florist",
)
SHAPES = {"q_proj": (12, 16), "v_proj": (6, 16)}
LEVELS: list[Ranks] = [{"q_proj": r, "v_proj": min(r, 6)} for r in (2, 4, 8)]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in NAMES},
    "slora": ("slora", {"sparse_rounds": 1}),
    "carry+": ("flexlora-carry", {"eta": 0.5, "momentum": 0.5, "keep_rank": 10}),
    "ffa+": ("ffa", {"increments": True}),
    "rolora+": ("rolora", {"increments": True}),
    **{
        f"slora-{then}": ("slora", {"then": then, "sparse_rounds": 1})
        for then in ("fedavg", "flexlora-carry", "raflora", "hetlora", "rbla")
    },
}
"""Every method, and the options that change what its state holds."""


def make(variant: str) -> Method:
    name, options = VARIANTS[variant]
    return get_method(name, **options)


def cohort(method: Method) -> list[Ranks]:
    return [LEVELS[1]] * 3 if method.equal_ranks else LEVELS


def start(method: Method, seed: int = 3) -> Any:
    return method.init(SHAPES, seed, [*{id(r): r for r in cohort(method)}.values()])


def trained(download: Download, client: int, round: int, scale: float = 0.3) -> dict[str, LowRank | Sparse]:
    g = torch.Generator().manual_seed(1000 * round + client)
    adapter: dict[str, LowRank | Sparse] = {}
    for module, x in download.adapter.items():
        if isinstance(x, Sparse):
            adapter[module] = x._replace(values=x.values + scale * torch.randn(x.values.shape, generator=g))
            continue
        parts = {}
        for part, value in (("B", x.B), ("A", x.A)):
            step = scale * torch.randn(value.shape, generator=g)
            parts[part] = value + step if part in download.rule.train else value
        adapter[module] = LowRank(**parts)
    return adapter


def answer(method: Method, state: Any, round: int, clients: tuple[int, ...] = (0, 1, 2)) -> list[ClientUpdate]:
    ranks = cohort(method)
    updates = []
    for i in clients:
        download = method.distribute(state, ranks[i])
        updates.append(ClientUpdate(i, 1.0 + 2 * i, trained(download, i, round), sent=download.adapter))
    return updates


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors(getattr(value, name))]
    return []


def same(a: Any, b: Any) -> bool:
    left, right = tensors(a), tensors(b)
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def whole(method: Method, state: Any, module: str = "q_proj") -> torch.Tensor:
    return lowrank.delta(method.delta(state)[module]).double()


# --- registry ----------------------------------------------------------------------------------------------------------


def test_all_methods_are_registered_in_order() -> None:
    assert methods.methods()[: len(NAMES)] == NAMES
    for name in NAMES:
        entry = methods.method_entry(name)
        assert entry.paper == "ours" or entry.paper.count(".") == 1
        assert "\n" not in entry.summary
        assert entry.summary


def test_a_taken_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="'flexlora' is registered already"):
        register("flexlora", get_method)
    assert methods.method_entry("flexlora").paper == "2402.11505"


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("flexlorra", {}, "did you mean flexlora?"),
        ("flexlora-carry", {"etta": 1}, "has no option 'etta': it has eta, momentum, keep_rank"),
        ("flexlora-carry", {"eta": 0}, "eta is 0, it must be above 0"),
        ("flexlora-carry", {"momentum": 1}, "momentum is 1"),
        ("flexlora-carry", {"keep_rank": 0}, "keep_rank is 0"),
        ("hetlora", {"prune_gamma": 1.5}, "prune_gamma is 1.5"),
        ("hetlora", {"prune_lambda": -1}, "prune_lambda is -1"),
        ("hetlora", {"min_rank": 0}, "min_rank is 0"),
        ("florist", {"threshold": 0}, "threshold is 0"),
        ("slora", {"then": "flora"}, "slora cannot be followed by 'flora'"),
        ("slora", {"then": "ffa"}, "choose one of fedavg, flexlora, flexlora-carry, raflora, hetlora, rbla"),
        ("slora", {"then": "flexlora-carry", "beta": 1}, "'flexlora-carry' has no option 'beta'"),
        ("slora", {"sparse_rounds": 0}, "sparse_rounds is 0"),
        ("slora", {"sparse_rounds": 2.5}, "sparse_rounds is 2.5, it must be a whole number"),
        ("slora", {"then": "flexlora-carry", "eta": "x"}, "'flexlora-carry': eta is 'x', it must be a number"),
        ("flexlora-carry", {"eta": "big"}, "eta is 'big', it must be a number"),
        ("flexlora-carry", {"eta": float("nan")}, "eta is nan, it must be a number"),
        ("flexlora-carry", {"momentum": True}, "momentum is True, it must be a number"),
        ("flexlora-carry", {"keep_rank": 2.5}, "keep_rank is 2.5, it must be a whole number or null"),
        ("hetlora", {"min_rank": 1.5}, "min_rank is 1.5, it must be a whole number"),
        ("hetlora", {"handle_alpha": 1}, "handle_alpha is 1, it must be true or false"),
        ("florist", {"threshold": "x"}, "threshold is 'x', it must be a number"),
        ("ffa", {"increments": "maybe"}, "increments is 'maybe', it must be true or false"),
        ("slora", {"then": 3}, "then is 3, it must be a word"),
        ("flexlora-carry", {"name": "x"}, "'flexlora-carry' has no option 'name': it has eta"),
        ("slora", {"name": "x"}, "'flexlora' has no option 'name': it has split"),
        (5, {}, "method 5 does not exist: `flexlora methods` lists them"),
        (["fedavg"], {}, "method ['fedavg'] does not exist"),
    ],
)
def test_impossible_choices_are_one_line(name: Any, options: dict[str, Any], line: str) -> None:
    with pytest.raises(FlexLoraError) as error:
        get_method(name, **options)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def anything(
    eta: float = 1.0,
    rank: int | None = None,
    levels: list[float] | None = None,
    kind: Literal["a", "b"] = "a",
    path: Path | None = None,
    rule: Callable[[float], float] = abs,
) -> Method:
    return cast(Method, (eta, rank, levels, kind, path, rule))


def worded(eta: "in (0, 1]" = 1.0) -> Method:  # type: ignore  # noqa: F722
    return cast(Method, eta)


def test_options_of_other_kinds_are_the_methods_own_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexlora.methods.base._entries", dict(_entries))
    register("anything", anything)
    register("worded", worded)
    given: dict[str, Any] = {"levels": [0.5], "kind": "c", "path": "x", "rule": round}
    assert get_method("anything", **given) == (1.0, None, [0.5], "c", "x", round)
    assert get_method("worded", eta="x") == "x"
    assert get_method("anything", eta=np.float32(0.5), rank=np.int64(3))[:2] == (0.5, 3)  # pyright: ignore[reportIndexIssue]
    # YAML reads these as words
    assert get_method("anything", eta="1e-1", rank="none")[:2] == (0.1, None)  # pyright: ignore[reportIndexIssue]
    with pytest.raises(FlexLoraError, match="rank is '3', it must be a whole number or null"):
        get_method("anything", rank="3")


def test_importing_the_registry_order_does_not_depend_on_who_is_imported_first() -> None:
    code = "import flexlora.methods.fedsa, flexlora.methods as m; print(' '.join(m.methods()))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert tuple(out.split())[: len(NAMES)] == NAMES


# --- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_update_is_a_value_error(variant: str) -> None:
    method = make(variant)
    with pytest.raises(ValueError, match="at least one client update"):
        method.aggregate(start(method), iter(()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_stay_as_they_are(variant: str) -> None:
    method = make(variant)
    state = start(method)
    for round in range(3):
        updates = answer(method, state, round)
        old = [t.clone() for t in tensors([state, *updates])]
        after = method.aggregate(state, updates)
        method.distribute(after, cohort(method)[0])
        method.delta(after)
        assert same(old, [state, *updates])
        assert after.round == round + 1
        assert after.seed == 3
        # nor does the new state share memory that a client might train on
        kept = [t.clone() for t in tensors(after)]
        for update in updates:
            for t in tensors(dict(update.adapter)):
                t.fill_(7.0)
        assert same(kept, after)
        state = after


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_pass_in_the_callers_order(variant: str) -> None:
    """An iterator is enough, the result is the same to the bit, and updates are not asked for twice."""
    method = make(variant)
    state = start(method)
    for round in range(2):
        updates = answer(method, state, round)
        asked: list[int] = []

        def once(updates: list[ClientUpdate] = updates, asked: list[int] = asked) -> Iterator[ClientUpdate]:
            for update in updates:
                asked.append(update.client)
                yield update

        after = method.aggregate(state, once())
        assert asked == [0, 1, 2]
        assert same(after, method.aggregate(state, updates))
        state = after


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_are_let_go_as_they_are_added(variant: str) -> None:
    """A round of 80 clients does not mean 80 adapters in memory."""
    method = make(variant)
    state = start(method)
    for round in range(2):
        alive: list[weakref.ref[torch.Tensor]] = []

        def stream(state: Any = state, round: int = round, alive: list[Any] = alive) -> Iterator[ClientUpdate]:
            for i in range(8):
                # two may still stand in variables, and rolora keeps one frozen factor
                assert sum(tensor() is not None for tensor in alive) <= 3
                update = answer(method, state, 10 * round + i, (i % 3,))[0]
                x = update.adapter["q_proj"]
                alive.append(weakref.ref(x.values if isinstance(x, Sparse) else x.B))
                yield update
                del update, x

        state = method.aggregate(state, stream())


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_need_not_sum_to_one(variant: str) -> None:
    method = make(variant)
    state = start(method)
    updates = answer(method, state, 0)
    scaled = [ClientUpdate(u.client, u.weight * 40, u.adapter, u.sent) for u in updates]
    a, b = method.aggregate(state, updates), method.aggregate(state, scaled)
    for module in method.delta(a):
        torch.testing.assert_close(whole(method, a, module), whole(method, b, module), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_go_through_a_checkpoint_bit_for_bit(variant: str, tmp_path: Any) -> None:
    method = make(variant)
    state = start(method)
    for round in range(4):
        state = method.aggregate(state, answer(method, state, round))
        folder = write_checkpoint(tmp_path, round, state, {})
        back, _ = read_checkpoint(folder, start(method))
        assert same(back, state)
        assert same(method.aggregate(back, answer(method, back, 9)), method.aggregate(state, answer(method, state, 9)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_dead_directions(variant: str) -> None:
    """In every round each direction of a client has a gradient: a row of A, or (with B frozen) a column of B."""
    method = make(variant)
    state = start(method)
    for round in range(4):
        largest = cohort(method)[-1]
        download = method.distribute(state, largest)
        for x in download.adapter.values():
            if isinstance(x, LowRank):
                assert bool(x.A.any(dim=1).all())
        # after the first round only the smallest client takes part: larger ones must not find dead rows next time
        state = method.aggregate(state, answer(method, state, round, (0, 1, 2) if round == 0 else (0,)))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not get_method(VARIANTS[v][0]).equal_ranks])
def test_fresh_rows_are_shared_and_nested(variant: str) -> None:
    method = make(variant)
    state = start(method)
    for round in range(2):
        small, large = (method.distribute(state, r).adapter["q_proj"] for r in (LEVELS[0], LEVELS[2]))
        if isinstance(small, LowRank) and isinstance(large, LowRank):
            torch.testing.assert_close(large.A[:2], small.A, rtol=0, atol=1e-6)
            torch.testing.assert_close(large.B[:, :2], small.B, rtol=0, atol=1e-6)
        else:
            assert isinstance(small, Sparse)
            assert isinstance(large, Sparse)
            assert torch.equal(large.index[: len(small.index)], small.index)
        state = method.aggregate(state, answer(method, state, round))


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_updates_leave_a_single_precision_state(variant: str) -> None:
    method = make(variant)
    state = start(method)
    for round in range(2):
        updates = answer(method, state, round)
        half = [
            ClientUpdate(
                u.client, u.weight, wire.cast(u.adapter, torch.bfloat16), wire.cast(u.sent or {}, torch.bfloat16)
            )
            for u in updates
        ]
        single = [
            ClientUpdate(u.client, u.weight, wire.cast(u.adapter, torch.float32), wire.cast(u.sent, torch.float32))
            for u in half
            if u.sent is not None
        ]
        after = method.aggregate(state, half)
        assert same(after, method.aggregate(state, single))
        state = after


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weight_of_zero_counts_for_nothing(variant: str) -> None:
    method = make(variant)
    state = start(method)
    for round in range(2):
        updates = answer(method, state, round)
        nobody = ClientUpdate(9, 0.0, trained(method.distribute(state, cohort(method)[-1]), 9, round))
        after = method.aggregate(state, updates)
        assert same(after, method.aggregate(state, [nobody, *updates]))
        assert same(after, method.aggregate(state, [*updates, nobody]))
        state = after


# --- identities --------------------------------------------------------------------------------------------------------


def factors(rank: int, client: int) -> dict[str, LowRank]:
    g = torch.Generator().manual_seed(client)
    return {
        m: LowRank(torch.randn(d_out, min(rank, 6), generator=g), torch.randn(min(rank, 6), d_in, generator=g))
        for m, (d_out, d_in) in SHAPES.items()
    }


@pytest.mark.parametrize(
    "name", ["fedavg", "flexlora", "flexlora-carry", "raflora", "hetlora", "rbla", "flora", "fedex", "ffa", "rolora"]
)
@pytest.mark.parametrize("levels", [(), ({"q_proj": 4, "v_proj": 4},)])
def test_one_client_is_itself(name: str, levels: Any) -> None:
    method = get_method(name)
    x = factors(4, 0)
    state = method.aggregate(method.init(SHAPES, 0, levels), [ClientUpdate(0, 17.0, x)])
    for module in SHAPES:
        torch.testing.assert_close(whole(method, state, module), lowrank.delta(x[module]).double(), rtol=0, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from([1.0, 3.0, 159.0]), min_size=1, max_size=5))
def test_the_exact_methods_agree(rank: int, weights: list[float]) -> None:
    """flexlora at full rank = flora = fedex = florist without a cut = carry at η 1 = the dense mean."""
    updates = [ClientUpdate(i, w, factors(rank, i)) for i, w in enumerate(weights)]
    for module in SHAPES:
        mean = torch.zeros(SHAPES[module], dtype=torch.float64)
        for u in updates:
            x = u.adapter[module]
            assert isinstance(x, LowRank)
            mean += u.weight / sum(weights) * (x.B.double() @ x.A.double())
        for name in ("flexlora", "flora", "fedex", "flexlora-carry", "florist"):
            method = get_method(name, **({"threshold": 1.0} if name == "florist" else {}))
            state = method.aggregate(method.init(SHAPES, 0), updates)
            torch.testing.assert_close(whole(method, state, module), mean, rtol=0, atol=5e-5)
            if name.startswith("flexlora"):
                sent = method.distribute(state, dict.fromkeys(SHAPES, 6)).adapter["v_proj"]
                assert isinstance(sent, LowRank)
                torch.testing.assert_close(
                    lowrank.delta(sent).double(), whole(method, state, "v_proj"), rtol=0, atol=5e-5
                )


def test_carry_is_flexlora_at_full_rank_and_eta_one() -> None:
    full = {"q_proj": 12, "v_proj": 6}
    a, b = get_method("flexlora"), get_method("flexlora-carry")
    state, other = a.init(SHAPES, 0, [full]), b.init(SHAPES, 0, [full])
    for round in range(4):
        for method, current in ((a, state), (b, other)):
            downloads = method.distribute(current, full)
            updates = [
                ClientUpdate(i, 1.0 + i, {m: moved(x, round, i) for m, x in downloads.adapter.items()})
                for i in range(3)
            ]
            if method is a:
                state = a.aggregate(state, updates)
            else:
                other = b.aggregate(other, updates)
        torch.testing.assert_close(whole(b, other), whole(a, state), rtol=0, atol=1e-4)


def moved(x: Any, round: int, client: int) -> LowRank:
    """A change of the delta weight that does not depend on how it is factored: W → 0.7 W + noise, at full rank."""
    W = 0.7 * lowrank.delta(x)
    g = torch.Generator().manual_seed(10 * round + client)
    return lowrank.factored(W + torch.randn(W.shape, generator=g))


def test_hetlora_is_fedavg_at_equal_ranks_norms_and_counts() -> None:
    g = torch.Generator().manual_seed(0)
    updates = []
    for i in range(3):
        x = LowRank(torch.randn(12, 4, generator=g), torch.randn(4, 16, generator=g))
        x = LowRank(x.B / lowrank.norm(x).float(), x.A)
        updates.append(ClientUpdate(i, 5.0, {"q_proj": x}))
    got = {}
    for name in ("fedavg", "hetlora"):
        method = get_method(name)
        got[name] = method.delta(method.aggregate(method.init({"q_proj": (12, 16)}, 0), updates))["q_proj"]
    torch.testing.assert_close(got["hetlora"].B, got["fedavg"].B, rtol=0, atol=1e-6)
    torch.testing.assert_close(got["hetlora"].A, got["fedavg"].A, rtol=0, atol=1e-6)


def test_raflora_and_rbla_are_the_mean_at_equal_ranks() -> None:
    updates = [ClientUpdate(i, 1.0 + i, factors(4, i)) for i in range(3)]
    results = {}
    for name in ("raflora", "flexlora", "rbla", "fedavg"):
        method = get_method(name)
        results[name] = whole(method, method.aggregate(method.init(SHAPES, 0), updates))
    torch.testing.assert_close(results["raflora"], results["flexlora"], rtol=0, atol=2e-5)
    torch.testing.assert_close(results["rbla"], results["fedavg"], rtol=0, atol=2e-5)


# --- rounds without training -------------------------------------------------------------------------------------------

IDLE_SHAPE = (16, 20)
IDLE_RANKS = (2, 4, 8, 12)


def idle_start(method: Method, ranks: tuple[int, ...]) -> Any:
    """A state whose global delta weight has the singular values 12, 11, …, 1."""
    g = torch.Generator().manual_seed(5)
    U = torch.linalg.qr(torch.randn(16, 12, generator=g, dtype=torch.float64))[0].float()
    V = torch.linalg.qr(torch.randn(20, 12, generator=g, dtype=torch.float64))[0].float()
    x = LowRank(U * torch.arange(12, 0, -1.0), V.T.contiguous())
    state = method.init({"q_proj": IDLE_SHAPE}, 0, [{"q_proj": r} for r in ranks])
    return method.aggregate(state, [ClientUpdate(0, 1.0, {"q_proj": x})])


def idle(
    method: Method, state: Any, ranks: tuple[int, ...], shares: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> Any:
    """One round in which every client of positive share gives back what it was sent."""
    updates = []
    for i, (r, p) in enumerate(zip(ranks, shares, strict=True)):
        sent = wire.cast(method.distribute(state, {"q_proj": r}).adapter, dtype)
        updates.append(ClientUpdate(i, p, sent, sent=sent if dtype != torch.float32 else None))
    return method.aggregate(state, updates)


@pytest.mark.parametrize("distribution", ["homo", *DISTRIBUTIONS])
def test_flexlora_collapses_by_the_law(distribution: str) -> None:
    """σ_j(t) = q_jᵗ σ_j(0), q_j the data share of the clients of rank at least j."""
    ranks = (12,) if distribution == "homo" else IDLE_RANKS
    shares = (1.0,) if distribution == "homo" else DISTRIBUTIONS[distribution]
    method = get_method("flexlora")
    state = idle_start(method, ranks)
    q = torch.tensor([sum(p for r, p in zip(ranks, shares, strict=True) if r >= j) for j in range(1, 13)]).double()
    law = torch.arange(12, 0, -1.0).double()
    for _ in range(4):
        state = idle(method, state, ranks, shares)
        law = q * law
        # where shares differ much, the order of the directions stays: the law is monotone
        got = torch.linalg.svdvals(whole(method, state))[:12]
        torch.testing.assert_close(got, law, rtol=0, atol=1e-5 * 12)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["flexlora-carry", "raflora", "rbla"])
def test_carry_raflora_and_rbla_keep_what_was_learnt(name: str, distribution: str) -> None:
    method = get_method(name)
    state = idle_start(method, IDLE_RANKS)
    before = whole(method, state)
    for round in range(10):
        # in odd rounds only the two smallest kinds take part
        share = DISTRIBUTIONS[distribution] if round % 2 == 0 else DISTRIBUTIONS[distribution][:2]
        state = idle(method, state, IDLE_RANKS[: len(share)], share)
    lost = torch.linalg.norm(whole(method, state) - before) / torch.linalg.norm(before)
    assert float(lost) < 1e-5


def test_carry_keeps_w_over_a_bfloat16_wire() -> None:
    method = get_method("flexlora-carry")
    state = idle_start(method, IDLE_RANKS)
    before = whole(method, state)
    for _ in range(30):
        state = idle(method, state, IDLE_RANKS, DISTRIBUTIONS["random"], torch.bfloat16)
    lost = torch.linalg.norm(whole(method, state) - before) / torch.linalg.norm(before)
    assert float(lost) < 1e-5


def test_carry_drifts_over_a_bfloat16_wire_if_it_does_not_look_at_what_was_sent() -> None:
    """The reason for `ClientUpdate.sent`."""
    method = get_method("flexlora-carry")
    state = idle_start(method, IDLE_RANKS)
    before = whole(method, state)
    for _ in range(30):
        updates = [
            ClientUpdate(i, 1.0, wire.cast(method.distribute(state, {"q_proj": r}).adapter, torch.bfloat16))
            for i, r in enumerate(IDLE_RANKS)
        ]
        state = method.aggregate(state, updates)
    lost = torch.linalg.norm(whole(method, state) - before) / torch.linalg.norm(before)
    assert float(lost) > 1e-3


@pytest.mark.parametrize("increments", [False, True])
def test_ffa_collapses_unless_it_averages_increments(increments: bool) -> None:
    method = get_method("ffa", increments=increments)
    state = idle_start(method, IDLE_RANKS)
    before = whole(method, state)
    for _ in range(4):
        state = idle(method, state, IDLE_RANKS, DISTRIBUTIONS["heavy_tail"])
    lost = float(torch.linalg.norm(whole(method, state) - before) / torch.linalg.norm(before))
    assert lost < 1e-5 if increments else lost > 0.3


# --- ranks that change between rounds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_ranks_may_change_or_are_refused_before_training(name: str) -> None:
    """A client that comes back smaller, or larger, than before: `distribute` copes, or says so before anyone trains."""
    method = get_method(name, **({"sparse_rounds": 1} if name == "slora" else {}))
    state = method.init(SHAPES, 0)
    for round, rank in enumerate((4, 2, 6, 3)):
        if method.equal_ranks and round:
            with pytest.raises(FlexLoraError, match="needs equal ranks"):
                method.distribute(state, dict.fromkeys(SHAPES, rank))
            return
        download = method.distribute(state, dict.fromkeys(SHAPES, rank))
        state = method.aggregate(state, [ClientUpdate(0, 1.0, trained(download, 0, round), sent=download.adapter)])
    for x in method.delta(state).values():
        assert bool(torch.isfinite(lowrank.delta(x)).all())


@pytest.mark.parametrize("name", ["fedavg", "fedex"])
def test_unequal_ranks_are_one_clear_line(name: str) -> None:
    method = get_method(name)
    assert method.equal_ranks
    with pytest.raises(FlexLoraError, match="needs equal ranks: client 1 has rank 4 in q_proj, others 2"):
        method.aggregate(method.init(SHAPES, 0), [ClientUpdate(i, 1.0, factors(2 + 2 * i, i)) for i in range(2)])


def test_raflora_refuses_a_rank_that_is_no_level() -> None:
    method = get_method("raflora")
    with pytest.raises(FlexLoraError, match="rank 3 of q_proj is not one of 2, 4, 8"):
        method.distribute(method.init(SHAPES, 0, LEVELS), {"q_proj": 3})


def test_hetlora_asks_its_clients_to_prune() -> None:
    state = get_method("hetlora").init(SHAPES, 0)
    assert get_method("hetlora").distribute(state, LEVELS[0]).rule.prune == (1e-3, 0.99, 1)
    custom = get_method("hetlora", prune_lambda=0.1, prune_gamma=0.5, min_rank=2)
    assert custom.distribute(state, LEVELS[0]).rule.prune == (0.1, 0.5, 2)
    assert get_method("hetlora", prune_lambda=0).distribute(state, LEVELS[0]).rule.prune is None


def test_handle_alpha_needs_the_scaling() -> None:
    method = get_method("hetlora", handle_alpha=True)
    with pytest.raises(FlexLoraError, match="needs alpha/r of q_proj, which client 0 did not say"):
        method.aggregate(method.init(SHAPES, 0), [ClientUpdate(0, 1.0, factors(2, 0))])


# --- a third party's method --------------------------------------------------------------------------------------------


def test_an_entry_point_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlora.methods import base

    class Point:
        @staticmethod
        def load() -> Any:
            return lambda: register("theirs", lambda: get_method("flexlora"), paper="", summary="someone else's")

    monkeypatch.setattr(base, "_entries", dict(_entries))
    monkeypatch.setattr(base, "_plugins", set())
    monkeypatch.setattr(base, "_plugins_loaded", False)
    monkeypatch.setattr(base, "entry_points", lambda group: [Point] if group == "flexlora.methods" else [])
    assert methods.methods()[-1] == "theirs"
    assert isinstance(get_method("theirs"), Method)


def test_a_package_whose_method_cannot_be_loaded_is_named_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexlora.methods import base

    def load(self: EntryPoint) -> Any:
        if self.name == "x":
            raise ImportError("no module named theirs")
        return lambda: register("whole", lambda: get_method("flexlora"))

    monkeypatch.setattr(base, "_entries", dict(_entries))
    monkeypatch.setattr(base, "_plugins", set())
    monkeypatch.setattr(base, "_plugins_loaded", False)
    monkeypatch.setattr(EntryPoint, "load", load)
    points = [("w", "whole:add"), ("x", "theirs:add")]
    monkeypatch.setattr(base, "entry_points", lambda group: [EntryPoint(*point, group) for point in points])
    for _ in range(2):
        with pytest.raises(FlexLoraError, match=r"theirs:add cannot be loaded \(ImportError: no module named theirs\)"):
            methods.methods()
