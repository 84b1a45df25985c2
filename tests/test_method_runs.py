"""Every method in a real run on a tiny model: it trains, the log tells its rounds, and a resumed run ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexlora import Config, run
from flexlora.launch import resume
from flexlora.rundir import Run
from tiny import tiny_federation, tiny_model

RANKS = {"types": {"a": 2, "b": {"q_proj": 3, "down_proj": 5, "*": 4}, "c": 6}, "clients": dict(enumerate("aabc"))}
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"ranks": "homo", "lora_r": 4},
    "flexlora": {},
    "flexlora-carry": {"method_options": {"eta": 0.8, "momentum": 0.3, "keep_rank": 8}},
    "raflora": {},
    "hetlora": {"handle_alpha": True, "prune_gamma": 0.5},
    "flora": {},
    "fedex": {"ranks": "homo", "lora_r": 4},
    "ffa": {"method_options": {"increments": True}},
    "rolora": {},
    "fedsa": {},
    "rbla": {},
    "florist": {"method_options": {"threshold": 0.8}},
    "slora, then flexlora": {"method": "flexlora", "baseline": "slora", "sparse_rounds": 2},
    "slora, then fedavg": {
        "method": "fedavg",
        "baseline": "slora",
        "sparse_rounds": 2,
        "ranks": "homo",
        "lora_r": 4,
    },
    "slora, then flexlora-carry": {"method": "flexlora-carry", "baseline": "slora", "sparse_rounds": 1},
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny_methods")
    return tiny_model(folder / "model"), tiny_federation(folder / "data", 4)


def config(tiny: tuple[Path, Path], folder: Path, **keys: Any) -> Config:
    values = {
        "model": str(tiny[0]),
        "data": tiny[1],
        "ranks": RANKS,
        "participation": 0.75,
        "rounds": 3,
        "output_dir": folder,
        "name": "r",
        "eval_every": 0,
        "early_stop": False,
        "validation_examples": 4,
        "learning_rate": 0.02,
        "lora_target_modules": ("q_proj", "down_proj", "v_proj"),
        **keys,
    }
    return Config(**values)


def kept(found: Run) -> dict[str, Any]:
    """What must not differ: metrics without times, and all bytes of the last state and the adapter."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in found.metrics]
    for line in lines:
        line["clients"] = [{k: v for k, v in c.items() if k != "seconds"} for c in line["clients"]]
    last = max(found.checkpoints.glob("round-*"))
    files = [last / "state.safetensors", *sorted(found.adapter.glob("*.safetensors"))]
    return {"metrics": lines, "files": [f.read_bytes() for f in files]}


@pytest.mark.parametrize("case", METHODS)
def test_a_run_and_its_resumption(case: str, tiny: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"method": case, **METHODS[case]}
    whole = run(config(tiny, tmp_path / "whole", **options))
    first = run(config(tiny, tmp_path / "parts", **{**options, "rounds": 2}))
    parts = resume(first.folder, rounds=3)
    assert kept(parts) == kept(whole)

    assert [line["round"] for line in whole.metrics] == [1, 2, 3]
    for line in whole.metrics:
        assert line["clients"]
        for client in line["clients"]:
            assert client["bytes_up"] > 0
            assert client["bytes_down"] > 0
        if case != "fedsa":
            assert 0 < line["validation"]["loss"] < 20
            assert all(0 <= share <= 1 for share in line["energy"].values())


def test_half_the_upload(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """ffa, rolora and fedsa send one factor; a base delta counts in full."""
    bytes_up, bytes_down = {}, {}
    for name in ("flexlora", "ffa", "rolora", "fedsa", "flora"):
        found = run(config(tiny, tmp_path / name, method=name, ranks="homo", lora_r=8, rounds=2))
        bytes_up[name] = sum(c["bytes_up"] for line in found.metrics for c in line["clients"])
        bytes_down[name] = sum(c["bytes_down"] for line in found.metrics[1:] for c in line["clients"])
    for name in ("ffa", "rolora", "fedsa"):
        assert bytes_up[name] < 0.7 * bytes_up["flexlora"], name
    # 3 clients of rank 8 stacked: the base delta alone is three adapters
    assert bytes_down["flora"] > 3 * bytes_down["flexlora"]


def test_hetlora_prunes_and_later_rounds_respect_it(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    found = run(
        config(tiny, tmp_path, method="hetlora", participation=1.0, prune_gamma=0.5, prune_lambda=10.0, rounds=4)
    )
    ranks = [{c["id"]: c["ranks"] for c in line["clients"]} for line in found.metrics]
    assert str(ranks[0]) != str(ranks[-1])
