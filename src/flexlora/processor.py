"""What must be settled about the processor before torch is loaded."""

from __future__ import annotations

import os
import sys
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
