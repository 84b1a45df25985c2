"""Every file in configs/ is one that the program takes, and every method has one for every distribution that it can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexlora.config import make_config, read_config
from flexlora.launch import method_of, refuse_unequal
from flexlora.methods import base, get_method
from flexlora.ranks import read_plan
from flexlora.sweep import read_sweep

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(p for p in CONFIGS.glob("*/*.yaml"))
DISTRIBUTIONS = ("homo", "random", "heavy_tail", "heavy_tail_strong", "normal")
BUILT_IN = [e.name for e in base._entries.values() if e.make.__module__.startswith("flexlora.methods.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_configuration_is_taken(path: Path) -> None:
    config = make_config(read_config(path), str(path))
    method = method_of(config)
    refuse_unequal(config, method, read_plan(config.ranks, lora_r=config.lora_r, hidden_size=2048))
    assert config.ranks == path.parent.name
    assert (config.baseline if path.stem == "slora" else config.method) == path.stem
    # the command in its head is its own
    assert f"flexlora run configs/{path.parent.name}/{path.name} --data DIR" in path.read_text(encoding="utf-8")


def test_none_is_missing() -> None:
    wanted = {
        (kind, name)
        for kind in DISTRIBUTIONS
        for name in BUILT_IN
        if kind == "homo" or not get_method(name).equal_ranks
    }
    assert {(p.parent.name, p.stem) for p in FILES} == wanted


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_sweep_is_taken(path: Path) -> None:
    sweep = read_sweep(path)
    assert len(sweep.runs) > 1
    for config in sweep.runs.values():
        refuse_unequal(config, method_of(config), read_plan(config.ranks, lora_r=config.lora_r, hidden_size=576))
