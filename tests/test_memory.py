"""The memory advisor: its parts against sizes counted by hand, and what it answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexlora.cli import main
from flexlora.memory import Memory, Workload, affordable, read_bytes, training_memory
from flexlora.modeling import Model, empty_model, load_model
from flexlora.types import FlexLoraError
from tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("memory") / "model")


@pytest.fixture(scope="module")
def empty(folder: Path) -> Model:
    return empty_model(str(folder))


def at(model: Model, rank: int) -> dict[str, int]:
    return {m: min(rank, *shape) for m, shape in model.shapes.items()}


def test_an_empty_model_has_the_shapes_of_the_loaded_one(empty: Model, folder: Path) -> None:
    assert empty.shapes == load_model(str(folder)).shapes


def test_weights_adapters_and_optimiser_are_counted(empty: Model, folder: Path) -> None:
    ranks = at(empty, 3)
    found = training_memory(empty, ranks, Workload(1, 16))
    factors = sum(ranks[m] * (d_out + d_in) for m, (d_out, d_in) in empty.shapes.items())
    # load_model: tied weights stand there once.
    assert found.weights == sum(p.numel() for p in load_model(str(folder)).network.parameters()) * 4
    assert found.adapters == 4 * 4 * factors
    assert found.optimizer == 2 * 4 * factors
    assert training_memory(empty, ranks, Workload(1, 16, optimizer="sgd")).optimizer == 0


def test_activations_are_what_autograd_keeps_in_a_real_pass(empty: Model, folder: Path) -> None:
    """The same sum over a loaded model that runs for real; on fake tensors the network makes its causal mask itself."""
    import flexlora.memory as memory
    from flexlora.types import LowRank

    model = load_model(str(folder))
    adapter = {m: LowRank(torch.zeros(o, 2), torch.ones(2, i)) for m, (o, i) in model.shapes.items()}
    model.attach(adapter, dropout=0.05, train=("A", "B"))
    model.network.train()
    kept = memory._kept(model, Workload(2, 24))
    assert kept > 48 * model.network.config.vocab_size * 4
    expected = round((1 + memory.LOST) * kept)
    assert training_memory(empty, at(empty, 2), Workload(2, 24)).activations == pytest.approx(expected, rel=0.1)


def test_activations_grow_with_tokens_and_ranks(empty: Model) -> None:
    small = training_memory(empty, at(empty, 1), Workload(1, 32)).activations
    assert training_memory(empty, at(empty, 16), Workload(1, 32)).activations > small
    assert training_memory(empty, at(empty, 1), Workload(4, 32)).activations > 3.5 * small


def test_lanes_that_train_at_once_are_counted_and_no_others(empty: Model) -> None:
    """Two halves of a micro-batch or of a row, each with gradients of its own; a larger one is cut into more, two of them at once."""
    sizes = ((1, 150), (1, 512), (2, 512), (8, 512))
    short, row, two, many = (training_memory(empty, at(empty, 4), Workload(*size)) for size in sizes)
    assert row.adapters * 4 == short.adapters * 6
    assert row.adapters == two.adapters
    assert many == two
    assert two.activations == pytest.approx(2 * row.activations, rel=0.1)


def test_the_largest_that_fits() -> None:
    needed = {name: Memory(size, 0, 0, 0, process=0) for name, size in (("a", 10), ("b", 20), ("c", 30))}
    assert [affordable(needed, budget) for budget in (9, 10, 29, 30)] == [None, "a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500m", 500 * 10**6), ("2kb", 2000), ("64 Mi", 2**26)),
        *(("1TiB", 2**40), ("7", 7), ("7 B", 7), ("1e9", 10**9), (2**33, 2**33)),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "-1GB", "", "nan", "GB", "8iB", "8 potatoes"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(FlexLoraError, match="is no size; write one as 8GB"):
        read_bytes(text)


def test_the_command_names_the_largest_type(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ranks", "--model", str(folder), "--memory", "8GB", "--cutoff_len", "32"])
    said = capsys.readouterr().out
    assert "largest that fits 8GB: type_4" in said
    main(["ranks", "--model", str(folder), "--memory", "1MB", "--cutoff_len", "32"])
    assert "none: try a smaller" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["ranks", "--memory", "8GB"])
    assert "name it with --model" in capsys.readouterr().err
