"""Ends what nobody serves any more: requests of dead workers, tickets that waited too long, cancelled ones.

A thread of each web process sweeps twice a second, beat rings the same sweep in a worker; any number of sweepers is
harmless. `cancel` is here too, since a waiting request that is cancelled is ended by whoever cancels it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial

import redis
from django.db import DatabaseError, connection

from accounts import redis_client
from accounts.ledger import quotas
from accounts.limits import throttling
from accounts.trail.refusals import Refusal
from inference import settlement, stored_responses
from inference.engine.types import Finished, FinishReason, Receipt
from inference.settlement import Ended
from inference.transport import doorbell
from inference.transport.queue import Claim, TicketQueue, ticket_queue
from inference.transport.stream import encode_finished, end_claimed
from inference.upkeep.entitlements import Entitlements

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.5
RESERVATIONS_EVERY_SECONDS = 30.0
RESPONSES_EVERY_SECONDS = 600.0


def cancel(request_id: str, *, queue: TicketQueue | None = None, why: str = "cancelled") -> str | None:
    """Cancel a request and say what it was: waiting, running, done, or None if it is unknown. Idempotent.

    A waiting one ends now, free of charge; a running one within an engine step, and pays for what was computed. why:
    another code than cancelled is told to its client. Raises redis.RedisError.
    """
    queue = queue or ticket_queue()
    state, claim = queue.cancel(request_id, why)
    if claim is not None:
        end_claims(queue.client, [claim])
    return state


def leave(request_id: str, web: str, *, queue: TicketQueue | None = None) -> None:
    """A reader has gone: the request ends as after `cancel`, unless it has other readers or may go on without.

    Asks Redis alone: all leaves of a web process go through one thread, and a database that is away must not keep
    those of running requests from their workers. The sweep settles what had waited.
    """
    queue = queue or ticket_queue()
    _, claim = queue.leave(request_id, web)
    if claim is not None and _end(queue.client, claim) is not None:
        settlement.leave_to_sweep(queue.client, request_id)


def cancel_where(*, key_id: int | None = None, tenant_id: int | None = None) -> int:
    """Cancel everything that a key or a tenant has waiting or running, as when it is revoked; returns how many."""
    requests = ticket_queue().live_requests(key_id=key_id, tenant_id=tenant_id)
    for request_id in requests:
        cancel(request_id)
    return len(requests)


def end_claims(client: redis.Redis, claims: Sequence[Claim]) -> int:
    """Give places back, write the last events, settle; returns how many requests this ended.

    A claim whose settlement fails is settled from Redis later: its outcome is filed with its last event.
    """
    ended = [item for claim in claims if (item := _end(client, claim)) is not None]
    if ended:
        try:
            settlement.settle_filed(client, ended)
        except (Refusal, DatabaseError, redis.RedisError) as error:
            logger.warning("%d ended requests are settled later: %s", len(ended), error)
    return len(ended)


def _end(client: redis.Redis, claim: Claim) -> Ended | None:
    """None where another has claimed the ticket since."""
    ticket = claim.lease.ticket
    outcome = settlement.outcome_without_engine(ticket, claim.why, now=time.time())
    throttling.leave(ticket.tenant_id, ticket.quota_key_id, ticket.request_id, unused_tokens=ticket.entered_tokens)
    reason = FinishReason(outcome.finish_reason)
    finished = Finished(
        ticket.request_id, reason, Receipt(prompt_tokens=ticket.num_prompt_tokens), error=outcome.error_code or None
    )
    held = end_claimed(client, claim.lease, encode_finished(finished, ""), outcome.to_bytes())
    return (ticket, outcome) if held else None


class Reaper:
    """Sweeps on a thread of its own until it is stopped."""

    def __init__(self, queue: TicketQueue, *, every_seconds: float = SWEEP_SECONDS) -> None:
        self._queue = queue
        self._entitlements = Entitlements(queue, lambda request_id, why: cancel(request_id, queue=queue, why=why))
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self._reservations_at = 0.0
        self._responses_at = float("-inf")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(5)

    def check_entitlements(self) -> None:
        """End what may not go on, in web processes, too: a pool may have no worker. Never raises."""
        self._entitlements.poll()

    def sweep(self, now: float | None = None) -> int:
        """One round; returns how many requests it ended. `now` is monotonic seconds. Raises redis.RedisError."""
        now = time.monotonic() if now is None else now
        swept = self._queue.sweep()
        for pool, number in swept.rings:
            for _ in range(number):
                doorbell.ring(pool)
        number = end_claims(self._queue.client, swept.claims)
        if number:
            logger.warning("%d requests were ended that nobody served", number)
        client = self._queue.client
        settlement.settle_all_pending(client, older_than_seconds=settlement.ORPHAN_SECONDS)
        if now - self._reservations_at >= RESERVATIONS_EVERY_SECONDS:
            self._reservations_at = now
            # After a long outage a reservation may have run out before its request could be settled.
            quotas.sweep_expired(datetime.now(UTC), partial(settlement.unsettled, client))
        if now - self._responses_at >= RESPONSES_EVERY_SECONDS:
            self._responses_at = now
            stored_responses.purge(datetime.now(UTC))
        return number

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                self.check_entitlements()
                self.sweep()
            except redis.RedisError as error:
                logger.warning("the sweep waits for Redis: %s", error)
            except (Refusal, DatabaseError) as error:
                logger.warning("the sweep waits for the database: %s", error)
                connection.close()
            except Exception:
                logger.exception("a sweep failed")
        connection.close()


_reaper: Reaper | None = None


def start() -> None:
    """The reaper of this process; the web calls it when it starts. Idempotent."""
    global _reaper
    if _reaper is None:
        _reaper = Reaper(TicketQueue(redis_client.client()))
        _reaper.start()


def stop() -> None:
    global _reaper
    reaper, _reaper = _reaper, None
    if reaper is not None:
        reaper.stop()
