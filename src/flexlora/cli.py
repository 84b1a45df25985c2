"""The command line, thin: every command checks its words, calls one function and names the next command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

from cyclopts import App, CycloptsError, Group, Parameter

from flexlora.commands import choosing, playing, results, using
from flexlora.commands.data import app as data_commands
from flexlora.commands.flower import app as flower_commands
from flexlora.commands.options import err, out
from flexlora.config import Config, key_aliases
from flexlora.types import FlexLoraError

app = App(
    name="flexlora",
    help="Federated LoRA fine-tuning of large language models where every client has its own rank.",
    help_epilogue="Try it: `flexlora demo`. Every command explains itself with --help.",
    console=out,
    error_console=err,
    version=lambda: __import__("flexlora").__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # main says how to go on
    default_parameter=Parameter(name_transform=lambda name: name),
)
PLAY, LOOK, USE, PREPARE, SHELL = (
    Group(title, sort_key=i)
    for i, title in enumerate(("Play a run", "Look at it", "Use it", "Prepare", "This program"))
)
for command in (playing.demo, playing.run, playing.resume, playing.watch, playing.sweep):
    app.command(command, group=PLAY)
for command in (results.report, results.inspect, results.evaluate):
    app.command(command, group=LOOK)
for command in (using.generate, using.export):
    app.command(command, group=USE)
for group in (data_commands, flower_commands):
    group.group = PREPARE
    app.command(group)
for command in (choosing.ranks, choosing.methods):
    app.command(command, group=PREPARE)


@app.command(group=SHELL)
def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the script with which a shell completes commands, options and files.

    For example:

        flexlora completion bash > ~/.local/share/bash-completion/completions/flexlora
        flexlora completion zsh > ~/.zfunc/_flexlora
        flexlora completion fish > ~/.config/fish/completions/flexlora.fish
    """
    print(app.generate_completion(shell=shell))


for word in ("--help", "--version"):
    app[word].group = (SHELL,)


def plain_words(words: Sequence[str]) -> list[str]:
    """The words of the command line with `--like-this` spelled `--like_this`, and `true` after a truth key that stands alone."""
    switches = {
        f"--{spelling}"
        for name, info in Config.model_fields.items()
        if info.annotation is bool
        for spelling in (name, *key_aliases(name))
    }
    plain: list[str] = []
    for i, word in enumerate(words):
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            word = "--" + option[2:].replace("-", "_") + equals + value
        plain.append(word)
        alone = i + 1 == len(words) or words[i + 1].startswith("--")
        if words[0] in ("run", "sweep") and word in switches and alone:
            plain.append("true")
    return plain


def main(words: Sequence[str] | None = None) -> None:
    """Entry point: user errors are one line on standard error and exit code 2."""
    import os
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Or the tokenizers library warns wherever a process that has used it forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(plain_words(sys.argv[1:] if words is None else words), exit_on_error=False, print_error=False)
    except FlexLoraError as error:
        fail(str(error))
    except CycloptsError as error:
        command = " ".join(("flexlora", *(error.command_chain or ())))
        fail(str(error) if "Did you mean" in str(error) else f"{error} See `{command} --help`.")
    except KeyboardInterrupt as stop:
        # Raised with the run folder once there are rounds to go on from.
        saved = f"; finished rounds are saved, go on with `flexlora resume {stop}`" if str(stop) else ""
        print(f"flexlora: stopped{saved}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # a folder without permission, a name that is too long: where no command says more
        fail(f"{error.filename or 'the system'}: {error.strerror or error}; mend that, or name another place")


def fail(message: str) -> None:
    """One line on standard error, exit code 2."""
    text = " ".join(message.split())
    print(f"flexlora: {text}", file=sys.stderr)
    sys.exit(2)
