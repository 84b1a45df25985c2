"""`flexlora demo` on a tiny model: what it prints, and that its scores are those of the model that it saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flexlora import demo
from flexlora.data.federation import open_federation
from flexlora.scorer import ModelScorer
from flexlora.trained import open_trained, score
from flexlora.types import FlexLoraError
from tiny import tiny_model


def test_demo_tells_what_the_federation_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"model": str(tiny_model(tmp_path / "M")), "rounds": 2, "max_new_tokens": 3, "cutoff_len": 64}
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS | tiny | {"validation_examples": 4})
    file = io.StringIO()
    console = Console(file=file, width=80)
    done = demo.demo(console, output_dir=tmp_path / "runs", name="d", seed=3, cache_dir=None, quiet=True)
    said = file.getvalue()
    assert [line["round"] for line in done.metrics] == [1, 2]
    held = json.loads((done.folder / "env.json").read_text())["ranks"]
    assert held == {"4": 4, "16": 2, "16+32": 1, "32+16": 1}  # no module of the tiny model has 48
    answers = json.loads((done.folder / "answers.json").read_text())
    trained, federation = open_trained(str(done.folder)), open_federation(done.folder / "data", None)
    unseen = federation.global_test()
    title_of = {48: "new examples, own families", 32: "families nobody trained on"}
    own = [record for client in federation.clients for record in federation.test(client)]
    told = answers["new examples, own families"]
    for who, records, known in (
        ("federated", own, told["federated"]),
        ("federated", unseen, done.metrics[-1]["eval"]),
        ("base", own, told["base"]),
        ("base", unseen, done.base["eval"]),
    ):
        if who == "base":
            trained.model.detach()
        again = score(trained, records)
        assert known["loss"] == pytest.approx(again.loss, rel=1e-5)
        assert known["rougeL"] == pytest.approx(again.rougeL, rel=1e-5)
        row = next(line for line in said.splitlines() if line.startswith(title_of[len(records)]))
        assert f"{again.loss:.3f}" in row
    assert f"report: {done.folder / 'report.html'}" in said
    assert "Answers: new examples, own families" in (done.folder / "report.html").read_text()
    assert f"next: flexlora generate {done.folder} --prompt" in said
    with pytest.raises(FlexLoraError, match="a run stands there already"):
        demo.demo(console, output_dir=tmp_path / "runs", name="d", seed=3, cache_dir=None, quiet=True)


def test_scores_that_the_best_round_got_in_the_end_are_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = {"model": str(tiny_model(tmp_path / "M")), "rounds": 2, "max_new_tokens": 3, "cutoff_len": 64}
    monkeypatch.setattr(demo, "SETTINGS", demo.SETTINGS | tiny | {"validation_examples": 4})
    losses = iter((3.0, 1.0, 2.0))  # of the base model, and of a first round that is scored after the second
    monkeypatch.setattr(ModelScorer, "validate", lambda *_: {"loss": next(losses)})
    scored: list[int] = []
    monkeypatch.setattr(demo, "score", lambda trained, x: scored.append(len(x)) or score(trained, x))
    console = Console(file=io.StringIO(), width=80)
    done = demo.demo(console, output_dir=tmp_path / "runs", name="d", seed=3, cache_dir=None, quiet=True)
    assert done.best_round == done.metrics[-1]["eval_best"]["round"] == 1
    assert scored == [48, 48]  # the base's and the federated model's own families


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"name": ".."}, "name: a name is one folder name"),
        ({"name": "a/b"}, "name: a name is one folder name"),
    ],
)
def test_bad_values_are_one_line_and_nothing_is_written(tmp_path: Path, keys: dict[str, Any], line: str) -> None:
    given = {"output_dir": tmp_path / "runs", "name": None, "seed": 1, "cache_dir": None, "quiet": True} | keys
    with pytest.raises(FlexLoraError, match=line) as caught:
        demo.demo(Console(file=io.StringIO()), **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
