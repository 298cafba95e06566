"""/healthz, /readyz, /modelz: what a load balancer and an operator ask first. No key, no load is ever triggered.

/healthz touches nothing. The others look at the database, Redis and the workers' heartbeats, each on a thread of its
own with a bound of a second: a dependency that hangs is reported, it does not hang the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from django.conf import settings
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse
from drf_spectacular.utils import extend_schema
from redis import RedisError

from inference import registry
from inference.api.async_view import AsyncAPIView, json_response
from inference.api.hop import tidy_connections
from inference.api.native.schemas import HealthReply, ModelzReply, ReadyReply
from inference.queue import WorkerInfo, ticket_queue
from inference.registry import Served

CHECK_SECONDS = 1.0
Found = TypeVar("Found")


class Probe:
    """One thread that asks one dependency. While an earlier question hangs, later ones fail at once."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"probe-{name}")
        self._last: Future[Any] | None = None

    async def ask(self, question: Callable[[], Found]) -> Found | None:
        """None where the dependency failed, hangs, or did not answer within CHECK_SECONDS."""
        if self._last is not None and not self._last.done():
            return None
        future = self._executor.submit(question)
        self._last = future
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), CHECK_SECONDS)
        except (TimeoutError, DatabaseError, RedisError, OSError):
            return None


@lru_cache(maxsize=1)
def _probes() -> tuple[Probe, Probe]:
    return Probe("db"), Probe("redis")


def _default_model() -> tuple[Served | None]:
    """Asks the database, not the cache of the registry: that it answers is half of the question."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()
        return (registry.default(),)
    finally:
        tidy_connections()


def _live_workers() -> list[WorkerInfo]:
    return ticket_queue().workers()


async def _look() -> tuple[tuple[Served | None] | None, list[WorkerInfo] | None]:
    database, redis = _probes()
    return await asyncio.gather(database.ask(_default_model), redis.ask(_live_workers))


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What one worker's heartbeat says about one model."""

    is_loaded: bool = False
    error: str | None = None


def worker_state(worker: WorkerInfo, model: Served) -> WorkerState:
    """From `models` of its heartbeat (HostedModel.report)."""
    for said in worker.info.get("models", ()):
        if said["id"] == model.id:
            return WorkerState(is_loaded=said["state"] == "ready", error=said.get("error") or None)
    return WorkerState()


def _holds(workers: list[WorkerInfo], model: Served) -> bool:
    return any(worker_state(worker, model).is_loaded for worker in workers)


class HealthView(AsyncAPIView):
    """The process lives."""

    is_public = True
    route = "/healthz"

    @extend_schema(responses=HealthReply, auth=[], summary="Whether the process lives")
    async def get(self, request: HttpRequest) -> HttpResponse:
        return json_response({"status": "ok"})


class ReadyView(AsyncAPIView):
    """Requests would be served now."""

    is_public = True
    route = "/readyz"

    @extend_schema(responses={200: ReadyReply, 503: ReadyReply}, auth=[], summary="Whether requests would be served")
    async def get(self, request: HttpRequest) -> HttpResponse:
        answer, workers = await _look()
        model = answer[0] if answer else None
        loaded = bool(model and workers and _holds(workers, model))
        must_hold = settings.CONFIG.require_model_ready
        ready = answer is not None and workers is not None and (loaded or not must_hold)
        content = {
            "status": "ready" if ready else "not ready",
            "db": "error" if answer is None else "ok",
            "redis": "error" if workers is None else "ok",
            "workers": len(workers or ()),
            "model_load_mode": model.load_mode if model else "off",
            "require_model_ready": must_hold,
            "model_loaded": loaded,
            "llm": _llm(model, workers, loaded),
        }
        return json_response(content, 200 if ready else 503)


class ModelzView(AsyncAPIView):
    """The default model is in a worker's memory."""

    is_public = True
    route = "/modelz"

    @extend_schema(
        responses={200: ModelzReply, 503: ModelzReply}, auth=[], summary="Whether the default model is loaded"
    )
    async def get(self, request: HttpRequest) -> HttpResponse:
        answer, workers = await _look()
        model = answer[0] if answer else None
        loaded = bool(model and workers and _holds(workers, model))
        content = {
            "status": "ok" if loaded else "not ready",
            "model_load_mode": model.load_mode if model else "off",
            "model_loaded": loaded,
            "model_error": None if loaded else _why_not(answer is not None, model, workers),
            "llm": _llm(model, workers, loaded),
        }
        return json_response(content, 200 if loaded else 503)


def _llm(model: Served | None, workers: list[WorkerInfo] | None, loaded: bool) -> str:
    if loaded:
        return "ok"
    if model is None:
        return "no model"
    return "loading" if any(worker.pool == model.pool for worker in workers or ()) else "no worker"


def _why_not(database_answers: bool, model: Served | None, workers: list[WorkerInfo] | None) -> str:
    if not database_answers:
        return "the database does not answer"
    if model is None:
        return "no default model is registered"
    if workers is None:
        return "Redis does not answer"
    pool = [worker for worker in workers if worker.pool == model.pool]
    if not pool:
        return "no worker serves the model's pool"
    errors = [error for worker in pool if (error := worker_state(worker, model).error)]
    return errors[0][:200] if errors else "the model is being loaded"
