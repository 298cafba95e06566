"""The one hop from the event loop into threads: a shared, bounded executor for everything that blocks.

Its threads are all the threads, and their database connections all the connections, that requests of the API hold,
however many of them wait. Threads keep their connection: opening SQLite anew costs more than an admission.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import structlog
from django.conf import settings
from django.db import connections

from accounts.trail.refusals import Refusal

Outcome = TypeVar("Outcome")

MAX_PENDING_PER_THREAD = 128
log = structlog.get_logger("llmsite.hop")


class Hop:
    """A bounded executor with a bounded queue in front of it."""

    def __init__(self, num_threads: int) -> None:
        self.max_pending = num_threads * MAX_PENDING_PER_THREAD
        self.num_pending = 0
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="api")
        self._urgent = ThreadPoolExecutor(1, thread_name_prefix="api-urgent")

    async def run(self, function: Callable[[], Outcome], *, abandon: Callable[[Outcome], None]) -> Outcome:
        """`function()` in a thread. If the caller is cancelled meanwhile, `abandon(outcome)` undoes it there.

        Raises Refusal("service_unavailable") when too many already wait for a thread.
        """
        if self.num_pending >= self.max_pending:
            raise Refusal("service_unavailable", "Too many requests wait to be admitted.", retry_after=1)
        self.num_pending += 1
        future = self._executor.submit(_with_connection, function)
        waiting = asyncio.wrap_future(future)
        waiting.add_done_callback(self._count_down)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():
                future.add_done_callback(lambda done: self._undo(done, abandon))
            raise

    def send(self, function: Callable[[], object]) -> None:
        """`function()` in a thread of its own, with nobody waiting: cancelling must not queue behind admissions."""
        self._urgent.submit(_logged, function)

    def close(self) -> None:
        self._executor.shutdown(wait=True)
        self._urgent.shutdown(wait=True)

    def _count_down(self, waiting: asyncio.Future[Any]) -> None:
        """On the event loop's thread, so the count needs no lock."""
        self.num_pending -= 1
        if not waiting.cancelled():
            waiting.exception()  # marks it as seen, for a caller that is gone

    def _undo(self, done: Future[Outcome], abandon: Callable[[Outcome], None]) -> None:
        if not done.cancelled() and done.exception() is None:
            outcome = done.result()
            self.send(lambda: abandon(outcome))


def _with_connection(function: Callable[[], Outcome]) -> Outcome:
    try:
        return function()
    finally:
        tidy_connections()


def _logged(function: Callable[[], object]) -> None:
    try:
        _with_connection(function)
    except Exception:  # a thread's border: nobody waits for the outcome
        log.exception("a task in the background failed")


def tidy_connections() -> None:
    """Pooled connections go back to their pool, broken ones are closed, a sound SQLite connection stays open."""
    for connection in connections.all(initialized_only=True):
        if connection.vendor != "sqlite" or connection.errors_occurred:
            connection.close_if_unusable_or_obsolete()


@lru_cache(maxsize=1)
def shared_hop() -> Hop:
    """The executor of this process, made at the first request."""
    return Hop(settings.CONFIG.web_threads)
