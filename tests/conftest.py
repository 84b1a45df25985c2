"""Settings for all tests: one thread a process, so that workers side by side do not slow one another down; what several files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from console import Command, Done

torch.set_num_threads(1)
settings.register_profile("flexlora", deadline=None, derandomize=True)
settings.load_profile("flexlora")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """However many threads a test asks for, the next one begins with one."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: the same words, without the seconds that importing torch takes."""
    from flexlora import cli

    def call(*words: object) -> Done:
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, data of four clients), for files that say nothing else."""
    from tiny import tiny_federation, tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder / "model"), tiny_federation(folder / "data", 4)


@pytest.fixture
def sites_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sites of a town run in this process."""
    from town import in_this_process

    in_this_process(monkeypatch, tmp_path / "home")
