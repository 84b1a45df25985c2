"""How a federation begins: what cannot be is said before anything is written, and no site ends the run of the others."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr")

from flwr.app import Message

from flexlora.rundir import Run, read_metrics
from flexlora.types import FlexLoraError
from town import Town, participants, state_of

pytestmark = pytest.mark.usefixtures("sites_here")


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def ranks_of(done: Run) -> list[list[str]]:
    return [[c["ranks"] for c in line["clients"]] for line in read_metrics(done.folder)]


def test_what_cannot_be_leaves_nothing_and_is_put_right_under_the_same_name(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip("dp_accounting")
    keys = {"method": "ffa", "dp_noise": 1.0, "dp_delta": 0.01, "num_clients": 3, "lora_r": 2, "rounds": 1}
    town = Town(tiny, tmp_path, **keys)
    town.join(0, 1, 2, rank=2)
    adapter = town.serve(name="first").adapter
    impossible: list[tuple[dict[str, Any], str]] = [
        ({"min_clients": 2}, "min_clients: does not go with dp_noise"),
        ({"method": "hetlora"}, "dp_noise: method hetlora has no differential privacy here"),
        ({"dp_noise": "none", "method": "fedsa", "init_adapter": str(adapter)}, "init_adapter: method fedsa cannot"),
        (
            {"dp_noise": "none", "ranks": "auto"},
            "ranks: auto and client_memory are for clients on one machine; .*memory=",
        ),
        (
            {"dp_noise": "none", "client_memory": "0=2GB"},
            "ranks: auto and client_memory are for clients on one machine",
        ),
        (
            {"dp_noise": "none", "min_clients": 3, "participation": 0.5},
            r"a round needs 3 answers and participation 0\.5 draws 1 of 3 clients",
        ),
    ]
    for changed, line in impossible:
        with pytest.raises(FlexLoraError, match=line):
            town.serve(**changed)
        assert written(tmp_path / "runs" / "federation") == []
    assert participants(town.serve(min_clients=1)) == [[0, 1, 2]]


class KilledError(Exception):
    pass


def test_a_start_that_came_to_nothing_gives_way(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1)

    def killed(message: Message) -> bool:
        if message.metadata.message_type == "train":
            raise KilledError
        return True

    town.grid.before = killed
    with pytest.raises(KilledError):
        town.serve()
    folder = tmp_path / "runs" / "federation"
    token = json.loads((folder / "env.json").read_text())["run"]
    town.grid.before = lambda message: True
    done = town.serve(method="rolora")
    assert done.config.method == "rolora"
    assert json.loads((folder / "env.json").read_text())["run"] == token
    before = state_of(done, 1)
    with pytest.raises(FlexLoraError, match="method is 'flexlora' now and was 'rolora'"):
        town.serve()
    assert state_of(done, 1) == before


def test_the_folder_of_a_run_on_this_machine_is_refused(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1)
    here = town.local(tiny)
    before = written(here.folder)
    with pytest.raises(FlexLoraError) as caught:
        town.serve(name="local")
    assert str(caught.value) == f"name: {here.folder} is no run of a federation; choose another name"
    assert written(here.folder) == before


def test_a_site_without_a_rank_takes_no_part_whenever_it_comes(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "ranks.yaml"
    path.write_text(yaml.safe_dump({"clients": {0: 2, 1: 3}}))
    town = Town(tiny, tmp_path, rounds=2, ranks=str(path))
    town.join(0, 1, 2, 3)
    for site in range(3):
        del town.grid.nodes[1000 - site]["rank"]
    late = town.grid.nodes.pop(997)
    del late["rank"]

    def comes(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 1:
            town.grid.nodes[997] = late

    done = town.serve(comes)
    assert ranks_of(done) == [["2", "3"]] * 2
    for site in (2, 3):
        reason = f"ranks: client {site} has no rank type; name it under clients, or give shares"
        assert town.notes.count(f"site {site} takes no part: {reason}") == 1
    town = Town(tiny, tmp_path, ranks=str(path), name="nobody", round_timeout=0.01)
    town.grid.nodes[997] = late
    with pytest.raises(FlexLoraError, match="min_clients: 0 sites are connected and 1 are needed"):
        town.serve()


def test_a_federation_waits_until_enough_sites_can_be_drawn(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=1, min_clients=2, participation=0.5, round_timeout=0.01)
    town.join(0, 1)
    with pytest.raises(FlexLoraError, match="min_clients: 2 sites are connected and 4 are needed for rounds of 2"):
        town.serve()
    assert written(tmp_path / "runs" / "federation") == []
    town.join(2, 3)
    assert [len(clients) for clients in participants(town.serve(round_timeout=60))] == [2]


def test_enough_sites_are_those_that_can_take_part(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "ranks.yaml"
    path.write_text(yaml.safe_dump({"clients": {0: 2}}))
    town = Town(tiny, tmp_path, rounds=2, ranks=str(path), min_clients=2)
    town.join(1, 2)
    del town.grid.nodes[999]["rank"]

    def comes(event: str, facts: Any) -> None:
        if event == "note" and facts["text"].startswith("waiting for sites: 1 of 2"):
            town.join(3)
        if event == "saved" and facts["round"] == 1:
            town.grid.nodes[777] = {**town.grid.nodes.pop(999), "rank": 3}  # started again, with a rank now

    assert ranks_of(town.serve(comes)) == [["8", "5"], ["3", "8", "5"]]


@pytest.mark.parametrize(("rank", "sites"), [(8, [0, 1, 2]), (1, [0, 1])])
def test_a_site_of_another_rank_does_not_end_a_run_of_equal_ranks_before_it_begins(
    tiny: tuple[Path, Path], tmp_path: Path, rank: int, sites: list[int]
) -> None:
    town = Town(tiny, tmp_path, rounds=1, method="fedavg")
    town.join(0, 1, rank=2)
    town.join(2, rank=rank)
    done = town.serve()
    assert participants(done) == [sites]
    assert ranks_of(done) == [["2"] * len(sites)]
    assert sum("site 2 takes no part: method fedavg has no ranks as small" in n for n in town.notes) == (rank == 1)
    assert participants(town.serve(rounds=2)) == [sites] * 2


def test_ranks_that_are_stated_equally_often_are_no_equal_ranks(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, method="fedavg")
    town.join(0, 1)
    with pytest.raises(FlexLoraError, match="method fedavg needs equal ranks, and the sites say different ones"):
        town.serve()
    assert written(tmp_path / "runs") == []
