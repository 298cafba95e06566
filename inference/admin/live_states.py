"""What the workers say about models, as the console's pages put it: from their heartbeats in Redis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import redis

from inference.models import ServedModel
from inference.transport import queue


def live_states() -> Mapping[int, str]:
    """What the workers say about each model, by its id. Raises redis.RedisError."""
    found: dict[int, list[str]] = {}
    for worker in queue.ticket_queue().workers():
        for report in worker.info.get("models", ()):
            found.setdefault(report["id"], []).append(_describe(report, worker.worker_id))
    return {model_id: "; ".join(states) for model_id, states in found.items()}


def _describe(report: Mapping[str, Any], worker_id: str) -> str:
    """One line of a heartbeat (HostedModel.report) as a phrase."""
    if report["state"] == "loading" and report.get("progress") is not None:
        return f"loading {report['progress']:.0%} on {worker_id}, some {report['load_seconds']:.0f} s in all"
    if report.get("is_waiting") and report["state"] in ("unloaded", "failed"):
        return f"waiting for memory on {worker_id}"
    if report["error"]:
        return f"{report['state']} on {worker_id}: {report['error']}"
    if report["state"] == "ready":
        without = "".join(f"; no {name}: {reason}" for name, reason in (report.get("cannot") or {}).items())
        return f"loaded on {worker_id}, {report['busy']} of {report['slots']} slots busy{without}"
    return f"{report['state']} on {worker_id}"


def live_state(model: ServedModel, states: Mapping[int, str]) -> str:
    if model.load_mode == ServedModel.LoadMode.OFF and model.pk not in states:
        return "off"
    return states.get(model.pk, "no worker holds it")


def states_or_reason() -> tuple[Mapping[int, str], str | None]:
    try:
        return live_states(), None
    except redis.RedisError:
        return {}, "unknown: Redis does not answer"
