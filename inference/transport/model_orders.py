"""What an operator wants of a model now: a small form to the workers of its pool, and what those say of their models.

For the operator's views, the admin and commands; workers read the orders on the thread that listens to Redis. Nothing
waits here: that a model is loaded is seen in the next heartbeats. Who ordered what is in the audit log, whoever asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import redis

from accounts.trail import audit_log
from accounts.trail.refusals import Refusal
from inference.catalog.served import Served
from inference.models import ServedModel
from inference.transport.queue import WorkerInfo, ticket_queue

Action = Literal["load", "unload"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOrder:
    action: Action
    model_id: int

    def to_bytes(self) -> bytes:
        return orjson.dumps(self)

    @staticmethod
    def parse(data: bytes) -> ModelOrder:
        """Raises ValueError or TypeError for anything else."""
        order = ModelOrder(**orjson.loads(data))
        if order.action not in ("load", "unload"):
            raise ValueError(f"there is no order {order.action!r}")
        return order


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """A model as the workers have it, in one word; of several workers the one that is nearest to serving.

    state: ready, loading, waiting, retiring, unloaded, failed, off, or missing where no worker of its pool lives.
    progress: of a load, 0.0 to 1.0. load_seconds: how long a load is expected to take. error: for operators.
    comes_on_demand: the next request loads it.
    """

    state: str
    progress: float | None = None
    load_seconds: float | None = None
    error: str = ""
    comes_on_demand: bool = False

    @property
    def is_loaded(self) -> bool:
        return self.state == "ready"

    @property
    def would_serve(self) -> bool:
        """A request has an answer now, or as soon as the model is loaded for it."""
        return self.is_loaded or (self.comes_on_demand and self.state != "failed")


NEAREST = ("ready", "loading", "waiting", "retiring", "unloaded", "failed")


def state_of(served: Served, workers: Iterable[WorkerInfo]) -> ModelState:
    """From the heartbeats (HostedModel.report)."""
    reports = [
        report
        for worker in workers
        if worker.pool == served.pool and not worker.info.get("stopping")
        for report in worker.info.get("models", ())
        if report["id"] == served.id
    ]
    if not reports:
        return ModelState(state="off" if served.is_off else "missing")
    found = min(reports, key=lambda each: NEAREST.index(_word(each)))
    return ModelState(
        state=_word(found),
        progress=found.get("progress"),
        load_seconds=found.get("load_seconds"),
        error=found.get("error") or "",
        comes_on_demand=any(each.get("on_demand") for each in reports),
    )


def _word(report: dict[str, Any]) -> str:
    state = str(report["state"])
    if report.get("is_waiting") and state in ("unloaded", "failed"):
        return "waiting"
    return state if state in NEAREST else "unloaded"


def load(served: Served) -> bool:
    """Have a worker load it: of those that live, the one with most room. False where one has it already.

    Raises Refusal "llm_not_loaded" for a model that is switched off, "llm_unavailable" where no worker lives, or
    redis.RedisError.
    """
    if served.is_off:
        raise Refusal("llm_not_loaded", f"The model {served.name!r} is switched off.", model=served.name)
    queue = ticket_queue()
    workers = queue.workers()
    if state_of(served, workers).state in ("ready", "loading"):
        return False
    able = [worker for worker in workers if worker.pool == served.pool and not worker.info.get("stopping")]
    able.sort(key=lambda each: each.info.get("used_bytes", 0) - each.info.get("budget_bytes", 0))
    order = ModelOrder(action="load", model_id=served.id)
    if not any(_send(queue.client, worker, order) for worker in able):
        raise Refusal("llm_unavailable", f"No worker of pool {served.pool!r} lives.", retry_after=2)
    _note(served, order)
    return True


def unload(served: Served) -> int:
    """Have all workers unload it as soon as it is idle there; how many have it. Raises redis.RedisError."""
    queue = ticket_queue()
    order = ModelOrder(action="unload", model_id=served.id)
    holders = [
        worker
        for worker in queue.workers()
        for report in worker.info.get("models", ())
        if report["id"] == served.id and report["state"] in ("ready", "loading", "retiring")
    ]
    number = sum(_send(queue.client, worker, order) for worker in holders)
    if number:
        _note(served, order)
    return number


def _note(served: Served, order: ModelOrder) -> None:
    audit_log.acted(ServedModel(pk=served.id, name=served.name), {"ordered": (None, order.action)})


def _send(client: redis.Redis, worker: WorkerInfo, order: ModelOrder) -> bool:
    """Whether the worker listens."""
    return bool(client.publish(channel_of(worker.worker_id), order.to_bytes()))


def channel_of(worker_id: str) -> str:
    return f"model-orders:{worker_id}"
