"""Settings for all tests: one thread a process, so that workers side by side do not slow one another down."""

import pytest
import torch
from hypothesis import settings

from console import Command, Done

torch.set_num_threads(1)
settings.register_profile("flexlora", deadline=None, derandomize=True)
settings.load_profile("flexlora")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
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
