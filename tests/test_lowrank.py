"""The linear algebra against dense float64 truth and against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

import oracle
from flexlora import leading, lowrank
from flexlora.cores import each
from flexlora.products import gram
from flexlora.randomness import generator
from flexlora.types import LowRank

FLOOR = {torch.float32: 4e-7, torch.float64: 1e-14, torch.bfloat16: 4e-7, torch.float16: 4e-7}
"""What rounding alone may cost, as a share of ‖W‖_F."""


def pair(seed: int, d_out: int, d_in: int, r: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    B = torch.randn((d_out, r), generator=g, dtype=torch.float64) * scale
    A = torch.randn((r, d_in), generator=g, dtype=torch.float64) * d_in**-0.5
    return LowRank(B.to(dtype), A.to(dtype))


def with_spectrum(S: Tensor, d_out: int, d_in: int, seed: int = 0) -> Tensor:
    """A float64 matrix of these singular values."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn((d_out, len(S)), generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn((d_in, len(S)), generator=g, dtype=torch.float64))[0]
    return U @ torch.diag(S.double()) @ V.T


def assert_best(X: LowRank, W: Tensor, rank: int, floor: float) -> None:
    """X is as near to W as any matrix of that rank, up to 1e-5 and rounding."""
    assert X.A.shape[0] <= rank
    error, least, size = oracle.distance(oracle.product(*X), W), oracle.least_error(W, rank), float(W.norm())
    assert error <= least * (1 + 1e-5) + floor * size, f"error {error:.6e}, least {least:.6e}, ‖W‖ {size:.6e}"


def assert_orthonormal(x: lowrank.Spectrum, tolerance: float) -> None:
    for rows in (x.U.T.double(), x.Vt.double()):
        assert (
            (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max() <= tolerance if len(rows) else True
        )


sizes = st.integers(1, 40)
ranks = st.integers(1, 50)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), max_size=6), ranks, dtypes)
def test_sum_and_truncate_are_the_dense_ones(d_out, d_in, clients, rank, dtype):
    total = lowrank.Sum(d_out, d_in)
    xs = [pair(i, d_out, d_in, r, dtype=dtype) for i, (r, _) in enumerate(clients)]
    weights = [float(w) for _, w in clients]
    for x, w in zip(xs, weights, strict=True):
        total.add(x, w)
    if not sum(weights):
        assert total.mean().A.shape[0] == 0
        return
    W = oracle.mean([(x.B, x.A) for x in xs], weights)
    size = max(float(W.norm()), 1e-30)
    assert oracle.distance(oracle.product(*total.mean()), W) <= FLOOR[dtype] * size
    assert oracle.distance(lowrank.delta(total.over(total.total)), W) <= FLOOR[dtype] * size
    assert_best(lowrank.truncate(total.over(total.total), rank), W, rank, FLOOR[dtype])
    assert_best(lowrank.truncate(total.mean(), rank), W, rank, FLOOR[dtype])


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(0, 12), ranks, st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e12]), dtypes)
def test_spectrum(d_out, d_in, r, rank, scale, dtype):
    if dtype == torch.float16:
        scale = 1.0
    x = pair(r, d_out, d_in, r, scale, dtype)
    W = oracle.product(*x)
    found = lowrank.svd(x, rank)
    k = min(d_out, d_in, r, rank)
    assert found.S.shape == (k,)
    assert found.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_orthonormal(found, 2e-6)
    truth = torch.linalg.svdvals(W)[:k]
    assert torch.allclose(found.S.double(), truth, rtol=1e-6, atol=1e-7 * float(W.norm()))
    largest = found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) if k else found.U
    assert (largest > 0).all()
    assert_best(LowRank(found.U * found.S, found.Vt), W, rank, FLOOR[dtype])
    assert float(lowrank.norm(x)) == pytest.approx(float(W.norm()), rel=1e-6)
    assert lowrank.truncation_error(x, rank) == pytest.approx(
        oracle.least_error(W, rank), rel=1e-4, abs=1e-3 * float(W.norm())
    )
    for r_, share in zip([1, 3], lowrank.energy_beyond(x, [1, 3]), strict=True):
        assert share == pytest.approx(oracle.energy_beyond(W, r_), abs=1e-6)


