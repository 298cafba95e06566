"""Where tickets wait, who holds them, and which workers live: Redis behind Lua, called from any thread.

A ticket is waiting, leased to one worker, claimed by somebody who ends it, or done. Every change of hands raises its
token; whoever holds an older one can neither write to its stream nor end it (fencing). Nothing here settles or streams.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson
import redis

from accounts import redis_client
from inference.lua import script
from inference.ticket import Ticket, TicketError

logger = logging.getLogger(__name__)

HEARTBEAT_TTL_SECONDS = 2.0
CLAIM_DROPPED_SECONDS = 5.0
RING_AGAIN_SECONDS = 1.0
MARGIN_SECONDS = 120.0
"""Ticket and stream outlive the request's deadline by this, so that its end can still be written."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A ticket in the hands of one holder. `token` fences its writes."""

    ticket: Ticket
    token: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A ticket that its holder must end. why: cancelled, worker_lost, queue_timeout, or a reason given to `cancel`."""

    lease: Lease
    why: str


@dataclass(frozen=True, slots=True)
class RequestState:
    """What Redis knows of a request. state: waiting, running, or done; position counts from 0 among the waiting."""

    state: str
    tenant_id: int
    key_id: int
    pool: str
    created_at: float
    position: int | None


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live worker's heartbeat."""

    worker_id: str
    pool: str
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a worker learns when it beats."""

    cancels: frozenset[str]
    leases: frozenset[str]
    num_waiting: int


@dataclass(frozen=True, slots=True)
class Sweep:
    """Claims to end, and pools whose doorbell seems lost with the number of rings that are due."""

    claims: tuple[Claim, ...]
    rings: tuple[tuple[str, int], ...]


def ticket_key(request_id: str) -> str:
    return f"ticket:{request_id}"


class TicketQueue:
    """The queue of an installation. Every method is one round trip and raises redis.RedisError if it fails."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._put = script(client, "put")
        self._take = script(client, "take")
        self._cancel = script(client, "cancel")
        self._discard = script(client, "discard")
        self._beat = script(client, "beat")
        self._sweep = script(client, "sweep")
        self._forget = script(client, "forget")
        self._give_up = script(client, "give_up")

    def put(self, ticket: Ticket, *, queue_length: int | None = None) -> bool:
        """Queue the ticket. False where `queue_length` requests of the tenant wait already and no slot is free."""
        wait_seconds = max(0.0, ticket.queue_deadline_at - ticket.created_at)
        ttl = int(max(0.0, ticket.deadline_at - ticket.created_at) + MARGIN_SECONDS)
        limit: int | str = "" if queue_length is None else queue_length
        args: list[Any] = [
            ticket.request_id,
            ticket.pool,
            ticket.model_id,
            ticket.tenant_id,
            ticket.key_id,
            wait_seconds,
            ttl,
        ]
        args += [limit, ticket.header(), ticket.prompt_bytes()]
        return bool(self._put(keys=[ticket_key(ticket.request_id)], args=args))

    def take(self, pool: str, worker_id: str, model_ids: Sequence[int]) -> Lease | None:
        """Lease the oldest waiting ticket of those models."""
        while model_ids:
            reply = self._take(args=[pool, worker_id, *model_ids])
            if reply is None:
                return None
            request_id, header, prompt, token = reply
            lease = self._lease(request_id, header, prompt or b"", token)
            if lease is not None:
                return lease
        return None

    def _lease(self, request_id: bytes, header: bytes, prompt: bytes, token: int) -> Lease | None:
        """None for a ticket that cannot be read: it is forgotten, and its reservation runs out."""
        try:
            return Lease(Ticket.parse(header, prompt), token)
        except TicketError as error:
            logger.error("ticket %s is dropped: %s", request_id.decode(errors="replace"), error)
            self._forget(args=[request_id])
            return None

    def _claim(self, parts: Sequence[Any]) -> Claim | None:
        request_id, why, header, token = parts
        lease = self._lease(request_id, header, b"", token)
        return None if lease is None else Claim(lease, why.decode())

    def cancel(self, request_id: str, reason: str = "cancelled") -> tuple[str | None, Claim | None]:
        """Cancel a request: (waiting, claim to end), (running, None), (done, None) or (None, None) if it is unknown."""
        reply = self._cancel(args=[request_id, reason])
        if reply is None:
            return None, None
        state = reply[0].decode()
        return state, self._claim(reply[1]) if state == "waiting" else None

    def discard(self, request_id: str) -> bool:
        """Take back a ticket that no worker has seen."""
        return bool(self._discard(args=[request_id]))

    def live_requests(self, *, key_id: int | None = None, tenant_id: int | None = None) -> list[str]:
        """Requests of a key or of a tenant that have not ended."""
        name = f"of:key:{key_id}" if key_id is not None else f"of:tenant:{tenant_id}"
        return sorted(map(_text, self.client.smembers(name)))

    def state(self, request_id: str) -> RequestState | None:
        """None for an unknown request, or one that ended long ago."""
        names = ["state", "tenant", "key", "pool", "created_at"]
        values = self.client.hmget(ticket_key(request_id), names)
        if None in values:
            return None
        state, tenant, key, pool, created_at = map(_text, values)
        position: Any = None
        if state == "waiting":
            position = self.client.zrank(f"waiting:{pool}", request_id)
        word = state if state in {"waiting", "done"} else "running"
        return RequestState(word, int(tenant), int(key), pool, float(created_at), position)

    def num_waiting(self, pool: str) -> int:
        return int(self.client.zcard(f"waiting:{pool}"))

    # Workers

    def beat(
        self,
        worker_id: str,
        pool: str,
        slots: int,
        info: dict[str, Any],
        ttl_seconds: float = HEARTBEAT_TTL_SECONDS,
    ) -> Pulse:
        """The worker lives for another `ttl_seconds`."""
        body = orjson.dumps({"pool": pool, **info})
        reply = self._beat(args=[worker_id, pool, slots, body, int(ttl_seconds * 1000)])
        cancels, leases = (frozenset(member.decode() for member in part) for part in reply[:2])
        return Pulse(cancels, leases, reply[2])

    def give_up(self, worker_id: str, request_ids: Sequence[str]) -> None:
        """The worker does not serve these leases after all; the next sweep ends them."""
        self._give_up(args=[worker_id, *request_ids])

    def sign_off(self, worker_id: str, pool: str) -> None:
        """The worker goes; what it still holds is claimed by the next sweep."""
        with self.client.pipeline(transaction=True) as pipe:
            pipe.delete(f"worker:{worker_id}")
            pipe.hdel(f"slots:{pool}", worker_id)
            pipe.execute()

    def workers(self) -> list[WorkerInfo]:
        """The workers that live."""
        ids = sorted(map(_text, self.client.smembers("workers")))
        bodies = self.client.mget([f"worker:{worker_id}" for worker_id in ids]) if ids else []
        infos = [(worker_id, orjson.loads(body)) for worker_id, body in zip(ids, bodies, strict=True) if body]
        return [WorkerInfo(worker_id, info.get("pool", ""), info) for worker_id, info in infos]

    def sweep(self, *, most: int = 200, trust_heartbeats: bool = True) -> Sweep:
        """Claim up to `most` tickets that nobody serves. Safe to call from anywhere at any time."""
        args = [most, CLAIM_DROPPED_SECONDS, int(RING_AGAIN_SECONDS * 1000), int(trust_heartbeats)]
        claims, rings = self._sweep(args=args)
        readable = [claim for claim in map(self._claim, claims) if claim is not None]
        return Sweep(tuple(readable), tuple((pool.decode(), number) for pool, number in rings))


def _text(value: Any) -> str:
    return str(value.decode())


@lru_cache(maxsize=1)
def ticket_queue() -> TicketQueue:
    """The queue on this process's client."""
    return TicketQueue(redis_client.client())
