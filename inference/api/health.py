"""/healthz, /readyz, /modelz: what a load balancer and an operator ask first. No key, no load is ever triggered.

A default model that its next request would load counts as ready: else whoever sends no requests to a site that is not
ready would never have it loaded.

/healthz touches nothing. The others look at the database, Redis and the workers' heartbeats, each on a thread of its
own with a bound of a second: a dependency that hangs is reported, it does not hang the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

from django.conf import settings
from django.db import DatabaseError, connection
from django.http import HttpRequest, HttpResponse
from drf_spectacular.utils import extend_schema
from redis import RedisError

from inference.api.async_view import AsyncAPIView, json_response
from inference.api.hop import tidy_connections
from inference.api.native.schemas import HealthReply, ModelzReply, ReadyReply
from inference.catalog import registry
from inference.catalog.served import Served
from inference.transport.model_orders import ModelState, state_of
from inference.transport.queue import WorkerInfo, ticket_queue

CHECK_SECONDS = 1.0
Found = TypeVar("Found")


class Probe:
    """One thread that asks one dependency, always the same. Whoever comes meanwhile has that answer, too; once it
    hangs, all fail at once."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"probe-{name}")
        self._last: Future[Any] | None = None
        self._asked_at = 0.0

    async def ask(self, question: Callable[[], Found]) -> Found | None:
        """None where the dependency failed, or did not answer within CHECK_SECONDS of the question."""
        if self._last is None or self._last.done():
            self._last = self._executor.submit(question)
            self._asked_at = time.monotonic()
        seconds_left = self._asked_at + CHECK_SECONDS - time.monotonic()
        if seconds_left <= 0:
            return None
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._last)), seconds_left)
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


def _state(model: Served | None, workers: list[WorkerInfo] | None) -> ModelState:
    return state_of(model, workers or ()) if model else ModelState(state="missing")


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
        state = _state(model, workers)
        must_hold = settings.CONFIG.require_model_ready
        ready = answer is not None and workers is not None and (state.would_serve or not must_hold)
        content = {
            "status": "ready" if ready else "not ready",
            "db": "error" if answer is None else "ok",
            "redis": "error" if workers is None else "ok",
            "workers": len(workers or ()),
            "model_load_mode": model.load_mode if model else "off",
            "require_model_ready": must_hold,
            "model_loaded": state.is_loaded,
            "llm": _llm(model, state),
            "progress": state.progress,
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
        state = _state(model, workers)
        loaded = state.is_loaded
        content = {
            "status": "ok" if loaded else "not ready",
            "model_load_mode": model.load_mode if model else "off",
            "model_loaded": loaded,
            "model_error": None if loaded else _why_not(answer is not None, model, workers, state),
            "llm": _llm(model, state),
        }
        return json_response(content, 200 if loaded else 503)


def _llm(model: Served | None, state: ModelState) -> str:
    """ok, or in one word why not."""
    if model is None:
        return "no model"
    return {"ready": "ok", "missing": "no worker"}.get(state.state, state.state)


def _why_not(database_answers: bool, model: Served | None, workers: list[WorkerInfo] | None, state: ModelState) -> str:
    if not database_answers:
        return "the database does not answer"
    if model is None:
        return "no default model is registered"
    if workers is None:
        return "Redis does not answer"
    if state.state == "missing":
        return "no worker serves the model's pool"
    if state.error:
        return state.error[:200]
    if state.state == "unloaded" and state.comes_on_demand:
        return "the model is loaded by its next request"
    return "the model is being loaded"
