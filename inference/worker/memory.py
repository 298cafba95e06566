"""Memory of this machine and process: what models may have, what the process has, and giving back what is free."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
from pathlib import Path

from django.conf import settings

PART_OF_MACHINE = 0.9
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def budget_of_machine() -> float:
    """Bytes for models: as the settings say, else most of what this process may use."""
    if given := settings.CONFIG.model_memory_mb:
        return float(given * 10**6)
    limits = [_total_bytes(), *map(_limit_in, CGROUP_LIMITS)]
    return PART_OF_MACHINE * min(limits)


def _total_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _limit_in(path: str) -> float:
    try:
        return float(Path(path).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return math.inf


def resident_bytes() -> int:
    """Of this process; 0 where it cannot be asked."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def release_memory() -> None:
    """Give what was freed back to the system; the C library would keep it for itself."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)
