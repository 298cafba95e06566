"""What a tree of processes costs: memory and processor time, read from Linux's /proc. No clock of its own.

Memory is PSS: shared pages are divided among the processes that map them, so the sum over a tree is honest.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessCost:
    """One process. cpu_seconds is user and system time since it started."""

    pid: int
    name: str
    pss_mb: float
    rss_mb: float
    cpu_seconds: float


def tree(root: int, proc: Path = PROC) -> list[int]:
    """The process and all its descendants that are alive, parents first."""
    children: dict[int, list[int]] = {}
    for entry in proc.iterdir():
        if entry.name.isdigit() and (stat := _stat(entry)) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [root] if (proc / str(root)).exists() else []
    for pid in found:
        found.extend(sorted(children.get(pid, [])))
    return found


def costs(root: int, proc: Path = PROC) -> list[ProcessCost]:
    """The cost of each process of a tree; one that ends meanwhile is left out."""
    measured = (_cost(pid, proc) for pid in tree(root, proc))
    return [cost for cost in measured if cost is not None]


def total_pss_mb(processes: list[ProcessCost]) -> float:
    return sum(process.pss_mb for process in processes)


def cpu_seconds_by_name(before: list[ProcessCost], after: list[ProcessCost]) -> dict[str, float]:
    """Processor time used in between, summed by name, dearest first."""
    started = {process.pid: process.cpu_seconds for process in before}
    used: dict[str, float] = {}
    for process in after:
        used[process.name] = used.get(process.name, 0.0) + process.cpu_seconds - started.get(process.pid, 0.0)
    return dict(sorted(used.items(), key=lambda item: -item[1]))


def _cost(pid: int, proc: Path) -> ProcessCost | None:
    folder = proc / str(pid)
    try:
        memory = _kilobytes((folder / "smaps_rollup").read_text())
        command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    stat = _stat(folder)
    if stat is None:
        return None
    return ProcessCost(
        pid=pid,
        name=process_name(command),
        pss_mb=memory.get("Pss", 0) / 1024,
        rss_mb=memory.get("Rss", 0) / 1024,
        cpu_seconds=(int(stat[11]) + int(stat[12])) / TICKS_A_SECOND,
    )


def _stat(folder: Path) -> list[str] | None:
    """Fields of stat(5) from the state on; None where the process has ended."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _kilobytes(text: str) -> dict[str, int]:
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


ROLES = {
    "celery": "worker",
    "worker": "worker",
    "beat": "beat",
    "llmsite.processes.beat": "beat",
    "uvicorn": "web",
    "llmsite.processes.web": "web",
    "inference.engine.tokenizer": "tokenizer",
    "up": "supervisor",
    "litellm": "litellm",
}


def process_name(command: list[str]) -> str:
    """What a process is, by its command line: a role of llmsite's, else the program's name."""
    if any(server in word for word in command for server in ("valkey-server", "redis-server")):
        return "valkey"
    words = [Path(word).name for word in command if word]
    roles = [ROLES[word.partition(":")[0]] for word in words if word.partition(":")[0] in ROLES]
    if "beat" in roles:
        return "beat"  # Celery's own command carries both words
    return roles[0] if roles else (words[0] if words else "?")
