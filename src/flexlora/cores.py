"""Work side by side on the cores of this machine, in threads that do not get into one another's way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")


def each(
    function: Callable[[_T], _R],
    items: Iterable[_T],
    workers: int | None = None,
    *,
    threads: int = 1,
    stop: Callable[[BaseException], None] | None = None,
) -> list[_R]:
    """``[function(item) for item in items]`` over `workers` threads, in order (default: torch's intra-op threads).

    Inside, torch works with `threads` threads an item, so that the cores are not oversubscribed. With one, results do not
    depend on `workers`, nor on the number of torch's threads outside, by one bit: LAPACK's eigenvectors do depend on the latter.
    `stop` is told what ends the work early before those that have begun are waited for.
    """
    items = list(items)
    outside = torch.get_num_threads()
    workers = min(workers or outside, len(items))
    torch.set_num_threads(threads)
    try:
        if workers <= 1:
            return [function(item) for item in items]
        # a thread that has not run a torch loop yet lets MKL take all cores: told so itself
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            try:
                return list(pool.map(function, items))
            except BaseException as error:
                if stop:
                    stop(error)
                raise
    finally:
        torch.set_num_threads(outside)
