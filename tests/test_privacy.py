"""Differential privacy: the clipping bound, the noise, the fixed divisor, the sample, and what the accountant says."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexlora import guard, lowrank, privacy, randomness, sampling
from flexlora.card import model_card
from flexlora.config import Config
from flexlora.engine import run_rounds
from flexlora.methods import get_method, methods
from flexlora.rundir import Run, create_run
from flexlora.standing import Setup, last_standing
from flexlora.types import ClientInfo, ClientUpdate, FlexLoraError, LowRank, Ranks
from noisy import noisy_update

SHAPES = {"q": (12, 10), "down": (8, 14)}
LEVELS: list[Ranks] = [{"q": 2, "down": 2}, {"q": 4, "down": 6}]
TOP = LEVELS[1]


def mechanism(method: str = "flexlora", **keys: Any) -> privacy.Mechanism:
    return privacy.mechanism(method, **{"noise": 1.0, "clip": 0.5, "rate": 0.25, "clients": 40, **keys})


def started(name: str) -> tuple[Any, Any]:
    """A method and its state after one round, so that W is not zero."""
    method = get_method(name)
    state = method.init(SHAPES, 0, LEVELS)
    sent = method.distribute(state, TOP).adapter
    return method, method.aggregate(state, [noisy_update(0, sent, seed=9, parts=("B",))])


def round_of(method: Any, state: Any, scales: list[float], parts: tuple[str, ...]) -> list[ClientUpdate]:
    return [
        noisy_update(i, method.distribute(state, LEVELS[i % 2]).adapter, seed=i, scale=scale, parts=parts)
        for i, scale in enumerate(scales)
    ]


def dense(adapter: Any) -> dict[str, torch.Tensor]:
    return {m: x.B.double() @ x.A.double() for m, x in adapter.items()}


# --- clipping ----------------------------------------------------------------------------------------------------------


def test_without_noise_it_is_the_clipped_sum_over_the_expected_cohort() -> None:
    method, state = started("flexlora")
    updates = round_of(method, state, [0.01, 3.0, 0.02, 40.0], ("A", "B"))
    quiet = mechanism(noise=1e-30)
    top = method.distribute(state, TOP).adapter
    made = privacy.private_update(updates, top, quiet, seed=1, round=2)
    expected = dense(top)
    for update in updates:
        moved = {m: x.B.double() @ x.A.double() - o.B.double() @ o.A.double() for m, x, o in guard.pairs(update)}
        norm = math.sqrt(sum(float(d.square().sum()) for d in moved.values()))
        for m in SHAPES:
            expected[m] += moved[m] * min(1.0, quiet.clip / norm) / 10.0
    for m, d in dense(made.adapter).items():
        torch.testing.assert_close(d, expected[m], rtol=0, atol=2e-6)


def test_ffa_clips_the_factor_that_is_averaged() -> None:
    method, state = started("ffa")
    updates = round_of(method, state, [0.01, 5.0, 0.02, 70.0], ("B",))
    quiet = mechanism("ffa", noise=1e-30)
    top = method.distribute(state, TOP).adapter
    made = privacy.private_update(updates, top, quiet, seed=1, round=2)
    total = {m: torch.zeros_like(top[m].B, dtype=torch.float64) for m in SHAPES}
    for update in updates:
        change = {m: x.B.double() - o.B.double() for m, x, o in guard.pairs(update)}
        norm = math.sqrt(sum(float(d.square().sum()) for d in change.values()))
        for m, d in change.items():
            total[m][:, : d.shape[1]] += d * min(1.0, quiet.clip / norm)
    for m in SHAPES:
        x = made.adapter[m]
        assert isinstance(x, LowRank)
        assert torch.equal(x.A, top[m].A)
        torch.testing.assert_close(x.B.double(), top[m].B.double() + total[m] / 10.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", privacy.SUITED)
@settings(max_examples=15)
@given(scale=st.floats(1e-3, 1e4), seed=st.integers(0, 1000))
def test_one_client_moves_the_result_by_the_sensitivity_at_most(name: str, scale: float, seed: int) -> None:
    method, state = started(name)
    quiet = mechanism(name, noise=1e-30)
    top = method.distribute(state, TOP).adapter
    parts = ("B",) if name == "ffa" else ("A", "B")
    updates = round_of(method, state, [0.5, 0.7], parts)
    sent = method.distribute(state, LEVELS[seed % 2]).adapter
    one_more = noisy_update(7, sent, seed=seed, scale=scale, parts=parts)
    without = privacy.private_update(updates, top, quiet, seed=1, round=2).adapter
    with_it = privacy.private_update([*updates, one_more], top, quiet, seed=1, round=2).adapter
    place = (lambda a: {m: x.B.double() for m, x in a.items()}) if name == "ffa" else dense
    a, b = place(without), place(with_it)
    moved = math.sqrt(sum(float((a[m] - b[m]).square().sum()) for m in SHAPES))
    assert moved <= quiet.clip / quiet.cohort * (1 + 1e-3)


def test_weights_count_for_nothing_and_the_divisor_is_fixed() -> None:
    method, state = started("flexlora")
    updates = round_of(method, state, [0.01, 0.02, 0.03], ("A", "B"))
    top = method.distribute(state, TOP).adapter
    plain = privacy.private_update(updates, top, mechanism(), seed=3, round=2).adapter
    heavy = [replace(update, weight=1e9) for update in updates]
    same = privacy.private_update(heavy, top, mechanism(), seed=3, round=2).adapter
    assert all(torch.equal(dense(plain)[m], dense(same)[m]) for m in SHAPES)


# --- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", privacy.SUITED)
def test_noise_has_its_deviation_and_an_empty_round_is_noise_alone(name: str) -> None:
    shapes = {"q": (120, 100), "down": (90, 140)}
    ranks: Ranks = {"q": 40, "down": 40}
    method = get_method(name)
    state = method.init(shapes, 0, [ranks])
    top = method.distribute(state, ranks).adapter
    loud = mechanism(name, noise=1.3, clip=0.7, rate=0.1, clients=50)
    made = privacy.private_update([], top, loud, seed=5, round=1)
    assert loud.deviation == pytest.approx(1.3 * 0.7 / 5)
    noise = {
        m: (x.B - o.B).double() if name == "ffa" else lowrank.delta(x).double() - lowrank.delta(o).double()
        for m, x, o in guard.pairs(made)
    }
    for n in noise.values():
        assert float(n.std()) == pytest.approx(loud.deviation, rel=0.05)
        assert abs(float(n.mean())) < 4 * loud.deviation / math.sqrt(n.numel())
    # other rounds, modules and secrets have other noise; the same ones the same, so that a resumed run is the same run
    still = torch.zeros(noise["q"].shape, dtype=torch.float64)
    again = privacy.gaussian(still, loud, 5, 1, "q")
    torch.testing.assert_close(again, noise["q"], rtol=0, atol=1e-6)
    others = [privacy.gaussian(still, loud, *key) for key in ((6, 1, "q"), (5, 2, "q"), (5, 1, "down"))]
    others.append(privacy.gaussian(still + 1e-9, loud, 5, 1, "q"))  # the same round with other answers
    for other in others:
        r = float(torch.corrcoef(torch.stack([other.flatten(), again.flatten()]))[0, 1])
        assert abs(r) < 4 / math.sqrt(again.numel())
    # and the method takes it as it takes any update
    after = method.aggregate(state, [made])
    got = lowrank.delta(method.delta(after)["q"]).double()
    torch.testing.assert_close(got, lowrank.delta(made.adapter["q"]).double(), rtol=1e-4, atol=1e-5)  # pyright: ignore[reportArgumentType]


def test_a_run_played_again_with_other_noise_has_other_normals() -> None:
    """Or the two releases, mean + σ₁z and mean + σ₂z, would give the mean."""
    still, loud = torch.zeros(30, 40, dtype=torch.float64), mechanism()
    a, b = (privacy.gaussian(still, m, 5, 1, "q").flatten() for m in (loud, replace(loud, noise=2 * loud.noise)))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4 / math.sqrt(a.numel())


def test_noise_needs_the_whole_secret() -> None:
    """A torch generator takes 32 bits of a seed, which can be tried one by one."""
    still, loud = torch.zeros(30, 40, dtype=torch.float64), mechanism()
    secret = 2**255 + 12345
    found = privacy.gaussian(still, loud, secret, 1, "q")
    for other in (secret + 2**32, secret + 2**64, secret + 2**200, secret % 2**64):
        assert not torch.equal(found, privacy.gaussian(still, loud, other, 1, "q"))
    digest = hashlib.sha256(bytes(8 * still.numel())).hexdigest()
    whole = randomness.key(secret, "noise", 1, "q", digest, loud.deviation.hex())
    assert torch.equal(found.flatten(), randomness.secret_normals(whole, still.numel()) * loud.deviation)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 23])
def test_secret_normals_are_made_in_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "BLOCK", 8)
    made = randomness.secret_normals(b"k" * 32, count)
    assert made.shape == (count,)
    assert made.dtype == torch.float64
    assert made.isfinite().all()
    assert len(made.unique()) == count
    # the slow, obvious way: one pair of uniform numbers after the other
    expected: list[float] = []
    for start in range(0, count, 8):
        pairs = (min(8, count - start) + 1) // 2
        stream = hashlib.shake_256(b"k" * 32 + start.to_bytes(8, "big")).digest(16 * pairs)
        u = [((int.from_bytes(stream[i : i + 8], "little") >> 11) + 1) / 2**53 for i in range(0, len(stream), 8)]
        both = list(zip(u[:pairs], u[pairs:], strict=True))
        expected += [math.sqrt(-2 * math.log(a)) * math.cos(2 * math.pi * b) for a, b in both]
        expected += [math.sqrt(-2 * math.log(a)) * math.sin(2 * math.pi * b) for a, b in both]
    assert made.tolist() == pytest.approx(expected[:count], rel=1e-12, abs=1e-12)


def test_secret_normals_are_normal() -> None:
    count = 400_001
    made = randomness.secret_normals(b"k" * 32, count)
    below = torch.arange(1, count + 1) / count
    distance = float((torch.special.ndtr(made.sort().values) - below).abs().max())
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov and Smirnov, one in a thousand
    pairs = made[: 2 * (len(made) // 2)].reshape(2, -1)
    assert abs(float((pairs[0] * pairs[1]).mean())) < 4 / math.sqrt(pairs.shape[1])
    assert abs(float((made[1:] * made[:-1]).mean())) < 4 / math.sqrt(len(made))


def test_the_accountant_says_nothing_in_between(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert 0 < privacy.epsilon(mechanism(noise=0.5, rate=0.5), 2) < 100
    assert not caplog.records


def test_a_delta_that_allows_to_publish_a_client_is_refused() -> None:
    with pytest.raises(FlexLoraError, match=r"dp_delta: 0\.11 promises nothing among 10 clients; choose at most 0\.1"):
        mechanism(clients=10, delta=0.11)
    with pytest.raises(FlexLoraError, match="one client alone cannot hide"):
        mechanism(clients=1)


def test_the_noised_mean_is_what_the_method_makes_its_global_model() -> None:
    """At equal ranks and without noise: W after the round is W before plus the clipped sum over the expected cohort."""
    for name in privacy.SUITED:
        method, state = started(name)
        parts = ("B",) if name == "ffa" else ("A", "B")
        top = method.distribute(state, TOP).adapter
        updates = [noisy_update(i, top, seed=i, scale=0.01, parts=parts) for i in range(5)]
        made = privacy.private_update(updates, top, mechanism(name, noise=1e-30), seed=1, round=2)
        after = dense(method.delta(method.aggregate(state, [made])))
        before = dense(method.delta(state))
        for m in SHAPES:
            step = sum((dense(u.adapter)[m] - dense(top)[m] for u in updates), torch.zeros(SHAPES[m]).double()) / 10.0
            torch.testing.assert_close(after[m], before[m] + step, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flexlora", "flexlora-carry"])
def test_factors_that_cancel_do_not_break_the_bound(name: str) -> None:
    """(B₀ / k)(k A₀) changes next to nothing; the rounding of huge terms that cancel must not enter the sum unclipped."""
    method, state = started(name)
    quiet = mechanism(name, noise=1e-30, clip=0.01)
    top = method.distribute(state, TOP).adapter
    without = dense(privacy.private_update([], top, quiet, seed=1, round=2).adapter)
    for k in (1e2, 1e4, 1e6, 1e-4, 1e-6):
        adapter = {m: LowRank(x.B / k, x.A * k) for m, x in top.items() if isinstance(x, LowRank)}
        update = ClientUpdate(0, 1.0, adapter, sent=top)
        with_it = dense(privacy.private_update([update], top, quiet, seed=1, round=2).adapter)
        moved = math.sqrt(sum(float((with_it[m] - without[m]).square().sum()) for m in SHAPES))
        assert moved <= quiet.clip / quiet.cohort * (1 + 1e-3)


# --- whole runs ---------------------------------------------------------------------------------------------------------

CLIENTS = 6


class Answers:
    """Runner and scorer at once; every client adds noise of its own, always the same in a round."""

    def clients(self) -> Any:
        return {client: ClientInfo() for client in range(CLIENTS)}

    def train(self, round: int, tasks: Any) -> Any:
        for task in tasks:
            made = noisy_update(task.client, task.download.adapter, seed=task.seed, parts=task.download.rule.train)
            yield replace(made, metrics={"examples": 1.0, "train_loss": 1.0})

    def evaluate(self, *args: Any) -> Any:
        return {}

    def validate(self, adapter: Any) -> Any:
        return {"loss": 1.0, "tokens": 1, "examples": 1}

    def save(self, folder: Path, adapter: Any, facts: Any) -> None:
        folder.mkdir()
        save_file(
            {f"{m}.{p}": getattr(x, p).contiguous().clone() for m, x in adapter.items() for p in "AB"},
            folder / "adapter.safetensors",
        )

    def close(self) -> None: ...


def play(folder: Path, *, rounds: int = 6, rate: float = 0.3, secret: Path | None = None, name: str = "ffa") -> Run:
    pytest.importorskip("dp_accounting")
    both: Any = Answers()
    values: dict[str, Any] = {"participation": rate, "rounds": rounds, "method": name, "dp_noise": 1.0, "dp_clip": 0.5}
    config = Config(**values, output_dir=folder, name="r", eval_every=0)
    table = dict.fromkeys(range(CLIENTS), TOP)
    private = mechanism(name, rate=rate, clients=CLIENTS, delta=1e-5)
    setup = Setup(config, get_method(name), SHAPES, table, "chat", both, None, mechanism=private)
    run = Run(folder / "r") if (folder / "r" / "config.yaml").exists() else create_run(config, folder / "r", {})
    if secret:
        (run.folder / "secret").write_bytes(secret.read_bytes())
    quiet = lambda event, facts: None  # noqa: E731
    return run_rounds(setup, both, run, last_standing(setup, run, quiet), quiet)


def made(run: Run) -> tuple[bytes, list[Any]]:
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run.metrics]
    return (run.adapter / "adapter.safetensors").read_bytes(), lines


def test_the_seed_of_the_configuration_gives_neither_noise_nor_sample(tmp_path: Path) -> None:
    """Two runs of one configuration: only who knows the secret can play the other's again."""
    first, second = play(tmp_path / "1"), play(tmp_path / "2")
    assert first.config.seed == second.config.seed
    drawn = [[[c["id"] for c in line["clients"]] for line in run.metrics] for run in (first, second)]
    assert drawn[0] != drawn[1]  # alike in 36 draws once in 10⁸ times
    assert made(first)[0] != made(second)[0]
    same = play(tmp_path / "3", secret=first.folder / "secret")
    assert made(same) == made(first)
    secret = (first.folder / "secret").read_text()
    assert len(secret) == 64
    assert (first.folder / "secret").stat().st_mode & 0o777 == 0o600
    for path in first.folder.rglob("*"):
        if path.is_file() and path.name != "secret":
            assert secret.encode() not in path.read_bytes()