SPECTRA = {
    "flat": torch.ones(60),
    "exponential": 0.7 ** torch.arange(60),
    "fast": 10.0 ** -torch.arange(0.0, 30.0, 0.5),
    "power": torch.arange(1.0, 61.0) ** -1.0,
    "repeated": torch.tensor([5.0] * 10 + [2.0] * 20 + [1.0] * 30),
    "step": torch.tensor([1.0] * 8 + [1e-3] * 52),
    "deficient": torch.tensor([3.0] * 5),
    "zero": torch.zeros(3),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("shape", "scale"), [((60, 96), 1.0), ((96, 60), 1e-12), ((60, 64), 1e12)])
@pytest.mark.parametrize("form", ["factors", "tall stack", "dense"])
def test_accuracy_on_every_kind_of_spectrum(name, shape, scale, form):
    W = with_spectrum(SPECTRA[name] * scale, *shape).float().double()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    if form == "factors":  # of rank ≤ crossover, where the spectrum allows it
        n = min(len(SPECTRA[name]), 20)
        x = LowRank((U[:, :n] * S[:n]).float(), Vt[:n].float())
    elif form == "tall stack":
        x = LowRank(torch.cat([(U * S).float() * 0.5] * 2, 1), torch.cat([Vt.float()] * 2))
    else:
        x = W.float()
    W = oracle.product(*x) if isinstance(x, LowRank) else W
    floor = 4e-7 if form == "factors" else 2e-6  # a dense float32 sum has no values below 1e-6 of the largest
    for rank in (1, 8, 30, 60):
        assert_best(lowrank.truncate(x, rank), W, rank, floor)
        assert_orthonormal(lowrank.svd(x, rank), 3e-6)


def test_duplicates_leave_dead_directions_dead():
    x = pair(0, 64, 48, 4)
    total = lowrank.Sum(64, 48)
    for _ in range(300):
        total.add(x, 3.0)
    W = total.over(total.total)
    assert isinstance(W, Tensor)
    y = lowrank.at_rank(lowrank.svd(W, 8), 8, seed=1, module="m", round=2)
    assert not y.B[:, 4:].any()
    assert torch.equal(y.A[4:], lowrank.fresh_rows(8, 48, 1, "m", 2)[4:])
    assert oracle.distance(oracle.product(*y), oracle.product(*x)) <= 1e-6 * float(oracle.product(*x).norm())


