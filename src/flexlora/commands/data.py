"""`flexlora data prepare | partition | inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cyclopts import App

from flexlora.commands.options import next_step
from flexlora.commands.options import out as console

FEW = 40
"""Clients below which the default participation draws fewer than two."""

app = App(name="data", help="Prepare, partition and look at the data of a federation.")


@app.command
def prepare(
    *,
    source: Path,
    out: Path,
    fraction: float = 0.1,
    languages: Literal["english", "all"] = "english",
    max_clients: int | None = None,
    seed: int = 42,
) -> None:
    """Build the paper's federation from a checkout of allenai/natural-instructions: one task a client.

    For example:

        flexlora data prepare --source natural-instructions --out data

    Parameters
    ----------
    source
        The checkout, with tasks/ and splits/default/.
    out
        A new folder.
    fraction
        Share of each task's examples that is drawn.
    languages
        english, or all: less the English tasks that share their source with a held-out one.
    max_clients
        At most that many clients.
    seed
        The same seed gives the same bytes.
    """
    from flexlora.data.natural_instructions import prepare as build

    with console.status("reading tasks") as status:
        made = build(
            source,
            out,
            fraction=fraction,
            languages=languages,
            max_clients=max_clients,
            seed=seed,
            progress=lambda done, total: status.update(f"reading tasks {done}/{total}"),
        )
    if languages == "all":
        console.print("note: tasks in other languages may hold what global_test.json asks: no list names their sources")
    _made(made.clients, made.examples, out)


@app.command
def partition(
    file: str,
    /,
    *,
    clients: int,
    out: Path,
    by: str = "iid",
    seed: int = 42,
    instruction: str | None = None,
    input: str | None = None,
    output: str | None = None,
    category: str | None = None,
    messages: str | None = None,
    drop_empty: bool = False,
) -> None:
    """Deal one table of instructions out to clients: JSON, JSONL, CSV, Parquet, or a data set on disk.

    Columns named as in Alpaca and Dolly are understood; name others with the options below.

    For example:

        flexlora data partition dolly.jsonl --clients 20 --by dirichlet:0.5 --out data
        flexlora data partition notes.csv --clients 8 --instruction question --output answer --out data

    Parameters
    ----------
    file
        The table.
    clients
        Number of clients.
    out
        A new folder.
    by
        iid, dirichlet:ALPHA, category, or shards:K.
    seed
        The same seed gives the same bytes.
    instruction
        Column that holds the instruction.
    input
        Column that holds the input.
    output
        Column that holds the response.
    category
        Column to partition by.
    messages
        Column that holds whole conversations.
    drop_empty
        Leave rows without a response out, and say how many.
    """
    from flexlora.data.partition import partition as deal

    named = {"instruction": instruction, "input": input, "output": output, "category": category, "messages": messages}
    columns = {field: column for field, column in named.items() if column is not None}
    made = deal(file, out, clients, by, seed=seed, columns=columns, drop_empty=drop_empty)
    if made.dropped:
        console.print(f"{made.dropped} rows without a response left out")
    _made(made.clients, made.examples, out)


def _made(clients: int, training: int, out: Path) -> None:
    console.print(f"written: {out}: {clients} clients, {training} training examples", markup=False)
    next_step(f"flexlora data inspect {out}")


@app.command
def inspect(
    data: Path,
    /,
    *,
    num_clients: int | None = None,
    model: str | None = None,
    prompt_template: str = "auto",
    cutoff_len: int = 512,
    cache_dir: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Show a federation: examples, categories, token lengths, truncation, duplicates, label skew.

    For example:

        flexlora data inspect data --model smollm2 --picture data.svg

    Parameters
    ----------
    data
        The federation's folder.
    num_clients
        Which one, where the folder holds several.
    model
        A model whose tokenizer counts the tokens; default: none are counted.
    prompt_template
        As the key of `flexlora run`.
    cutoff_len
        Tokens of one example, to count what would be cut.
    cache_dir
        Where converted models are kept.
    picture
        Draw sizes and lengths into this SVG file.
    """
    from flexlora.data.inspection import inspect as look
    from flexlora.data.inspection import inspection_table
    from flexlora.data.picture import write_picture
    from flexlora.modeling import load_tokenizer
    from flexlora.prompts import load_template

    tokenizer = load_tokenizer(model, cache_dir=cache_dir) if model else None
    if prompt_template == "auto":
        prompt_template = "chat" if getattr(tokenizer, "chat_template", None) else "alpaca"
    template = load_template(prompt_template) if tokenizer is not None else None
    with console.status("reading") as status:
        found = look(
            data,
            num_clients=num_clients,
            tokenizer=tokenizer,
            template=template,
            cutoff_len=cutoff_len,
            progress=lambda done, total: status.update(f"reading {done}/{total}"),
        )
    console.print(inspection_table(found))
    if picture is not None:
        console.print(f"picture: {write_picture(found, picture)}", markup=False, soft_wrap=True)
    # Of few clients the default share draws a single one, whose update is averaged with nobody's.
    share = f" --participation {min(1, 4 / found.clients):.2g}" if found.clients < FEW else ""
    next_step(f"flexlora run --data {data} --num_clients {found.clients}{share}")
