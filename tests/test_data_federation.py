"""Opening federations: the release's layout, lazily, with one line for what is missing or changed."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from flexlora.data.federation import Federation, open_federation, permutation
from flexlora.types import FlexLoraError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def rows(client: int, kind: str, count: int) -> list[dict[str, Any]]:
    return [
        {"instruction": "Say it.", "input": f"{kind} {client} {i}", "output": str(i), "category": f"c{client}"}
        for i in range(count)
    ]


def write(folder: Path, clients: int, sizes: dict[str, int] | None = None) -> Path:
    inner = folder / str(clients)
    inner.mkdir(parents=True)
    for client in range(clients):
        for kind, count in (sizes or {"training": 4, "eval": 3, "test": 2}).items():
            (inner / f"local_{kind}_{client}.json").write_text(json.dumps(rows(client, kind, count)))
    (inner / "global_test.json").write_text(json.dumps(rows(99, "global", 5)))
    return folder


def inputs(records: list[Any]) -> list[str]:
    return [record.input for record in records]


def test_outer_and_inner_folder_are_the_same_federation(tmp_path: Path):
    write(tmp_path, 12)
    for opened in (
        open_federation(tmp_path, 12),
        open_federation(tmp_path),
        open_federation(tmp_path / "12", 12),
        open_federation(str(tmp_path / "12")),
    ):
        assert opened.clients == tuple(range(12))
        assert len(opened) == 12
        assert inputs(opened.train(11)) == [f"training 11 {i}" for i in range(4)]
        assert inputs(opened.eval(0)) == [f"eval 0 {i}" for i in range(3)]
        assert inputs(opened.test(5)) == ["test 5 0", "test 5 1"]
        assert len(opened.global_test()) == 5


def test_a_single_client_and_optional_files(tmp_path: Path):
    inner = tmp_path / "1"
    inner.mkdir()
    (inner / "local_training_0.json").write_text(json.dumps(rows(0, "training", 1)))
    federation = open_federation(tmp_path)
    assert (federation.eval(0), federation.test(0), federation.global_test()) == ([], [], [])
    with pytest.raises(FlexLoraError, match="no client has an eval example"):
        federation.validation_sample(4, 0)
    assert federation.validation_sample(0, 0) == []
    (tmp_path / "global_test.json").write_text(json.dumps(rows(9, "outer", 2)))
    assert len(open_federation(tmp_path).global_test()) == 2
    (inner / "local_eval_0.json").write_text("[]")
    assert open_federation(tmp_path).eval(0) == []


def test_only_what_is_asked_for_is_read(tmp_path: Path):
    write(tmp_path, 30)
    for path in (tmp_path / "30").glob("*.json"):
        path.write_text("{broken")
    federation = open_federation(tmp_path)
    (tmp_path / "30" / "local_training_7.json").write_text(json.dumps(rows(7, "training", 2)))
    assert len(federation.train(7)) == 2
    with pytest.raises(FlexLoraError, match=r"local_training_8\.json: broken JSON"):
        federation.train(8)


def test_the_validation_sample_is_fixed_spread_and_touches_few_files(tmp_path: Path):
    write(tmp_path, 20)
    federation = open_federation(tmp_path)
    sample = federation.validation_sample(8, 42)
    assert sample == open_federation(tmp_path).validation_sample(8, 42)
    assert sample != federation.validation_sample(8, 43)
    assert len({record.category for record in sample}) == 8
    assert len(open_federation(tmp_path).fingerprint()["sha256"]) == 0
    fresh = open_federation(tmp_path)
    fresh.validation_sample(8, 42)
    assert len(fresh.fingerprint()["sha256"]) == 8  # files read
    more = federation.validation_sample(45, 42)
    assert more[:8] == sample
    counts = {f"c{i}": [record.category for record in more].count(f"c{i}") for i in range(20)}
    assert set(counts.values()) == {2, 3}
    assert sorted(inputs(federation.validation_sample(1000, 42))) == sorted(
        f"eval {client} {i}" for client in range(20) for i in range(3)
    )


def test_the_fingerprint_names_what_changed(tmp_path: Path):
    write(tmp_path, 6)
    federation = open_federation(tmp_path)
    federation.train(2)
    federation.global_test()
    before = json.loads(json.dumps(federation.fingerprint()))
    open_federation(tmp_path).check_unchanged(before)

    def refuses(says: str, federation: Federation | None = None) -> None:
        with pytest.raises(FlexLoraError, match=says):
            (federation or open_federation(tmp_path)).check_unchanged(before)

    inner = tmp_path / "6"
    path = inner / "local_training_2.json"
    content = path.read_text()
    path.write_text(content.replace("training 2 0", "training 2 9"))  # the same size
    refuses(r"local_training_2\.json: changed since the run began: ")
    path.write_text(content)
    unread = inner / "local_test_4.json"
    kept = unread.read_text()
    unread.write_text(kept + " ")
    path.write_text(content + "\n")
    refuses(r"local_training_2\.json: changed since the run began and 1 more")
    path.write_text(content)
    refuses(r"local_test_4\.json: changed")
    unread.write_text(kept)
    (inner / "global_test.json").unlink()
    refuses(r"global_test\.json: changed")
    write(tmp_path / "other", 5)
    refuses("has 5 clients, the run began with 6", open_federation(tmp_path / "other"))


def test_a_later_fingerprint_keeps_what_the_run_read_before(tmp_path: Path):
    write(tmp_path, 3)
    first = open_federation(tmp_path)
    first.train(0)
    resumed = open_federation(tmp_path)
    resumed.check_unchanged(first.fingerprint())
    resumed.train(1)
    assert set(resumed.fingerprint()["sha256"]) == {"local_training_0.json", "local_training_1.json"}


def test_what_is_wrong_with_a_folder_gets_one_line(tmp_path: Path):
    def refuses(path: Path, count: int | None, says: str) -> None:
        with pytest.raises(FlexLoraError, match=says) as error:
            open_federation(path, count)
        assert "\n" not in str(error.value)

    refuses(tmp_path / "nowhere", None, "no such folder: set --data")
    refuses(tmp_path, None, "holds no {num_clients}/local_training_0")
    refuses(tmp_path, 8, r"holds no 8/local_training_0")
    data = write(tmp_path / "data", 4)
    refuses(data, 8, "no federation of 8 clients but of 4: set --num_clients 4")
    refuses(data / "4", 8, r"local_training_4\.json: missing")
    refuses(data / "4", 3, "holds 4 clients, not 3: set --num_clients 4")
    write(data, 2)
    refuses(data, None, "federations of 2, 4 clients: choose one with --num_clients")
    assert len(open_federation(data, 2)) == 2
    (data / "4" / "local_eval_1.json").unlink()
    refuses(data, 4, r"local_eval_1\.json: missing while other clients have one")
    (data / "4" / "local_training_2.json").unlink()
    refuses(data, 4, r"local_training_2\.json: missing")
    (data / "2" / "local_training_1.json").write_text("")
    refuses(data, 2, r"local_training_1\.json: the file is empty")
    shutil.rmtree(data / "2")
    write(data, 2)
    (data / "2" / "local_test_7.json").write_text("[]")
    refuses(data, 2, r"local_test_7\.json: there is no client 7 of 2")
    (data / "2" / "local_test_7.json").unlink()
    with pytest.raises(FlexLoraError, match="has no client 2: clients are 0 to 1"):
        open_federation(data, 2).train(2)
    (data / "2" / "local_training_0.json").write_text("[]")
    with pytest.raises(FlexLoraError, match=r"local_training_0\.json: the list holds no record"):
        open_federation(data, 2).train(0)


def test_a_permutation_is_one_and_follows_the_seed():
    assert sorted(permutation(100, 1, "a")) == list(range(100))
    assert permutation(100, 1, "a") == permutation(100, 1, "a")
    assert permutation(100, 1, "a") != permutation(100, 2, "a")
    assert permutation(100, 1, "a") != permutation(100, 1, "b")
    assert permutation(8, 42, "split") == [3, 7, 0, 4, 6, 2, 1, 5]  # the same on every machine and version


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_the_real_federations_are_read(tmp_path: Path):
    federation = open_federation(SHARED / "ni", 64)
    assert sum(len(federation.train(client)) for client in federation.clients) == 4087
    assert len(federation.global_test()) == 144
    with tarfile.open(SHARED / "ni-1613-mini.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    federation = open_federation(tmp_path, 1613)
    assert len(federation) == 1613
    assert len(federation.validation_sample(64, 42)) == 64
    assert len(federation.fingerprint()["sha256"]) == 64
    assert sum(len(federation.train(client)) for client in range(0, 1613, 10)) == 1194  # every tenth


@pytest.mark.parametrize(
    ("count", "most", "places"), [(10, 5, [0, 2, 4, 6, 8]), (3, 5, [0, 1, 2]), (4, None, [0, 1, 2, 3])]
)
def test_spread_keeps_every_part(count: int, most: int | None, places: list[int]) -> None:
    from flexlora.data.federation import spread
    from flexlora.data.records import Record

    records = [Record(str(i), "", "x") for i in range(count)]
    assert [int(r.instruction) for r in spread(records, most)] == places