def krylov(W: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    W = (W / W.norm()).to(dtype)
    return leading.leading(W, gram(W), k, float(W.double().norm()))


N, K = 640, 12
LARGE = {
    "even": (torch.linspace(2.0, 1.0, N), []),  # converges too slowly to pay
    "power": (torch.arange(1.0, N + 1) ** -0.5, [torch.float32, torch.float64]),
    "decaying": (0.85 ** torch.arange(N).double(), [torch.float64]),
    "repeated at the cut": (torch.ones(N), []),
    "deficient": (torch.tensor([1.0] * 8 + [0.0] * (N - 8)), []),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_krylov_answer_is_within_its_certificate(name, dtype):
    S, certified = LARGE[name]
    W = with_spectrum(S, N, N + 50)
    found = krylov(W, K, dtype)
    assert (found is not None) == (dtype in certified)
    if found:
        U, S, Vt = found
        X = (U * S) @ Vt * W.norm()
        assert oracle.distance(X, W) <= oracle.least_error(W, K) * (1 + 1e-5) + 1e-7 * float(W.norm())
        assert_orthonormal(lowrank.Spectrum(U, S, Vt), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certificate_refuses_where_a_direction_is_missed(dtype):
    """A direction that no vector of the start block has any part in stays out of the Krylov space."""
    hidden = 1.05  # a little above all others, so that rounding does not bring it in
    start = torch.randn((N, leading.STRIP), generator=generator(0, "krylov"), dtype=dtype).double()
    g = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.cat([start, torch.randn((N, N), generator=g, dtype=torch.float64)], 1))[0]
    rest = Q[:, :-1] @ torch.linalg.qr(torch.randn((N - 1, N - 1), generator=g, dtype=torch.float64))[0]
    G = (rest * torch.linspace(1.0, 0.1, N - 1) ** 3) @ rest.T
    v = Q[:, -1:]
    for W, honest in ((G + hidden * v @ v.T, False), (G, True)):
        W = (W / W.norm()).to(dtype)
        space = leading._krylov(gram(W), K)
        assert space is not None
        missed = float(torch.linalg.svdvals(W.double())[0]) ** 2 - float(space[0][0]) > 1e-4 * float(space[0][0])
        assert missed == (not honest)
        assert (leading.leading(W, gram(W), K, float(W.double().norm())) is not None) == honest


def test_large_matrices_take_the_krylov_way_and_are_the_best(monkeypatch):
    monkeypatch.setattr(leading, "pays", lambda n, k: n >= 350)
    calls = []
    inner = leading.leading
    monkeypatch.setattr(leading, "leading", lambda *a: calls.append(1) or inner(*a))
    x = pair(5, 800, 820, 350)
    W = oracle.product(*x)
    for matrix in (x, W.float(), W.float().T.contiguous().T):
        assert_best(lowrank.truncate(matrix, 10), W, 10, 4e-7)
    assert len(calls) >= 3


def test_bits_do_not_depend_on_threads():
    xs = [pair(i, 150, 120, 90) for i in range(5)]
    results = []
    for outside, workers in ((1, 1), (2, 1), (2, 2), (2, 4), (3, None)):
        torch.set_num_threads(outside)
        results.append(each(lambda x: lowrank.svd(x, 20), xs, workers))
        assert torch.get_num_threads() == outside
    for result in results[1:]:
        for found, first in zip(result, results[0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_each_hands_errors_on_and_restores_threads():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        each(lambda x: 1 // x, [1, 0, 2], workers=2)
    assert torch.get_num_threads() == before
    assert each(lambda x: x * x, range(5), workers=3) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("clients", [3, 10, 100])
def test_sum_holds_no_more_than_it_says(clients):
    """Counted in floats after every update; the bound is min(R(d_out + d_in), d_out d_in) and one block."""
    d_out, d_in, r = 96, 160, 8
    total = lowrank.Sum(d_out, d_in)
    for i in range(clients):
        total.add(pair(i, d_out, d_in, r), 1.0 + i)
        tensors = [t for x, _ in total._terms for t in x] + ([] if total._dense is None else [total._dense])
        held = sum(t.numel() for t in tensors)
        block = (lowrank.BLOCK * lowrank.dense_rank(d_out, d_in) + r) * (d_out + d_in)
        assert held <= min(r * (i + 1) * (d_out + d_in), d_out * d_in + block)


def test_inputs_are_untouched_and_results_are_their_own():
    x = pair(0, 12, 9, 3)
    before = LowRank(x.B.clone(), x.A.clone())
    total = lowrank.Sum(12, 9)
    total.add(x, 2.0)
    for work in (lambda: lowrank.truncate(x, 2), lambda: lowrank.singular_values(x), lambda: lowrank.stack([x], [0.5])):
        work()
    assert torch.equal(x.B, before.B)
    mean = total.mean()
    assert torch.equal(x.B, before.B)
    assert torch.equal(x.A, before.A)
    x.B.zero_()
    x.A.zero_()
    assert torch.equal(mean.B, before.B)  # one client: p = 1, not a bit is lost
    assert torch.equal(mean.A, before.A)


@pytest.mark.parametrize("rank", [2, lowrank.ALONE + 1])
def test_a_sum_goes_on_after_it_was_looked_at(rank):
    """Dense, by blocks and by updates that are large enough to be added alone; what was seen does not change."""
    total = lowrank.Sum(40, 30)
    xs = [pair(i, 40, 30, rank) for i in range(30)]
    weights = [1.0 + i % 3 for i in range(30)]
    seen = []
    for i, (x, w) in enumerate(zip(xs, weights, strict=True)):
        total.add(x, w)
        if i in (20, 29):
            for divisor in (total.total, 7.0):
                W = total.over(divisor)
                assert isinstance(W, Tensor)
                seen.append((i, divisor, W, W.clone()))
    for i, divisor, W, then in seen:
        truth = sum(oracle.product(*x) * w for x, w in zip(xs[: i + 1], weights[: i + 1], strict=True)) / divisor
        assert torch.equal(W, then)
        assert oracle.distance(W, truth) <= 1e-5 * float(truth.norm())


@pytest.mark.parametrize("rank", [1, 3, 8, 11, 30])
@pytest.mark.parametrize("split", ["B", "balanced"])
def test_no_dead_directions(rank, split):
    x = pair(1, 20, 16, 3)
    y = lowrank.at_rank(lowrank.svd(x, 12), rank, seed=7, module="q", round=4, split=split)
    assert y.A.shape == (rank, 16)
    fresh = lowrank.fresh_rows(30, 16, 7, "q", 4)
    assert torch.equal(y.A[3:], fresh[3:rank])
    assert not y.B[:, 3:].any()
    assert (y.A.norm(dim=1) > 0).all()
    W = oracle.product(*x)
    assert_best(y, W, rank, 4e-7)
    live = min(rank, 3)
    if split == "B":
        assert torch.allclose(y.A[:live].norm(dim=1), torch.ones(live))
    else:
        assert torch.allclose(y.A[:live].norm(dim=1), y.B[:, :live].norm(dim=0), rtol=1e-5)


def test_zero_matrix_gives_fresh_rows_only():
    y = lowrank.at_rank(lowrank.svd(lowrank.empty(6, 5), 4), 4, seed=1, module="m", round=0)
    assert not y.B.any()
    assert torch.equal(y.A, lowrank.fresh_rows(4, 5, 1, "m", 0))
    assert torch.equal(lowrank.fresh_rows(100, 5, 1, "m", 0)[:70], lowrank.fresh_rows(70, 5, 1, "m", 0))


def test_decomposed_is_not_computed_again(monkeypatch):
    x = pair(2, 30, 20, 9)
    for matrix in (x, lowrank.delta(x)):
        known = lowrank.Decomposed.of(matrix, lowrank.svd(matrix, 5), float(lowrank.norm(matrix)))
        assert oracle.distance(oracle.product(*known), oracle.product(*x)) < 1e-5
        with monkeypatch.context() as m:
            for name in ("_factored_gram", "_factored_qr", "_dense_gram", "_dense_svd"):
                m.setattr(lowrank, name, None)
            assert torch.equal(lowrank.truncate(known, 4).A, known.spectrum.Vt[:4])
            assert lowrank.energy_beyond(known, [1, 5])[1] < 1
        assert_best(lowrank.truncate(known, 7), oracle.product(*x), 7, 4e-7)  # a larger rank is computed then


def test_against_peft():
    """PEFT merges adapters of mixed rank and alpha exactly ("cat") and truncated ("svd"): weights, scaling and all."""
    d_out, d_in = 24, 18
    clients = [(2, 8, 0.2), (5, 4, 0.5), (7, 16, 0.3)]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(d_in, d_out, bias=False)

    torch.manual_seed(0)
    model: Any = None
    total = lowrank.Sum(d_out, d_in)
    for i, (r, alpha, weight) in enumerate(clients):
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["q"], init_lora_weights=False)
        if model is None:
            model = get_peft_model(Net(), config, adapter_name="c0")
        else:
            model.add_adapter(f"c{i}", config)
        layer = model.base_model.model.q
        B, A = layer.lora_B[f"c{i}"].weight.detach(), layer.lora_A[f"c{i}"].weight.detach()
        total.add(LowRank(B * (alpha / r), A), weight)
    names = [f"c{i}" for i in range(len(clients))]
    weights = [w for _, _, w in clients]
    model.base_model.add_weighted_adapter(names, weights, "cat", combination_type="cat")
    model.base_model.add_weighted_adapter(names, weights, "svd", combination_type="svd", svd_rank=4)
    layer = model.base_model.model.q
    mean = total.mean()
    assert torch.allclose(lowrank.delta(mean), layer.get_delta_weight("cat").detach(), atol=1e-6)
    assert torch.allclose(lowrank.delta(lowrank.truncate(mean, 4)), layer.get_delta_weight("svd").detach(), atol=1e-5)
