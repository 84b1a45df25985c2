"""The federation of docs/results.md: the first examples of every client of a larger one, so that eight rounds are affordable.

    python benchmarks/results_data.py ../shared/data/ni/64 runs/results-data-8 --examples 8

Held-out and validation files are taken whole.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexlora.data.federation import open_federation
from flexlora.data.writing import new_folder, write_client, write_global_test


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path, help="folder of the larger federation")
    arguments.add_argument("out", type=Path, help="folder to write")
    arguments.add_argument("--examples", type=int, default=8, help="training examples of one client, at most")
    given = arguments.parse_args()
    found = open_federation(given.source)
    with new_folder(given.out) as out:
        folder = out / str(len(found))
        folder.mkdir()
        for client in found.clients:
            train = found.train(client)[: given.examples]
            write_client(folder, client, (train, found.eval(client), found.test(client)))
        write_global_test(folder, found.global_test())
    print(f"{given.out}: {len(found)} clients; next: flexlora sweep configs/results.yaml")


if __name__ == "__main__":
    main()
