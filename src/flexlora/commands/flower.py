"""`flexlora flower init`."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from flexlora.commands.options import out

app = App(name="flower", help="A real federation, with Flower.")


@app.command
def init(folder: Path, /, *, sites: int = 2, host: str = "localhost", port: int = 8000) -> None:
    """Write a federation's folder: the app, certificates, a key for each site, and the exact commands (README.md).

    For example:

        flexlora flower init federation --sites 3 --host fed.example.org

    Parameters
    ----------
    folder
        A new folder.
    sites
        How many sites get a key; also the fewest answers that a round needs.
    host
        Name or address by which the sites reach the server.
    port
        The server's port.
    """
    from flexlora.runners.flower_folder import write_folder

    write_folder(folder, sites, host, port)
    out.print(f"written: {folder}", markup=False, soft_wrap=True)
    out.print(f"next: the commands for the server and the sites stand in {folder / 'README.md'}", markup=False)
