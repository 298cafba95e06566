"""Under which id a line of a batch is admitted, or was. On admission threads.

A line is asked for again whenever its feeder died, its worker died, or something was away. Its ids follow from its
number, so what was begun is found: a ticket in the queue, in a worker's hands, or with its end still in Redis. An id
whose ticket came to nothing through no fault of the line's is spent, and the next one is tried. Charged at most once:
a charge whose answer Redis has lost is given back before the next id is used.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import orjson
import redis
from django.db import transaction

from accounts.ledger import quotas
from accounts.models import LedgerEntry, Reservation
from accounts.trail.refusals import Refusal
from inference.batches.terms import BatchTerms
from inference.transport.queue import ticket_key, ticket_queue
from inference.transport.stream import stream_key

logger = logging.getLogger(__name__)

DEADLY = frozenset({"worker_lost", "request_lost", "engine_crashed"})
"""A line that is there each time when a worker dies may be the reason."""
PASSING = DEADLY | {"worker_stopping", "engine_stopped", "queue_full", "queue_timeout", "llm_unavailable"}
MAX_LOSSES = 6
MAX_PLACES = 500


def claim(request_id: str, batch: BatchTerms) -> tuple[str, bool]:
    """(id, whether its ticket is there); the batch's terms note it. Raises Refusal worker_lost, without a time to try
    again, for a line that has lost too many workers; request_cancelled where nothing new is to be begun;
    service_unavailable without Redis."""
    place, is_known = _place_of(request_id)
    if batch.only_begun and not is_known:
        raise Refusal("request_cancelled", "The batch has ended.")
    if place not in batch.request_ids:
        batch.request_ids.append(place)
    return place, is_known


def _place_of(request_id: str) -> tuple[str, bool]:
    num_losses = 0
    for number in range(MAX_PLACES):
        place = _numbered(request_id, number)
        word = _word(place)
        if word is None:
            if _is_free(place):
                return place, False
        elif word not in PASSING:
            return place, True
        elif word in DEADLY:
            num_losses += 1
            if num_losses >= MAX_LOSSES:
                break
    raise Refusal("worker_lost", f"The line was given up: {num_losses} workers died while they had it.")


def _numbered(request_id: str, number: int) -> str:
    """The first has the id itself; a part keeps its number at the end."""
    line, dot, part = request_id.partition(".")
    return f"{line}-r{number}{dot}{part}" if number else request_id


def _word(request_id: str) -> str | None:
    """Why its ticket came to nothing; "" where it waits, runs or has its answer; None where Redis knows nothing."""
    client = ticket_queue().client
    try:
        state: Any = client.hget(ticket_key(request_id), "state")
        if state != b"done":
            return None if state is None else ""
        last: Any = client.xrevrange(stream_key(request_id), count=1)
    except redis.RedisError as error:
        raise Refusal("service_unavailable", "The queue does not answer.", retry_after=2) from error
    if not last:
        return None
    event = orjson.loads(last[0][1][b"e"])
    return (event.get("error") or "") if event.get("t") == "finished" else None


def _is_free(request_id: str) -> bool:
    """Whether it can be reserved under this id: a reservation that was never used is taken over."""
    state = Reservation.objects.filter(pk=request_id).values_list("state", flat=True).first()
    if state == Reservation.State.SETTLED:
        _give_back(request_id)
    return state in (None, Reservation.State.OPEN)


def _give_back(request_id: str) -> None:
    """What an answer cost that nobody has. Idempotent; one feeder at a time has the batch."""
    refund = f"refund-{request_id}"
    with transaction.atomic():
        if LedgerEntry.objects.filter(kind=LedgerEntry.Kind.ADJUST, request_id=refund).exists():
            return
        charged = LedgerEntry.objects.of_requests([request_id]).filter(kind=LedgerEntry.Kind.SETTLE).first()
        if charged is None:
            return
        logger.warning("the answer of request %s is lost: its %d tokens go back", request_id, charged.used_tokens)
        reason = "the answer was lost before its batch had it"
        quotas.give_back(charged, request_id=refund, reason=reason, now=datetime.now(UTC))
