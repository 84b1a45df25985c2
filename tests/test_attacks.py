"""Whole runs of which a fifth of the clients lies: what they can do with `robust`, and what they could without."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexlora.config import Config
from flexlora.engine import run_rounds
from flexlora.launch import NOT_ROBUST, method_of
from flexlora.methods import methods
from flexlora.randomness import generator
from flexlora.rundir import Run, create_run
from flexlora.standing import Setup, last_standing
from flexlora.types import (
    ClientFailure,
    ClientInfo,
    ClientUpdate,
    FlexLoraError,
    LowRank,
    Ranks,
    Sparse,
    TrainTask,
)

D_OUT, D_IN, EXAMPLES, HELD_OUT = 12, 16, 40, 500


def dense(factors: Mapping[str, torch.Tensor], like: LowRank | Sparse) -> torch.Tensor:
    if isinstance(like, Sparse):
        return torch.zeros(D_OUT * D_IN).index_put((like.index,), factors["values"]).view(D_OUT, D_IN)
    return factors["B"] @ factors["A"]


def parts(x: LowRank | Sparse) -> dict[str, torch.Tensor]:
    return {"values": x.values} if isinstance(x, Sparse) else {"B": x.B, "A": x.A}


class Regression:
    """Runner and scorer at once: clients fit Y = X Wᵀ with LoRA by Adam, their W_i around one W; some clients lie."""

    def __init__(self, table: Mapping[int, Ranks], attack: str | None) -> None:
        self.table, self.attack = table, attack
        g = torch.Generator().manual_seed(11)
        truth = torch.randn(D_OUT, 3, generator=g) @ torch.randn(3, D_IN, generator=g) / 2
        self.data = {}
        for client in table:
            own = truth + 0.04 * torch.randn(D_OUT, D_IN, generator=g)  # no client's task is quite another's
            X = torch.randn(EXAMPLES, D_IN, generator=g)
            self.data[client] = (X, X @ own.T + 0.1 * torch.randn(EXAMPLES, D_OUT, generator=g))
        X = torch.randn(HELD_OUT, D_IN, generator=g)
        self.held_out = (X, X @ truth.T + 0.1 * torch.randn(HELD_OUT, D_OUT, generator=g))

    def clients(self) -> Mapping[int, ClientInfo]:
        return {client: ClientInfo() for client in self.table}

    def lies(self, client: int) -> bool:
        return self.attack is not None and client % 5 == 0

    def honest(self, task: TrainTask) -> ClientUpdate:
        x, rule = task.download.adapter["m"], task.download.rule
        factors = {name: tensor.clone() for name, tensor in parts(x).items()}
        trained = [factors[part].requires_grad_() for part in rule.train]
        X, Y = self.data[task.client]
        if "m" in task.download.base_delta:
            base = task.download.base_delta["m"]
            Y = Y - X @ base.A.T @ base.B.T
        optimizer = torch.optim.Adam(trained, lr=0.03)
        for _ in range(10):
            optimizer.zero_grad()
            (X @ dense(factors, x).T - Y).square().mean().backward()
            optimizer.step()
        moved = {name: tensor.detach() for name, tensor in factors.items() if name in (*rule.send, "values")}
        return ClientUpdate(
            task.client, float(EXAMPLES), {"m": x._replace(**moved)}, metrics={"examples": EXAMPLES, "train_loss": 1.0}
        )

    def train(self, round: int, tasks: Sequence[TrainTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in tasks:
            update = self.honest(task)
            yield self.lie(task, update) if self.lies(task.client) else update

    def lie(self, task: TrainTask, update: ClientUpdate) -> ClientUpdate:
        """Only parts that travel can be lied about: the server fills in the others."""
        x, o = update.adapter["m"], task.download.adapter["m"]
        g = generator(task.seed, "attack")
        new, lies = parts(x), [part for part in parts(x) if part in (*task.download.rule.send, "values")]
        for part in lies:
            trained, sent = parts(x)[part], parts(o)[part]
            new[part] = {
                "flip": lambda t, s: s - 10 * (t - s),  # ten times the increment, the other way
                "noise": lambda t, s: s + 3 * torch.randn(s.shape, generator=g),
                "weight": lambda t, s: s - (t - s),
                "nan": lambda t, s: t * math.nan,
                "mirror": lambda t, s: -s,  # with both factors: the very same product
                "scale": lambda t, s: t * 30 if part == lies[-1] else t / 30,  # noqa: B023
            }[self.attack or ""](trained, sent)
        weight = 1e6 if self.attack == "weight" else update.weight
        return replace(update, adapter={"m": x._replace(**new)}, weight=weight)

    def loss(self, W: torch.Tensor) -> float:
        X, Y = self.held_out
        return float((X @ W.T - Y).square().mean())

    def validate(self, adapter: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"loss": self.loss(adapter["m"].B @ adapter["m"].A)}

    def evaluate(self, *args: Any) -> Any:
        return {}

    def save(self, folder: Path, adapter: Any, facts: Any) -> None:
        folder.mkdir()

    def close(self) -> None: ...


SIZES = {"fedavg": (4, 4, 4), "fedex": (4, 4, 4), "ffa": (12, 12, 12)}
"""Ranks of the clients: equal ones where the method needs them; large ones where A is never trained."""


def held_out_loss(
    folder: Path, attack: str | None, method: str, rounds: int = 15, *, above: bool = False, **keys: Any
) -> float:
    """Of the last round, which is what the server ends with. `above`: who lies has the largest rank, and nobody else."""
    sizes = SIZES.get(method, (3, 4, 6))
    table: dict[int, Ranks] = {client: {"m": sizes[client % 3]} for client in range(20)}
    if above:
        table = {client: {"m": (3, 4)[client % 2] if client % 5 else 6} for client in table}
    both: Any = Regression(table, attack)
    values = {"participation": 1.0, "rounds": rounds, "early_stop": False, "eval_every": 0, "method": method, **keys}
    config = Config(**values, output_dir=folder, name="r")
    setup = Setup(config, method_of(config), {"m": (D_OUT, D_IN)}, table, "chat", both, None)
    run = create_run(config, folder / "r", {})
    quiet = lambda event, facts: None  # noqa: E731
    run_rounds(setup, both, run, last_standing(setup, run, quiet), quiet)
    return run.metrics[-1]["validation"]["loss"]


ATTACKS = ("flip", "noise", "weight", "nan")
TRICKS = ("mirror", "scale")
"""Against methods that average factors."""
ROUNDS = {"flexlora": 10, "flexlora-carry": 10, "fedex": 50, "ffa": 40, "rolora": 40}
"""After which the run without liars has learnt what there is; 20 for the others."""


@pytest.mark.parametrize("method", ["flexlora", "fedavg"])
def test_a_fifth_of_the_clients_lies(tmp_path: Path, method: str) -> None:
    """Sign flip ×10, noise, huge weight, NaN: with `robust` within 10 % of the run without them; without it, destroyed."""
    check_attacks(tmp_path, method, ATTACKS)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in methods() if m not in ("flexlora", *NOT_ROBUST)])
def test_a_fifth_of_the_clients_lies_whatever_the_method(tmp_path: Path, method: str) -> None:
    averages = method in ("fedavg", "fedex", "hetlora")
    check_attacks(tmp_path, method, (*ATTACKS, *TRICKS) if averages else ATTACKS)


@pytest.mark.parametrize(
    "method",
    ["flexlora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("hetlora", "flora", "florist", "rolora"))],
)
def test_liars_alone_with_the_largest_rank(tmp_path: Path, method: str) -> None:
    without = held_out_loss(tmp_path / "without", "nan", method, 20, above=True, norm_factor=None)
    for attack in ("flip", "noise", "weight"):
        found = held_out_loss(tmp_path / attack, attack, method, 20, above=True, robust=True)
        assert found <= 1.1 * without, attack


def test_robust_is_refused_where_it_promises_nothing(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        *((m, {}) for m in ("rbla", "fedsa", "raflora", "flexlora-carry")),
        ("rbla", {"baseline": "slora"}),
    ]
    for name, keys in cases:
        with pytest.raises(FlexLoraError, match=f"robust: does not go with method {name}, .*leave it out"):
            held_out_loss(tmp_path, None, name, robust=True, rounds=1, **keys)
        assert list(tmp_path.iterdir()) == []


def check_attacks(folder: Path, method: str, attacks: Sequence[str]) -> None:
    rounds = ROUNDS.get(method, 20)
    without = held_out_loss(folder / "without", "nan", method, rounds, norm_factor=None)  # NaN: they are left out
    found = {attack: held_out_loss(folder / attack, attack, method, rounds, robust=True) for attack in attacks}
    assert {a: loss / without for a, loss in found.items() if not loss <= 1.1 * without} == {}
    for attack in {"flip", "noise", "weight"} & {*attacks} if method == "flexlora" else ():
        believed = held_out_loss(folder / f"{attack}-believed", attack, method, rounds, norm_factor=None)
        assert not believed <= 10 * without, attack


class CrashError(Exception):
    pass


def begun(folder: Path, attack: str | None = "nan", crash: int = 0, every: bool = False, **keys: Any) -> Run:
    """A run of four rounds in `folder`, begun or taken up; crash: round in which it breaks off; every: all clients lie."""
    table: dict[int, Ranks] = {client: {"m": (3, 4, 6)[client % 3]} for client in range(10)}
    both: Any = Regression(table, attack)
    if every:
        both.lies = lambda client: True
    honest = both.honest

    def breaking(task: TrainTask) -> ClientUpdate:
        if (task.round, task.client) == (crash, 7):
            raise CrashError
        return honest(task)

    both.honest = breaking
    values: dict[str, Any] = {"participation": 1.0, "rounds": 4, "early_stop": False, "eval_every": 0, **keys}
    config = Config(method="flexlora", **values, output_dir=folder, name="r")
    setup = Setup(config, method_of(config), {"m": (D_OUT, D_IN)}, table, "chat", both, None)
    run = Run(folder / "r") if (folder / "r" / "config.yaml").exists() else create_run(config, folder / "r", {})
    quiet = lambda event, facts: None  # noqa: E731
    return run_rounds(setup, both, run, last_standing(setup, run, quiet), quiet)


@pytest.mark.parametrize(
    ("attack", "keys"),
    [("nan", {}), ("flip", {"norm_factor": 2.0}), ("flip", {"norm_factor": 2.0, "norm_action": "clip"}), ("noise", {"robust": True})],
)  # fmt: skip
def test_with_rejections_a_run_taken_up_again_is_the_same_run(
    tmp_path: Path, attack: str, keys: dict[str, Any]
) -> None:
    """What the guard remembers of earlier rounds is saved to the last bit."""
    alone = begun(tmp_path / "alone", attack, **keys)
    for round in (2, 3, 4):
        with pytest.raises(CrashError):
            begun(tmp_path / "cut", attack, crash=round, **keys)
    again = begun(tmp_path / "cut", attack, **keys)
    blob = "checkpoints/round-0004/state.safetensors"
    assert (again.folder / blob).read_bytes() == (alone.folder / blob).read_bytes()
    without = [[{k: v for k, v in line.items() if k != "seconds"} for line in run.metrics] for run in (again, alone)]
    assert without[0] == without[1]
    if attack == "nan" or (keys.get("norm_action") is None and "norm_factor" in keys):
        assert sum(line["rejected"] for line in alone.metrics) >= 2
    assert sorted(p.name for p in again.folder.iterdir()) == sorted(p.name for p in alone.folder.iterdir())


def test_a_round_of_liars_stops_the_run_with_its_state_saved(tmp_path: Path) -> None:
    begun(tmp_path, None, rounds=2)
    saved = (tmp_path / "r" / "checkpoints" / "round-0002" / "state.safetensors").read_bytes()
    with pytest.raises(
        FlexLoraError, match=r"round 3: too few clients answered in 3 attempts.*rejected.*round 2 is saved"
    ):
        begun(tmp_path, "nan", every=True)
    assert (tmp_path / "r" / "checkpoints" / "round-0002" / "state.safetensors").read_bytes() == saved
    assert [line["round"] for line in begun(tmp_path, None).metrics] == [1, 2, 3, 4]


def test_rejections_are_counted_and_named_and_touch_nothing(tmp_path: Path) -> None:
    for folder, attack in (("nan", "nan"), ("gone", None)):
        held_out_loss(tmp_path / folder, attack, "flexlora", 2)
    lines = [json.loads(text) for text in (tmp_path / "nan" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rejected"] for line in lines] == [4, 4]
    assert [c["id"] for c in lines[0]["failed"]] == [0, 5, 10, 15]
    assert {c["failed"] for c in lines[0]["failed"]} == {"rejected: m has values that are not finite"}
    assert len(lines[0]["clients"]) == 16
