"""Ending requests before their time: a client that has gone, a cancel that was asked for, a key that was revoked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import structlog
from redis import RedisError

from accounts.refusals import Refusal
from inference import reaper
from inference.api.hop import shared_hop

log = structlog.get_logger("llmsite.cancel")


def cancel(request_id: str) -> str | None:
    """Waiting: it is ended here. Running: its worker is told. Blocking; the state it was in, None if unknown."""
    return reaper.cancel(request_id)


def cancel_soon(request_id: str) -> None:
    """As `cancel`, from the event loop."""
    shared_hop().send(partial(reaper.cancel, request_id))


@contextmanager
def unless_finished(request_id: str) -> Iterator[None]:
    """Cancels the request if the block is left by anything but its end; a Refusal is such an end."""
    try:
        yield
    except Refusal:
        raise
    except BaseException:
        cancel_soon(request_id)
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
