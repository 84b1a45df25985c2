"""The paper's size: 1,613 clients at 5 % participation on a tiny model touch only what the sampled clients need."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexlora import Config, client, run, sampling
from flexlora.data import federation
from flexlora.types import ClientRule, Download, LocalTraining, LowRank, TrainTask
from tiny import tiny_federation, tiny_model

CLIENTS = 1613


def test_1613_clients_at_five_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = federation.read_records

    def noted(path: Path, *args: Any, **keys: Any) -> Any:
        read.append(Path(path).name)
        return real(path, *args, **keys)

    monkeypatch.setattr(federation, "read_records", noted)
    data = tiny_federation(tmp_path / "data", CLIENTS, train=1, eval=1, test=1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    done = run(
        Config(
            model=str(tiny_model(tmp_path / "model", **sizes)),
            data=data,
            participation=0.05,
            rounds=2,
            ranks={"types": {"a": 1, "b": 2, "c": 3, "d": 4}, "distribution": "heavy_tail"},
            validation_examples=16,
            eval_every=0,
            output_dir=tmp_path,
            name="r",
        )
    )
    rounds = [set(sampling.participants(range(CLIENTS), 0.05, seed=42, round=r)) for r in (1, 2)]
    assert [{c["id"] for c in line["clients"]} for line in done.metrics] == rounds
    assert all(len(line["clients"]) == 80 for line in done.metrics)
    training = {name for name in read if name.startswith("local_training")}
    assert training == {f"local_training_{c}.json" for c in rounds[0] | rounds[1]}
    assert len({name for name in read if name.startswith("local_eval")}) == 16
    assert not [name for name in read if name.startswith("local_test")]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_a_client_kept_follows_its_rank(tmp_path: Path, rank: int) -> None:
    site: Any = SimpleNamespace(kept=tmp_path)
    kept = LowRank(torch.arange(8.0).reshape(4, 2), torch.ones(2, 3))
    download = Download({"m": kept}, {}, ClientRule(keep=("B",)))
    client.keep(site, TrainTask(1, 7, {"m": 2}, download, LocalTraining(), 0), {"m": kept})
    sent = LowRank(torch.full((4, rank), 9.0), torch.full((rank, 3), 5.0))
    mine = client.with_kept(site, 7, 2, Download({"m": sent}, {}, ClientRule(keep=("B",)))).adapter["m"]
    assert isinstance(mine, LowRank)
    both = min(rank, 2)
    assert torch.equal(mine.B[:, :both], kept.B[:, :both])
    assert torch.equal(mine.B[:, both:], torch.zeros(4, rank - both))
    assert torch.equal(mine.A, sent.A)