def test_rounds_that_draw_nobody_are_noise_and_count(tmp_path: Path) -> None:
    run = play(tmp_path, rounds=12, rate=0.05)
    assert any(not line["clients"] for line in run.metrics)  # all drawn: once in 10⁷ times
    spent = [line["privacy"]["epsilon"] for line in run.metrics]
    assert all(a <= b for a, b in pairwise(spent))
    assert spent[0] < spent[-1]
    private = mechanism("ffa", rate=0.05, clients=CLIENTS, delta=1e-5)
    assert spent[-1] == privacy.epsilon(private, 12)
    assert {line["best_round"] for line in run.metrics} == set(range(1, 13))  # no loss chooses


@pytest.mark.parametrize("name", privacy.SUITED)
def test_a_private_run_taken_up_again_is_the_same_run(tmp_path: Path, name: str) -> None:
    alone = play(tmp_path / "alone", name=name, rate=0.5)
    (tmp_path / "cut").mkdir()
    play(tmp_path / "cut", name=name, rate=0.5, rounds=3, secret=alone.folder / "secret")
    again = play(tmp_path / "cut", name=name, rate=0.5)
    assert made(again) == made(alone)


def test_a_secret_that_is_gone_or_damaged_ends_the_run(tmp_path: Path) -> None:
    run = play(tmp_path, rounds=2)
    kept = (run.folder / "secret").read_text()
    for damaged in ("no number", kept[:32], "7", "-5", kept + "\n", ""):
        (run.folder / "secret").write_text(damaged)
        with pytest.raises(FlexLoraError, match="secret: is damaged, and the noise"):
            play(tmp_path, rounds=3)
    (run.folder / "secret").unlink()
    with pytest.raises(FlexLoraError, match="secret: is gone, and the noise"):
        play(tmp_path, rounds=3)
    assert not (run.folder / "secret").exists()
    (run.folder / "secret").write_text(kept)
    assert len(play(tmp_path, rounds=3).metrics) == 3


