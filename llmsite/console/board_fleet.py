"""The dashboard's workers, as their heartbeats in Redis tell: models, slots, batch, caches, drafts, memory, disk.

No query. A heartbeat of an older worker may lack fields: what is not told is shown as a dash.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from django.utils.safestring import SafeString

from accounts.pages import console
from inference.transport.queue import TicketQueue, WorkerInfo

STUCK_SECONDS = 30.0
"""Somebody waits so long while slots are free."""
LITTLE_DISK_BYTES = 1_000_000_000
LITTLE_DISK_PERCENT = 5
UNKNOWN = "-"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    name: str
    state: str
    slots: str
    batch: str
    cache: str
    drafts: str
    memory: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    worker_id: str
    pool: str
    host: str
    uptime: str
    memory: SafeString | str
    resident: str
    models: Sequence[LoadedModel]
    is_stopping: bool


def rows(workers: Sequence[WorkerInfo], now: float) -> list[WorkerRow]:
    return [_row(worker, now) for worker in workers]


def _row(worker: WorkerInfo, now: float) -> WorkerRow:
    info = worker.info
    budget, used = info.get("budget_bytes"), info.get("used_bytes")
    memory: SafeString | str = UNKNOWN
    if budget and used is not None:
        text = f"{console.size(used)} of {console.size(budget)}"
        memory = console.labelled_bar(text, used * 100 / budget)
    resident = info.get("resident_bytes")
    return WorkerRow(
        worker_id=worker.worker_id,
        pool=worker.pool,
        host=f"{info.get('host', UNKNOWN)}, process {info.get('pid', UNKNOWN)}",
        uptime=_since(now - info["started_at"]) if "started_at" in info else UNKNOWN,
        memory=memory,
        resident=console.size(resident) if resident else UNKNOWN,
        models=[_model(report) for report in info.get("models", ())],
        is_stopping=bool(info.get("stopping")),
    )


def _model(report: Mapping[str, Any]) -> LoadedModel:
    counts: Mapping[str, int] = report.get("counts") or {}
    prompt = counts.get("prompt_tokens", 0) + counts.get("cached_tokens", 0)
    return LoadedModel(
        name=report["name"],
        state=report["state"],
        slots=f"{report['busy']} of {report['slots']}",
        batch=_mean(counts.get("decode_sequences", 0), counts.get("decode_steps", 0)),
        cache=_part(counts.get("cached_tokens", 0), prompt),
        drafts=_part(counts.get("accepted_tokens", 0), counts.get("drafted_tokens", 0)),
        memory=console.size(report["memory_bytes"]) if report.get("memory_bytes") else UNKNOWN,
    )


def _mean(total: int, number: int) -> str:
    return f"{total / number:.1f}" if number else UNKNOWN


def _part(some: int, whole: int) -> str:
    return f"{some / whole:.0%}" if whole else UNKNOWN


def _since(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{console.NO_BREAK_SPACE}{unit}"
    return f"{max(0.0, seconds):.0f}{console.NO_BREAK_SPACE}s"


def stuck_pools(tickets: TicketQueue, workers: Sequence[WorkerInfo], pools: Sequence[str]) -> list[str]:
    """A sentence for each pool where somebody waits for long while slots are free. Raises redis.RedisError."""
    found = []
    for pool in pools:
        reports = [each for worker in workers if worker.pool == pool for each in worker.info.get("models", ())]
        num_free = sum(each["slots"] - each["busy"] for each in reports if each["state"] == "ready")
        waited = tickets.longest_wait(pool, time.time())
        if num_free > 0 and waited > STUCK_SECONDS:
            found.append(
                f"The queue of pool {pool} is stuck: a request waits for {_since(waited)} while {num_free} slots are "
                "free. The worker's log says why; restarting the worker loses no ticket."
            )
    return found


def full_disks(state: Path, workers: Sequence[WorkerInfo]) -> list[str]:
    """A sentence for each disk that is nearly full: of this machine's state folder, and of each worker's."""
    found = [_disk(f"this machine ({state})", *_free(state))]
    for worker in workers:
        disk = worker.info.get("disk") or {}
        if disk.get("total"):
            found.append(_disk(f"{worker.info.get('host')} ({worker.worker_id})", disk["free"], disk["total"]))
    return sorted({each for each in found if each})


def _free(folder: Path) -> tuple[int, int]:
    """(free, total) bytes; (0, 0) where the folder cannot be asked."""
    try:
        usage = disk_usage(folder)
    except OSError:
        return 0, 0
    return usage.free, usage.total


def _disk(where: str, free: int, total: int) -> str:
    if not total or (free >= LITTLE_DISK_BYTES and free * 100 >= total * LITTLE_DISK_PERCENT):
        return ""
    return f"The disk of {where} is nearly full: {console.size(free)} of {console.size(total)} are free."
