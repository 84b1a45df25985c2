"""One serializer for every state: exact, refuses what is damaged, makes only classes that the method vouches for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from flexlora.checkpoint import (
    DamagedError,
    checkpoint_folder,
    checkpoint_rounds,
    flatten,
    kept_file,
    kept_up_to,
    read_checkpoint,
    remove_checkpoints,
    restore,
    thin_out,
    write_checkpoint,
)
from flexlora.types import FlexLoraError, LowRank, Sparse


@dataclass(frozen=True)
class Inner:
    x: torch.Tensor


@dataclass(frozen=True)
class State:
    round: int
    seed: int
    factors: dict[str, LowRank]
    sparse: dict[str, Sparse]
    inner: Inner | None = None
    pair: tuple[float, str] = (0.1, "ü")


def example(inner: bool = True) -> State:
    g = torch.Generator().manual_seed(1)
    return State(
        3,
        2**40,
        {"a.b": LowRank(torch.randn(4, 2, generator=g), torch.randn(2, 3, generator=g))},
        {"c": Sparse(torch.randn(5, generator=g).double(), torch.arange(5), (4, 3))},
        Inner(torch.randn(2, generator=g).bfloat16()) if inner else None,
        (1 / 3, "ü"),
    )


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return type(a) is type(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return a == b and type(a) is type(b)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, example(), {"best": 0.1})
    # Inner is not in the prototype, but stands beside State.
    state, progress = read_checkpoint(checkpoint_folder(tmp_path, 3), example(inner=False))
    assert equal(state, example())
    assert progress == {"best": 0.1}


def test_only_vouched_classes_are_made() -> None:
    tree, tensors = flatten(example())
    tree["class"] = "subprocess:Popen"
    with pytest.raises(DamagedError, match="does not fit"):
        restore(tree, tensors, example())


def test_what_no_state_may_hold() -> None:
    with pytest.raises(TypeError, match="cannot hold set"):
        flatten({"a": {1}})


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone", "empty"])
def test_harm_is_seen(tmp_path: Path, file: str, harm: str) -> None:
    folder = write_checkpoint(tmp_path, 1, example(), {})
    path = folder / file
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "flip":
        # a digit of JSON stays JSON: only the hash can tell
        spot = content.index(b'"round": 1') + 9 if file == "state.json" else len(content) - 3
        content[spot] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    with pytest.raises(DamagedError):
        read_checkpoint(folder, example())


def test_other_json_is_damage(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, example(), {})
    for text in ("[]", "null", "3", '{"digest": 1}', json.dumps({"format": 9, "digest": ""})):
        (folder / "state.json").write_text(text)
        with pytest.raises(DamagedError):
            read_checkpoint(folder, example())


def test_rounds_kept_and_removed(tmp_path: Path) -> None:
    for round in (1, 2, 10):
        write_checkpoint(tmp_path, round, example(), {})
    (tmp_path / ".round-0011.part").mkdir()
    assert checkpoint_rounds(tmp_path) == [1, 2, 10]
    remove_checkpoints(tmp_path, {2, 10})
    assert checkpoint_rounds(tmp_path) == [2, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-0002", "round-0010"]


def test_what_clients_kept_is_told_apart_by_number(tmp_path: Path) -> None:
    rounds = (3, 9998, 9999, 10000, 10002)
    for round in rounds:
        kept_file(tmp_path, round).touch()
    (tmp_path / ".round-10003.safetensors.part").touch()
    assert [kept_up_to(tmp_path, r) for r in (2, 3, 9999, 10001, 99999)] == [
        None,
        *(kept_file(tmp_path, r) for r in (3, 9999, 10000, 10002)),
    ]
    thin_out(tmp_path, {9999, 10001})
    assert [r for r in rounds if kept_file(tmp_path, r).exists()] == [9999, 10000, 10002]


@pytest.mark.parametrize("writer", ["write_durably", "save_file"])
def test_a_disk_that_refuses_leaves_the_last_one_whole(tmp_path: Path, monkeypatch, writer: str) -> None:
    write_checkpoint(tmp_path, 1, example(), {})

    def full(*given: Any) -> None:
        path = next(x for x in given if isinstance(x, Path))
        path.write_bytes(b"{")
        if writer == "save_file":  # safetensors has the system's words in an error of its own
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"flexlora.checkpoint.{writer}", full)
    with pytest.raises(FlexLoraError, match="No space left on device"):
        write_checkpoint(tmp_path, 2, example(), {})
    assert checkpoint_rounds(tmp_path) == [1]
    assert equal(read_checkpoint(checkpoint_folder(tmp_path, 1), example())[0], example())


def test_tensors_that_share_memory_come_back_each_on_its_own(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(4, 3)
    state = {
        "whole": whole,
        "again": whole,
        "part": whole[1:3],
        "turned": whole.T,
        "none": whole[:0],
        "void": whole[:0],
    }
    write_checkpoint(tmp_path, 1, state, {})
    assert torch.equal(whole, torch.arange(12.0).view(4, 3))
    back, _ = read_checkpoint(tmp_path / "round-0001", state)
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
    size = (tmp_path / "round-0001" / "state.safetensors").stat().st_size
    assert size < 4 * (12 * 3 + 6) + 600, "of a part only the part is written"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak")
def test_tensors_are_written_from_where_they_are(tmp_path: Path) -> None:
    def kilobytes(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    state = {"W": torch.ones(2**24)}  # 64 MB
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    write_checkpoint(tmp_path, 1, state, {})
    assert kilobytes("VmHWM") - before < 2**15, "no copy of them is made"
