"""Ends what nobody serves any more: requests of dead workers, tickets that waited too long, cancelled ones.

A thread of each web process sweeps twice a second and asks Redis alone; another does what may have to wait for the
database: it settles what others left, and looks at rights and reservations. Beat rings for both in a worker; any number
of sweepers is harmless. `cancel` is here too, since a waiting request that is cancelled is ended by whoever cancels it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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
STOP_SECONDS = 5.0
MOST_UNHEARD = 10_000

_unheard: deque[tuple[str, str, str]] = deque(maxlen=MOST_UNHEARD)
"""Request, web and leaving of readers of this process that went while Redis did not answer; any thread."""


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
    those of running requests from their workers. The sweep settles what had waited. Where Redis does not answer, which
    is when many clients go, the sweep of this process says it again.
    """
    queue, leaving = queue or ticket_queue(), secrets.token_hex(8)
    try:
        _leave(queue, request_id, web, leaving)
    except redis.RedisError as error:
        logger.warning("that a reader of %s has gone is said again later: %s", request_id, error)
        _unheard.append((request_id, web, leaving))


def _leave(queue: TicketQueue, request_id: str, web: str, leaving: str) -> None:
    _, claim = queue.leave(request_id, web, leaving)
    if claim is not None and _end(queue.client, claim) is not None:
        settlement.leave_to_sweep(queue.client, [request_id])


def _leave_again(queue: TicketQueue) -> None:
    """Raises redis.RedisError where it is still away; what is left is for the next time."""
    for _ in range(len(_unheard)):
        unheard = _unheard.popleft()
        try:
            _leave(queue, *unheard)
        except redis.RedisError:
            _unheard.append(unheard)
            raise


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
    """Sweeps on a thread of its own, and keeps the ledger on another, until it is stopped."""

    def __init__(self, queue: TicketQueue, *, every_seconds: float = SWEEP_SECONDS) -> None:
        self._queue = queue
        self._entitlements = Entitlements(queue, lambda request_id, why: cancel(request_id, queue=queue, why=why))
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=[round_of_work], name=name, daemon=True)
            for name, round_of_work in [("reaper", self.end_unserved), ("reaper-ledger", self._look_and_settle)]
        ]
        self._reservations_at = 0.0
        self._responses_at = float("-inf")

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        until = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))

    def check_entitlements(self) -> None:
        """End what may not go on, in web processes, too: a pool may have no worker. Never raises."""
        self._entitlements.poll()

    def sweep(self, now: float | None = None) -> int:
        """One round of both; returns how many requests it ended. `now` is monotonic seconds. Raises redis.RedisError,
        Refusal or DatabaseError."""
        number = self.end_unserved()
        self.settle(now)
        return number

    def end_unserved(self) -> int:
        """End what nobody serves or reads, and ring lost bells; how many requests this ended. Raises redis.RedisError.

        Asks no database: one that is away would keep the clients of a dead worker waiting.
        """
        client = self._queue.client
        swept = self._queue.sweep()
        ended = [claim.lease.ticket.request_id for claim in swept.claims if _end(client, claim) is not None]
        if ended:
            settlement.leave_to_sweep(client, ended)
            logger.warning("%d requests were ended that nobody served", len(ended))
        for pool, number in swept.rings:
            for _ in range(number):
                doorbell.ring(pool)
        _leave_again(self._queue)
        return len(ended)

    def settle(self, now: float | None = None) -> None:
        """Settle what others left, and release what nobody will. Raises as `sweep`."""
        now = time.monotonic() if now is None else now
        client = self._queue.client
        settlement.settle_all_pending(client, older_than_seconds=settlement.ORPHAN_SECONDS)
        if now - self._reservations_at >= RESERVATIONS_EVERY_SECONDS:
            self._reservations_at = now
            # After a long outage a reservation may have run out before its request could be settled.
            quotas.sweep_expired(datetime.now(UTC), partial(settlement.unsettled, client))
        if now - self._responses_at >= RESPONSES_EVERY_SECONDS:
            self._responses_at = now
            stored_responses.purge(datetime.now(UTC))

    def _look_and_settle(self) -> None:
        self.check_entitlements()
        self.settle()

    def _run(self, round_of_work: Callable[[], object]) -> None:
        while not self._stop.wait(self._every_seconds):
            try:
                round_of_work()
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