def test_the_card_tells_epsilon_and_no_loss_of_the_clients() -> None:
    pytest.importorskip("dp_accounting")
    promise = privacy.statement(mechanism("ffa", clients=1613, rate=0.05), 50)
    line = {
        "round": 50,
        "privacy": promise,
        "validation": {"loss": 1.2345},
        "eval": {},
        "train_loss": 2.3456,
        "clients": [{"id": 4, "examples": 77}],
    }
    card = model_card(Config(method="ffa"), {"ranks": {"8": 1613}, "clients": 1613, "template": "chat"}, line)
    assert f"ε = {promise['epsilon']:.2f}, δ = {promise['delta']:.2g}" in card
    for private in ("1.2345", "2.3456", "77"):
        assert private not in card


# --- sampling and accounting --------------------------------------------------------------------------------------------


def test_poisson_samples_each_client_on_its_own() -> None:
    draws = [sampling.poisson(range(30), 0.2, seed=7, round=r) for r in range(2000)]
    counts = np.array([len(d) for d in draws])
    # Binomial(30, 0.2): mean 6, variance 4.8. A fixed cohort would have no variance.
    assert counts.mean() == pytest.approx(6, abs=0.2)
    assert counts.var() == pytest.approx(4.8, rel=0.15)
    together = np.array([[c in d for c in range(30)] for d in draws])
    share = together.mean(axis=0)
    assert np.all(np.abs(share - 0.2) < 4 * math.sqrt(0.16 / 2000))
    assert abs((together[:, 0] & together[:, 1]).mean() - 0.04) < 4 * math.sqrt(0.04 / 2000)
    # who else is there changes nothing for a client
    assert sampling.poisson(range(5), 0.2, seed=7, round=3) == [c for c in draws[3] if c < 5]
    assert sampling.poisson(range(3), 1.0, seed=7, round=1) == [0, 1, 2]


