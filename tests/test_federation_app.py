"""A whole federation in this process: the app's two sides over a grid that hands messages straight to the sites."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from safetensors.torch import load

from flexlora import Config, client
from flexlora.federate import serve
from flexlora.rundir import read_metrics
from flexlora.runners import flower
from flexlora.runners.flower_folder import run_keys, write_folder
from flexlora.types import FlexLoraError
from town import Town, participants, state_of

pytestmark = pytest.mark.usefixtures("sites_here")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the server's runner sees, in a list of one; sleeping takes one of them, whatever it was asked for."""
    now = [0.0]
    monkeypatch.setattr(flower.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(flower.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 1))
    return now


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"wire_dtype": "bfloat16"},
        {"method": "rolora"},
        {"baseline": "slora", "sparse_rounds": 1},
        {"method": "flora"},
        {"method": "hetlora", "prune_gamma": 0.5},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())) or "flexlora",
)
def test_the_state_is_that_of_the_local_runner(tiny: tuple[Path, Path], tmp_path: Path, keys: dict[str, Any]) -> None:
    town = Town(tiny, tmp_path, **keys)
    town.join(0, 1, 2, 3)
    done, here = town.serve(), town.local(tiny)
    assert participants(done) == participants(here) == [[0, 1, 2, 3]] * 2
    for round in (1, 2):
        assert state_of(done, round) == state_of(here, round)
    up = [[(c["bytes_up"], c["bytes_down"]) for c in line["clients"]] for line in read_metrics(done.folder)]
    assert up == [[(c["bytes_up"], c["bytes_down"]) for c in line["clients"]] for line in read_metrics(here.folder)]


