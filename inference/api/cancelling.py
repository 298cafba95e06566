"""Ending requests before their time: a client that has gone, a cancel that was asked for, a key that was revoked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import structlog
from redis import RedisError

from accounts.trail.refusals import Refusal
from inference.api import presence
from inference.api.hop import shared_hop
from inference.upkeep import reaper

log = structlog.get_logger("llmsite.cancel")


def cancel(request_id: str) -> str | None:
    """Waiting: it is ended here. Running: its worker is told. Blocking; the state it was in, None if unknown."""
    return reaper.cancel(request_id)


def leave(request_id: str) -> None:
    """A client of this process has gone: the request is cancelled, unless others read it or it may go on. Blocking."""
    reaper.leave(request_id, presence.web_id())


def leave_soon(request_id: str) -> None:
    """As `leave`, from the event loop."""
    shared_hop().send(partial(leave, request_id))


@contextmanager
def unless_finished(request_id: str, *, is_batch: bool = False) -> Iterator[None]:
    """Leaves the request if the block is left by anything but its end; a Refusal is such an end.

    A line of a batch has nobody who could go away: it goes on, and whoever feeds the batch next finds it.
    """
    try:
        yield
    except Refusal:
        raise
    except BaseException:
        if not is_batch:
            leave_soon(request_id)
        raise


def cancel_all(*, key_id: int | None = None, tenant_id: int | None = None) -> int:
    """Everything that a key or a tenant has waiting or running. Blocking; the number of requests.

    Without Redis nothing runs that could be cancelled, and what waits there is refused by its own checks.
    """
    try:
        return reaper.cancel_where(key_id=key_id, tenant_id=tenant_id)
    except RedisError as error:
        log.warning("running requests could not be cancelled", exc_info=error)
        return 0