def moments_bound(noise: float, rate: float, rounds: int, delta: float) -> float:
    """ε by the conversion of the moments accountant, min over orders of RDP + log(1/δ)/(order − 1), from the same event."""
    rdp = pytest.importorskip("dp_accounting.rdp")
    accountant = rdp.RdpAccountant([1 + x / 10 for x in range(1, 100)] + list(range(11, 64)) + [128, 256, 512])
    accountant.compose(privacy.event(noise, rate, rounds))
    orders, divergences = np.array(accountant._orders), np.array(accountant._rdp)
    return float((divergences + np.log(1 / delta) / (orders - 1)).min())


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "delta", "published"),
    [
        # Abadi et al. 2016 (arXiv 1607.00133), section 3.2: q = 0.01, σ = 4, T = 10,000, δ = 1e-5 give ε = 1.26.
        (4.0, 0.01, 10_000, 1e-5, 1.26),
        # McMahan et al. 2018 (arXiv 1710.06963), table 1, client level: K = 1e5 users, cohort 100, z = 1, δ = K^-1.1.
        (1.0, 1e-3, 1, 1e5**-1.1, 0.97),
        (1.0, 1e-3, 1_000, 1e5**-1.1, 1.07),
        (1.0, 1e-3, 100_000, 1e5**-1.1, 2.21),
    ],
)
def test_the_accountant_against_published_values(
    noise: float, rate: float, rounds: int, delta: float, published: float
) -> None:
    assert moments_bound(noise, rate, rounds, delta) == pytest.approx(published, abs=0.005)
    ours = privacy.mechanism("ffa", noise=noise, clip=1.0, rate=rate, clients=100_000, delta=delta)
    # The library's conversion from Rényi to (ε, δ) is a later, tighter one (arXiv 2004.00010).
    assert 0.7 * published < privacy.epsilon(ours, rounds) < published


def test_more_noise_fewer_rounds_and_rarer_clients_cost_less() -> None:
    pytest.importorskip("dp_accounting")

    def cost(noise: float = 1.0, rate: float = 0.05, rounds: int = 50) -> float:
        return privacy.epsilon(mechanism(noise=noise, rate=rate, clients=1613), rounds)

    assert cost(noise=2.0) < cost() < cost(noise=0.5)
    assert cost(rounds=10) < cost() < cost(rounds=100)
    assert cost(rate=0.01) < cost() < cost(rate=0.5)
    assert mechanism(clients=1613).delta == pytest.approx(1613**-1.1)


def test_other_methods_are_refused_by_name() -> None:
    for name in methods():
        if name in privacy.SUITED:
            mechanism(name)
        else:
            with pytest.raises(FlexLoraError, match=rf"dp_noise: method {name} has no.*ffa first"):
                mechanism(name)
