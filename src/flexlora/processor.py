"""What must be settled about the processor before torch is loaded, and memory that goes back."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path


def made_by_intel() -> bool:
    """Whether MKL, with which torch multiplies, is at its best here; assumed where there is no telling."""
    said = _described()
    return "GenuineIntel" in said or "vendor_id" not in said  # ARM names none, and has no MKL


def leaves_avx512_unused() -> bool:
    """Whether the processor has AVX-512 and MKL does not use it."""
    return "avx512f" in _described() and not made_by_intel()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16: with AVX512-BF16 or AMX they take a seventh to a half
    of the time of float32, without them more than it. Told by the processor, never by a stopwatch: every process of every run
    on one machine says the same."""
    return any(name in _described() for name in ("avx512_bf16", "amx_bf16"))


@functools.cache
def _described() -> str:
    """What Linux says of the processor; nothing elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def settle() -> None:
    """Before torch is loaded, as all is too late where it is there already: how its threads wait and where they allocate.

    Where other threads multiply (see `flexlora.products`) its idle threads sleep after a few microseconds, in which the next
    operation usually comes: waking one takes longer. The OpenMP library reads the variables once.

    And how many products oneDNN keeps compiled, by their sizes, more than a megabyte each: rows of ever new lengths filled its
    thousand places; the way there or back needs some twenty.
    """
    if "torch" not in sys.modules:
        _keep_freed()
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
        if not made_by_intel() and "OMP_WAIT_POLICY" not in os.environ:
            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
            os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def threads_sleep() -> bool:
    """Whether torch's idle threads leave their cores to others."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def _keep_freed() -> None:
    """Have all threads share one heap, in which freed memory stays until `give_back`; or two, where bfloat16 is fast.

    The C library hands blocks of a tensor's size back to the system at once and takes them anew, page by page: a fifth of
    a training step. Of the heaps that it gives to threads each keeps what it freed to itself. But one makes them wait for each
    other: where products are short, in bfloat16, for a tenth of a round.
    """
    library = _c_library()
    if library:
        heaps = 2 if multiplies_bfloat16() else 1
        for option, value in ((M_ARENA_MAX, heaps), (M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)):
            library.mallopt(option, value)


def give_back() -> None:
    """Return freed memory to the system: the C library keeps half a gigabyte after a client that trained at rank 200."""
    library = _c_library()
    if library:
        library.malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None  # glibc alone has it
