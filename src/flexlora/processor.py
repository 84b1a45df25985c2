"""What must be settled about the processor before torch is loaded, and memory that goes back."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path


def made_by_intel() -> bool:
    """Whether MKL, with which torch multiplies, is at its best here; assumed where there is no telling."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True


def settle() -> None:
    """Let torch's idle threads sleep instead of spin where other threads multiply (see `flexlora.products`).

    The OpenMP library reads the variable once, when it is loaded: too late where torch is there already.
    """
    if "torch" not in sys.modules and not made_by_intel():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def threads_sleep() -> bool:
    """Whether torch's idle threads leave their cores to others."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def give_back() -> None:
    """Return freed memory to the system: the C library keeps half a gigabyte after a client that trained at rank 200."""
    trim = _trim()
    if trim:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc alone has it
