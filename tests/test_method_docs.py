"""docs/methods.md is what the code says, and the method in docs/adding-a-method.md works as printed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import method_oracles as oracle
from flexlora import lowrank
from flexlora.checkpoint import read_checkpoint, write_checkpoint
from flexlora.config import Config
from flexlora.methods import base, get_method, method_entry
from flexlora.types import ClientUpdate, FlexLoraError, LowRank

DOCS = Path(__file__).parents[1] / "docs"
BUILT_IN = [e.name for e in base._entries.values() if e.make.__module__.startswith("flexlora.methods.")]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("table", ["overview", "features", "behaviour", "collapse"])
def test_the_page_is_what_the_code_says(table: str) -> None:
    tables = load("methods_tables", DOCS / "methods_tables.py")
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    begin, end = tables.BEGIN.format(table), tables.END.format(table)
    shown = page.split(begin)[1].split(end)[0].strip()
    assert shown == tables.TABLES[table](BUILT_IN).strip(), "run `python docs/methods_tables.py`"


def test_every_method_and_option_has_its_words() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rules = page.split("## The rules")[1]
    for name in BUILT_IN:
        assert re.search(rf"^\*\*{name}(\.\*\*|\*\*)", rules, re.M), name
        for option in method_entry(name).options:
            assert option in page, f"{name}: {option}"


def test_the_table_of_options_has_the_defaults_of_the_code() -> None:
    options: dict[tuple[str, str, str], list[str]] = {}
    for name in BUILT_IN:
        entry = method_entry(name)
        for option in entry.options:
            default = inspect.signature(entry.make).parameters[option].default
            shown = default if isinstance(default, str) else json.dumps(default)
            given = f"`--{option if option in Config.model_fields else 'method_options'}`"
            if given == f"`--{option}`":
                assert Config.model_fields[option].default == default
            options.setdefault((f"`{option}`", shown, given), []).append(name)
    wanted = [
        f"| {option} | {', '.join(names)} | {shown} | {given} |" for (option, shown, given), names in options.items()
    ]
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    table = page.split("## Options")[1].split("\n## ")[0]
    assert re.findall(r"^\| `.*$", table, re.MULTILINE) == wanted


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The first block of the page, as a file of a user's own, imported; gone again afterwards."""
    monkeypatch.setattr(base, "_entries", dict(base._entries))
    page = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert 20 <= len([line for line in code.splitlines() if line.strip()]) <= 32
    (tmp_path / "my_methods.py").write_text(code, encoding="utf-8")
    yield load("my_methods", tmp_path / "my_methods.py")
    del sys.modules["my_methods"]


def test_the_printed_method_works(third_party: ModuleType, tmp_path: Path) -> None:
    method = get_method("power-mean", power=0.5)
    state: Any = method.init({"q": (7, 9), "v": (7, 9)}, 0)
    rng = np.random.default_rng(0)
    clients = [oracle.Client(rng.normal(size=(7, r)), rng.normal(size=(r, 9)), 2.0, w) for r, w in ((2, 4), (3, 9))]
    updates = []
    for i, c in enumerate(clients):
        x = LowRank(torch.tensor(c.B).float(), torch.tensor(c.lora_A).float())
        updates.append(ClientUpdate(i, c.weight, {"q": x}))
    state = method.aggregate(state, iter(updates))
    want = oracle.flexlora([c._replace(weight=c.weight**0.5) for c in clients])
    np.testing.assert_allclose(lowrank.delta(method.delta(state)["q"]).numpy(), want, atol=1e-5)
    assert not lowrank.delta(method.delta(state)["v"]).any()
    x = method.distribute(state, {"q": 2, "v": 1}).adapter["q"]
    assert isinstance(x, LowRank)
    np.testing.assert_allclose(lowrank.delta(x).numpy(), oracle.best(want, 2), atol=1e-5)
    with pytest.raises(ValueError, match="at least one client update"):
        method.aggregate(state, [])
    back, _ = read_checkpoint(write_checkpoint(tmp_path, 1, state, {}), method.init({"q": (7, 9), "v": (7, 9)}, 0))
    assert torch.equal(back.W["q"].B, state.W["q"].B)
    with pytest.raises(FlexLoraError, match="has no option 'pow'"):
        get_method("power-mean", pow=1)
    with pytest.raises(ValueError, match="registered already"):
        third_party.register("power-mean", third_party.power_mean)