def test_what_a_method_is_told_was_sent_is_what_left(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[int, Any] = {}
    honest = client.arrived

    def watched(*words: Any) -> Any:
        update: Any = honest(*words)
        told[update.client] = update.sent
        return update

    monkeypatch.setattr(client, "arrived", watched)
    town = Town(tiny, tmp_path, rounds=1, wire_dtype="bfloat16")
    town.join(0, 1, 2, 3)
    done = town.serve()
    assert sorted(told) == [0, 1, 2, 3]
    (line,) = read_metrics(done.folder)
    bytes_down = {c["id"]: c["bytes_down"] for c in line["clients"]}
    for message in town.grid.sent:
        if message.metadata.message_type == "train":
            number = 1000 - message.metadata.dst_node_id
            arrays: Any = message.content["adapters"]
            blob = arrays["adapter"].data
            assert len(blob) == bytes_down[number]
            for name, tensor in load(blob).items():
                module, _, part = name.rpartition(".")
                assert tensor.dtype == torch.bfloat16
                assert torch.equal(tensor.float(), getattr(told[number][module], part))


def test_fedsa_keeps_b_at_the_site_through_a_restart(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, method="fedsa", rounds=3)
    for site in range(4):
        town.join(site, keep=str(tmp_path / f"kept-{site}"))
    done, here = town.serve(), town.local(tiny)
    assert state_of(done, 3) == state_of(here, 3)
    for message in [*town.grid.sent, *town.grid.answered]:
        arrays: Any = message.content["adapters"]
        for array in arrays.values():
            assert all(name.endswith(".A") for name in load(array.data))
    for site in range(4):
        # What no checkpoint can go on from is gone at the site too; the last round's check comes with the next task.
        stay = {path.name for path in (here.folder / "kept" / str(site)).iterdir()}
        there = {path.name for path in (tmp_path / f"kept-{site}").rglob("round-*")}
        assert stay <= there <= stay | {"round-0001.safetensors"}
        (kept,) = (tmp_path / f"kept-{site}").rglob("round-0003.safetensors")
        assert kept.read_bytes() == (here.folder / "kept" / str(site) / "round-0003.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "kept-2")
    other = town.serve(rounds=4)
    assert state_of(other, 4) != state_of(town.local(tiny, rounds=4, name="longer"), 4)


def test_sites_keep_what_the_server_can_go_on_from_and_no_more(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, method="fedsa", rounds=7)
    town.join(0, 1, keep=str(tmp_path / "kept"))
    done = town.serve()
    best = done.best_round
    for site in "01":
        (folder,) = (tmp_path / "kept").glob(f"*/{site}")
        kept = {int(path.stem.removeprefix("round-")) for path in folder.iterdir()}
        assert {5, 6, 7} <= kept <= {5, 6, 7, best, *(line["best_round"] for line in read_metrics(done.folder)[-2:])}


def test_claims_are_capped_with_a_line(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, max_rank=4, max_examples=5, rounds=1)
    town.join(0, 1, 2, 3)
    done = town.serve()
    (line,) = read_metrics(done.folder)
    assert [c["ranks"] for c in line["clients"]] == ["2", "3", "4", "4"]
    assert {c["weight"] for c in line["clients"]} == {5.0}
    assert "site 2 says rank 8; max_rank caps it at 4" in town.notes
    assert "site 1 says examples 6; max_examples caps it at 5" in town.notes


def test_memory_becomes_a_rank_and_silence_the_runs_own(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=1, lora_r=6)
    town.join(0, 1)
    # Adapter, gradient and two moments, four bytes each, of 32·7 + 16·2 + 48·3 numbers a rank in each of two layers.
    per_rank = 16 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    for site, said in ((0, {"memory": 3 * per_rank + 5}), (1, {})):
        node = town.grid.nodes[1000 - site]
        del node["rank"]
        node.update(said)
    (line,) = read_metrics(town.serve().folder)
    assert [c["ranks"] for c in line["clients"]] == ["3", "6"]


def test_a_late_joiner_takes_part_in_the_next_round(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=3)
    town.join(0, 1)

    def late(event: str, facts: Any) -> None:
        if event == "round" and facts["round"] == 2 and facts["clients"] == [0, 1]:
            town.join(3)

    done = town.serve(late)
    assert participants(done) == [[0, 1], [0, 1], [0, 1, 3]]
    assert read_metrics(done.folder)[2]["clients"][2]["ranks"] == "5"
    assert [line["round"] for line in read_metrics(done.folder)] == [1, 2, 3]


def test_a_site_that_dies_in_a_round_is_survived_and_comes_back(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=3)
    town.join(0, 1, 2)

    def dies(message: Message) -> bool:
        group, kind = message.metadata.group_id, message.metadata.message_type
        return not (kind == "train" and group == "2" and message.metadata.dst_node_id == 999)

    town.grid.before = dies

    def back(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 2:
            town.join(1)

    done = town.serve(back)
    assert participants(done) == [[0, 1, 2], [0, 2], [0, 1, 2]]
    (failed,) = read_metrics(done.folder)[1]["failed"]
    assert failed["id"] == 1
    assert failed["failed"] == "its site failed: the node is unavailable"


class KilledError(Exception):
    pass


@pytest.mark.parametrize("method", ["flexlora-carry", "fedsa"])
def test_a_server_that_was_killed_goes_on_from_its_checkpoint(
    tiny: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    town = Town(tiny, tmp_path, rounds=3, method=method)
    town.join(0, 1, 2, 3)
    count = 0

    def killed(message: Message) -> bool:
        nonlocal count
        count += message.metadata.message_type == "train"
        if count == 7:  # the third site of round 2
            raise KilledError
        return True

    town.grid.before = killed
    with pytest.raises(KilledError):
        town.serve()
    town.grid.before = lambda message: True
    done, here = town.serve(), town.local(tiny)
    assert participants(done) == [[0, 1, 2, 3]] * 3
    assert state_of(done, 3) == state_of(here, 3)


def test_a_site_says_less_and_gets_less(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=2)
    town.join(0, 2)

    def smaller(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 1:
            town.grid.nodes[777] = {**town.grid.nodes.pop(998), "rank": 4}

    done = town.serve(smaller)
    ranks = [[c["ranks"] for c in line["clients"]] for line in read_metrics(done.folder)]
    assert ranks == [["2", "8"], ["2", "4"]]


def test_an_answer_that_flower_cannot_put_together_is_one_clients_failure(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1, 2)

    def broken(reply: Message) -> Message | Exception:
        of_site_1 = reply.metadata.message_type == "train" and reply.metadata.src_node_id == 999
        return ValueError("no JSON\nat all") if of_site_1 else reply

    town.grid.instead = broken
    (line,) = read_metrics(town.serve().folder)
    assert [c["id"] for c in line["clients"]] == [0, 2]
    assert [f["failed"] for f in line["failed"]] == ["rejected: its answer cannot be read (ValueError)"]


def test_a_site_that_leaves_its_loss_out_stops_nothing(tiny: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1)

    def silent_on_loss(reply: Message) -> Message:
        facts: Any = reply.content["facts"]
        said = json.loads(facts["json"])
        if said.get("kind") == "update":
            facts["json"] = json.dumps({**said, "metrics": {}})
        return reply

    town.grid.instead = silent_on_loss
    grid: Any = town.grid
    done = serve(grid, town.keys)
    assert participants(done) == [[0, 1]]
    assert "site 1 at rank 3: no loss" in capsys.readouterr().out


def test_who_sits_keeps_the_seat(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=4)
    town.join(0, 1)
    real = dict(town.grid.nodes)

    def intrudes(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 1:
            town.grid.nodes[5] = dict(real[1000])
        if event == "saved" and facts["round"] == 3:
            del town.grid.nodes[1000]

    done = town.serve(intrudes)
    assert participants(done) == [[0, 1]] * 4
    trained = [
        (m.metadata.group_id, m.metadata.dst_node_id) for m in town.grid.sent if m.metadata.message_type == "train"
    ]
    assert sorted(trained) == [
        ("1", 999),
        ("1", 1000),
        ("2", 999),
        ("2", 1000),
        ("3", 999),
        ("3", 1000),
        ("4", 5),
        ("4", 999),
    ]
    assert town.notes.count("site 0 is connected twice; node 5 is left out: give it another partition-id") == 1


def test_a_silent_site_is_waited_for_once(tiny: tuple[Path, Path], tmp_path: Path, clock: list[float]) -> None:
    town = Town(tiny, tmp_path, rounds=3)
    town.join(0, 1, 3)
    late: list[Message] = []

    def silent(reply: Message) -> Message | None:
        if reply.metadata.message_type.startswith("query") and reply.metadata.src_node_id == 997:
            late.append(reply)
            return None
        return reply

    town.grid.instead = silent
    waited: list[float] = []

    def answers_after_round_2(event: str, facts: Any) -> None:
        if event == "saved":
            waited.append(clock[0])
            if facts["round"] == 2:
                (name,) = (f"m{i}" for i, m in enumerate(town.grid.sent) if m.metadata.dst_node_id == 997)
                town.grid.replies[name] = late[0]

    done = town.serve(answers_after_round_2)
    assert participants(done) == [[0, 1], [0, 1], [0, 1, 3]]
    assert waited[0] >= flower.QUERY_TIMEOUT
    assert waited[1] - waited[0] < 20
    assert sum("has not said" in note for note in town.notes) == 1


def test_a_question_that_lapsed_is_asked_again(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """While a second silent site is waited for, Flower gives up the first one's question."""
    town = Town(tiny, tmp_path, rounds=4)
    town.join(0, 3)
    speaks = [False]

    def silent(reply: Message) -> Message | None:
        if reply.metadata.message_type.startswith("query") and reply.metadata.src_node_id in (997, 998):
            return reply if speaks[0] else None
        return reply

    town.grid.instead = silent
    pulled = town.grid.pull_messages

    def lapses(ids: Any) -> Any:
        (name,) = ids
        sent = town.grid.sent[int(name[1:])]
        if name not in town.grid.replies and clock[0] > when[name] + flower.QUERY_TIMEOUT + flower.GRACE:
            return [Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=sent)]
        return pulled(ids)

    when: dict[str, float] = {}
    pushed = town.grid.push_messages

    def push(messages: Any) -> Any:
        names = list(pushed(messages))
        when.update(dict.fromkeys(names, clock[0]))
        return names

    monkeypatch.setattr(town.grid, "push_messages", push)
    monkeypatch.setattr(town.grid, "pull_messages", lapses)

    def goes_on(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 1:
            clock[0] += 30
            town.join(2)
        if event == "saved" and facts["round"] == 3:
            speaks[0] = True
            clock[0] += 500

    done = town.serve(goes_on)
    assert participants(done) == [[0], [0], [0], [0, 2, 3]]


@pytest.mark.parametrize(("rank", "seats"), [(1, [[0, 3]] * 3), (8, [[0, 3], [0, 3], [0, 2, 3]])])
def test_a_late_site_of_another_rank_does_not_end_a_run_of_equal_ranks(
    tiny: tuple[Path, Path], tmp_path: Path, rank: int, seats: list[list[int]]
) -> None:
    town = Town(tiny, tmp_path, rounds=3, method="fedavg")
    town.join(0, 3, rank=2)

    def late(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 2:
            town.join(2, rank=rank)

    done = town.serve(late)
    assert participants(done) == seats
    assert {c["ranks"] for line in read_metrics(done.folder) for c in line["clients"]} == {"2"}
    assert any("site 2 takes no part" in note for note in town.notes) == (rank == 1)
    assert participants(town.serve(rounds=4))[3] == seats[-1]


@pytest.mark.parametrize(("rank", "trained"), [(3, "2"), (9, "8"), (1, None)])
@pytest.mark.parametrize(
    "keys", [{"method": "raflora"}, {"method": "raflora", "baseline": "slora", "sparse_rounds": 2}]
)
def test_raflora_gives_a_late_site_a_rank_that_it_knows(
    tiny: tuple[Path, Path], tmp_path: Path, keys: dict[str, Any], rank: int, trained: str | None
) -> None:
    town = Town(tiny, tmp_path, rounds=3, **keys)
    town.join(0, 2)

    def late(event: str, facts: Any) -> None:
        if event == "saved" and facts["round"] == 1:
            town.join(3, rank=rank)

    done = town.serve(late)
    for line in read_metrics(done.folder)[1:]:
        assert [c["ranks"] for c in line["clients"]] == ["2", "8", *([trained] if trained else [])]
        assert not line["failed"]


def test_noise_is_for_the_sites_that_there_are_whoever_is_connected(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    town = Town(tiny, tmp_path, rounds=2, method="ffa", dp_noise=1.0, lora_r=2, dp_delta=0.01)
    town.join(0, rank=2)
    with pytest.raises(FlexLoraError, match="num_clients: dp_noise needs the number of sites"):
        town.serve()
    assert not (tmp_path / "runs").exists()

    def late(event: str, facts: Any) -> None:
        if event == "saved":
            town.join(1, 3, rank=2)

    done = town.serve(late, num_clients=3)
    first, second = read_metrics(done.folder)
    assert [c["id"] for c in first["clients"]] == [0]
    assert [c["id"] for c in second["clients"]] == [0, 1]
    assert first["privacy"]["deviation"] == second["privacy"]["deviation"] == pytest.approx(1 / 3)
    assert any("site 3: the noise is for the 3 sites 0 to 2" in note for note in town.notes)


def test_sites_that_cannot_take_part_are_named(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1)
    town.grid.nodes |= {
        1: {"partition-id": 7, "data": str(tmp_path / "nowhere")},
        2: {"data": str(tmp_path / "own-0")},
        3: {"partition-id": 8},
        4: {"partition-id": 9, "data": str(tmp_path / "own-0"), "rank": "many"},
        5: {"partition-id": 0, "data": str(tmp_path / "own-1")},
    }
    done = town.serve()
    assert [c["id"] for c in read_metrics(done.folder)[0]["clients"]] == [0, 1]
    notes = "\n".join(town.notes)
    for word in (
        "nowhere",
        "partition-id: missing",
        "add data='/path'",
        "'many' is no count",
        "site 0 is connected twice",
    ):
        assert word in notes


def test_validation_is_the_sites_own(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=2)
    town.join(0, 1, 2)
    done = town.serve()
    for line in read_metrics(done.folder):
        assert line["validation"]["clients"] == 3
        assert line["validation"]["examples"] == 9
        assert 0 < line["validation"]["loss"] < 20
        assert line["eval"] == {}
    assert (done.adapter / "adapter_model.safetensors").is_file()
    assert done.best_round == min(read_metrics(done.folder), key=lambda line: line["validation"]["loss"])["round"]


def test_what_the_server_cannot_do_is_one_line(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path)
    town.join(0, 1)
    impossible: list[tuple[dict[str, Any], str]] = [
        ({"method": "fedavg"}, "equal ranks"),
        ({"name": "none"}, "name"),
        ({"prompt_template": "mine.json"}, "built-in"),
        ({"min_clients": 9, "round_timeout": 0.01}, "9 are needed"),
        ({"ronds": 3}, "rounds"),
    ]
    for keys, word in impossible:
        with pytest.raises(FlexLoraError, match=word):
            town.serve(**keys)


def test_the_run_of_another_method_is_not_gone_on_with(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    town = Town(tiny, tmp_path, rounds=1)
    town.join(0, 1)
    done = town.serve()
    before = state_of(done, 1)
    with pytest.raises(FlexLoraError, match="method is 'rolora' now and was 'flexlora'"):
        town.serve(method="rolora", rounds=2)
    assert state_of(done, 1) == before
    assert participants(town.serve(rounds=2)) == [[0, 1]] * 2


def test_the_folder_of_init_is_a_configuration_and_its_keys_are_secret(tmp_path: Path) -> None:
    import stat
    import tomllib

    write_folder(tmp_path / "fed", 3, "flower.example.org", 9000)
    app = tomllib.loads((tmp_path / "fed" / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    keys = dict(app["config"])
    assert Config(**keys).min_clients == 3
    assert "trust_remote_code" not in run_keys(2, tmp_path)
    for name in ("server/ca.key", "server/server.key", "sites/site-2/key"):
        assert stat.S_IMODE((tmp_path / "fed" / name).stat().st_mode) == 0o600
    text = (tmp_path / "fed" / "README.md").read_text()
    for word in (
        "flower.example.org:9000",
        "--host 0.0.0.0",
        "/v1/control",
        "--enable-supernode-auth",
        "site-2",
        "supernode list prod",
    ):
        assert word in text
    with pytest.raises(FlexLoraError, match="exists already"):
        write_folder(tmp_path / "fed")


@pytest.mark.parametrize(
    ("host", "listens", "reached"),
    [
        ("localhost", "127.0.0.1", "localhost"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "[::1]"),
        ("2001:db8::7", "::", "[2001:db8::7]"),
        ("192.0.2.7", "0.0.0.0", "192.0.2.7"),
    ],
)
def test_an_address_of_any_kind_is_written_as_flower_takes_it(
    tmp_path: Path, host: str, listens: str, reached: str
) -> None:
    import tomllib

    folder = tmp_path / "fed"
    write_folder(folder, 1, host, 9000)
    text = (folder / "README.md").read_text()
    assert f"flower-superlink --host {listens} --port 9000 " in text
    assert f"flower-supernode --superlink {reached}:9000 " in text
    home = tomllib.loads((folder / "home" / "config.toml").read_text())
    assert home["superlink"]["prod"]["address"] == f"{reached}:9000"
