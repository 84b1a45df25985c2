"""What leaves a site: every message of a run is read."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Message
from safetensors.torch import load

from flexlora import training
from flexlora.rundir import read_metrics
from town import RANKS, Town

pytestmark = pytest.mark.usefixtures("sites_here")


SECRET = "the patient is called Elfriede Vogelsang"


@pytest.mark.parametrize("kind", [RuntimeError, TypeError, UnicodeError])
def test_an_error_that_quotes_the_data_stays_at_the_site(
    tiny: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[Exception],
) -> None:
    honest = training.train_client

    def quoting(model: Any, task: Any, examples: Any) -> Any:
        if task.client == 1:
            raise kind(f"cannot train on {SECRET}")
        return honest(model, task, examples)

    monkeypatch.setattr(training, "train_client", quoting)
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1)
    done = town.serve()
    (line,) = read_metrics(done.folder)
    (failed,) = line["failed"]
    assert (failed["id"], failed["failed"]) == (1, f"{kind.__name__}; its site's log says more")
    assert not [message for message in town.grid.answered if SECRET.encode() in content(message)]
    assert SECRET in capsys.readouterr().err


def content(message: Message) -> bytes:
    """Everything that a message says."""
    assert not message.has_error()
    record, arrays = message.content["facts"], message.content["adapters"]
    assert isinstance(record, ConfigRecord)
    blobs: Any = arrays
    return b"".join([*(str(v).encode() for v in record.values()), *(array.data for array in blobs.values())])


def test_only_adapters_counts_and_figures_leave_a_site(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path)
    town.join(0, 1)
    town.serve()
    words = [
        record[key]
        for site in (0, 1)
        for record in json.loads((tmp_path / f"own-{site}" / "local_training_0.json").read_text())
        for key in ("input", "output", "instruction")
        if len(record[key]) > 3
    ]
    assert len(words) > 10
    kinds = set()
    for message in town.grid.answered:
        assert set(message.content) == {"facts", "adapters"}
        record = message.content["facts"]
        assert isinstance(record, ConfigRecord)
        assert set(record) == {"json", "run"}
        facts = json.loads(str(record["json"]))
        kind = message.metadata.message_type
        kinds.add(kind)
        allowed = {
            "query.capabilities": {"client", "examples", "rank"},
            "train": {"kind", "client", "weight", "round", "base", "metrics"},
            "evaluate": {"kind", "client", "loss_sum", "tokens", "examples"},
        }[kind]
        assert set(facts) == allowed
        assert all(isinstance(v, (int, float)) for v in facts.get("metrics", {}).values())
        arrays: Any = message.content["adapters"]
        assert list(arrays) == (["adapter"] if kind == "train" else [])
        for array in arrays.values():
            tensors = load(array.data)
            assert {name.rsplit(".", 1)[-1] for name in tensors} == {"A", "B"}
            rank = RANKS[facts["client"]]
            assert {t.shape[0 if n.endswith("A") else 1] for n, t in tensors.items()} == {rank}
        assert not [word for word in words if word.encode() in content(message)]
    assert kinds == {"query.capabilities", "train", "evaluate"}


def test_a_chat_templates_reason_stays_at_the_site() -> None:
    from jinja2 import TemplateError

    from flexlora.runners.flower import discreet
    from flexlora.types import FlexLoraError

    refused = FlexLoraError("the template refuses (no such role: SECRET)")
    refused.__cause__ = TemplateError("no such role: SECRET")
    assert discreet(refused) == "FlexLoraError; its site's log says more"
    assert discreet(FlexLoraError("local_training_0.json: record 3")) == "local_training_0.json: record 3"
