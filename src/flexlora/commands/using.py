"""Commands that use what was trained: generate, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from flexlora.commands.options import given, next_step, out, refuse_unwritable, write_file
from flexlora.types import FlexLoraError

if TYPE_CHECKING:
    from flexlora.prompts import Record
    from flexlora.trained import Trained


def export(
    run: Path,
    /,
    *,
    out_folder: Annotated[Path, Parameter("--out")],
    rank: int | None = None,
    client: int | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the global model of a run's best round as a PEFT adapter of any rank, or merged into the base model.

    For example:

        flexlora export runs/first --rank 8 --out my-adapter
        flexlora export runs/first --merge --out my-model

    Parameters
    ----------
    run
        The run folder.
    out_folder
        The new folder.
    rank
        Rank of every module; default: the largest that a client has.
    client
        Export what this client runs instead.
    merge
        Write a whole model.
    trust_remote_code
        With --merge: let the model's own Python code run on this machine.
    """
    from flexlora.rundir import open_run
    from flexlora.trained import export as write

    folder = write(
        open_run(run), out_folder, rank=rank, client=client, merge=merge, trust_remote_code=trust_remote_code
    )
    out.print(f"written: {folder}", markup=False, soft_wrap=True)
    next_step(f'flexlora generate {folder} --prompt "…"' + (" --trust_remote_code" if trust_remote_code else ""))


def generate(
    target: str,
    /,
    *,
    prompt: str | None = None,
    input: str = "",
    file: Path | None = None,
    out_file: Annotated[Path | None, Parameter("--out")] = None,
    max_new_tokens: int = 128,
    prompt_template: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Let a run, an exported adapter or a bare model answer; words appear as they come.

    Without --prompt and --file it asks for instructions, or reads one a line from standard input.

    For example:

        flexlora generate runs/first --prompt "Sort the words." --input "pear, apple"
        flexlora generate my-adapter --file questions.txt --out answers.jsonl

    Parameters
    ----------
    target
        A run folder, an adapter folder, or a model's name.
    prompt
        The instruction.
    input
        The input that the instruction is about.
    file
        Instructions: a .txt file of one a line, or a table with columns instruction and input (.json, .jsonl, .csv, …).
    out_file
        With --file: write one JSON line an answer here instead of showing them; many are generated at once.
    max_new_tokens
        Tokens of the answer, at most.
    prompt_template
        As the key of `flexlora run`; default: the run's own.
    cache_dir
        Where converted models are kept.
    trust_remote_code
        Let the model's own Python code run on this machine.
    """
    from flexlora import trained
    from flexlora.data.tables import read_prompts

    if prompt is not None and file is not None:
        raise FlexLoraError("file: --prompt is given too; choose one of them")
    if out_file is not None and file is None:
        raise FlexLoraError("out: goes with --file; for one prompt redirect the output")
    if out_file is not None and out_file.exists():
        raise FlexLoraError(f"{out_file}: exists already; choose another --out")
    if out_file is not None:
        refuse_unwritable(out_file, "out")
    prompts = read_prompts(file) if file is not None else []
    changes = given({"prompt_template": prompt_template, "cache_dir": cache_dir, "max_new_tokens": max_new_tokens})
    changes["trust_remote_code"] = trust_remote_code
    opened = trained.open_trained(target, changes)
    if out_file is not None:
        _write_answers(opened, prompts, out_file)
        next_step(f"flexlora evaluate {target} --data …")
    elif file is not None:
        for record in prompts:
            out.print("> " + " ".join(f"{record.instruction} {record.input}".split()), style="dim", markup=False)
            _stream(opened, record.instruction, record.input)
    elif prompt is not None:
        _stream(opened, prompt.strip(), input)
    elif sys.stdin.isatty():
        while line := _typed():
            _stream(opened, line, input)
    else:
        for line in filter(None, map(str.strip, sys.stdin)):
            _stream(opened, line, input)


def _typed() -> str:
    """A line from the terminal; the empty one where it ends (Ctrl-D)."""
    try:
        return out.input("> ").strip()
    except EOFError:
        out.print()
        return ""


def _stream(opened: Trained, instruction: str, input: str) -> None:
    from flexlora.trained import answer

    for piece in answer(opened, instruction, input):
        out.print(piece, end="", markup=False, soft_wrap=True)
    out.print()


def _write_answers(opened: Trained, prompts: list[Record], path: Path) -> None:
    from json import dumps

    from flexlora.trained import answers

    with out.status("generating answers") as status:
        texts = answers(opened, prompts, lambda done, total: status.update(f"generating answers {done}/{total}"))
    lines = (
        {"instruction": record.instruction, "input": record.input, "answer": text}
        for record, text in zip(prompts, texts, strict=True)
    )
    write_file(path, "".join(dumps(line, ensure_ascii=False) + "\n" for line in lines), "out")
    out.print(f"written: {path}: {len(texts)} answers", markup=False, soft_wrap=True)
