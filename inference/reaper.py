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

import redis
from django.db import DatabaseError, connection

from accounts import quotas, redis_client, throttling
from accounts.refusals import Refusal
from inference import doorbell, settlement
from inference.engine.types import Finished, FinishReason, Receipt
from inference.queue import HEARTBEAT_TTL_SECONDS, Claim, TicketQueue, ticket_queue
from inference.settlement import Ended
from inference.stream import encode_finished, end_claimed

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 0.5
TRUST_AFTER_SECONDS = HEARTBEAT_TTL_SECONDS + 1.0
"""Redis must have answered for so long before a missing heartbeat means a dead worker and not a Redis that was away."""
RESERVATIONS_EVERY_SECONDS = 30.0


def cancel(request_id: str, *, queue: TicketQueue | None = None) -> str | None:
    """Cancel a request and say what it was: waiting, running, done, or None if it is unknown. Idempotent.

    A waiting one ends now, free of charge; a running one within an engine step. Raises redis.RedisError.
    """
    queue = queue or ticket_queue()
    state, claim = queue.cancel(request_id)
    if claim is not None:
        end_claims(queue.client, [claim])
    return state


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
            settlement.settle_many(ended)
            settlement.strike_off(client, [ticket.request_id for ticket, _ in ended])
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
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self._answers_since: float | None = None
        self._reservations_at = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(5)

    def sweep(self, now: float | None = None) -> int:
        """One round; returns how many requests it ended. `now` is monotonic seconds. Raises redis.RedisError."""
        now = time.monotonic() if now is None else now
        if self._answers_since is None:
            self._answers_since = now
        trusted = now - self._answers_since >= TRUST_AFTER_SECONDS
        swept = self._queue.sweep(trust_heartbeats=trusted)
        for pool, number in swept.rings:
            for _ in range(number):
                doorbell.ring(pool)
        number = end_claims(self._queue.client, swept.claims)
        if number:
            logger.warning("%d requests were ended that nobody served", number)
        settlement.settle_pending(self._queue.client, older_than_seconds=settlement.ORPHAN_SECONDS)
        if now - self._reservations_at >= RESERVATIONS_EVERY_SECONDS:
            self._reservations_at = now
            quotas.sweep_expired(datetime.now(UTC))
        return number

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                self.sweep()
            except redis.RedisError as error:
                self._answers_since = None
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
