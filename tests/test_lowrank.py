"""The linear algebra against dense float64 truth and against PEFT."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from flexlora import lowrank
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
@pytest.mark.parametrize("shape", [(60, 96), (96, 60)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
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
    for rank in (1, 5, 8, 30, 60):
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
