"""Where tickets wait, who holds them, and which workers live: Redis behind Lua, called from any thread.

A ticket is waiting, leased to one worker, claimed by somebody who ends it, or done. Every change of hands raises its
token; whoever holds an older one can neither write to its stream nor end it (fencing). Nothing here settles or streams.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

import orjson
import redis
from django.conf import settings

from accounts import redis_client
from inference.transport.holding import Hold, Question
from inference.transport.lua import script
from inference.transport.ticket import Ticket, TicketError

logger = logging.getLogger(__name__)

HEARTBEAT_TTL_SECONDS = 2.0
WEB_TTL_SECONDS = 5.0
"""A web process that says nothing for so long is dead: what it alone read is cancelled."""
CLAIM_DROPPED_SECONDS = 5.0
RING_AGAIN_SECONDS = 1.0
UNHELD = Hold()
MARGIN_SECONDS = 120.0
"""Ticket and stream outlive the request's deadline by this, so that its end can still be written."""


@dataclass(frozen=True, slots=True)
class Share:
    """What a tenant may have of a pool beside others. weight: 1 is normal, a tenant of weight 2 gets twice as much.
    slots: that it may hold at once, None is any number. name: the class that its waits are counted under."""

    weight: float = 1.0
    slots: int | None = None
    name: str = ""


NORMAL = Share()


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker could serve now. free: models with a free slot; groups: of the sequences that it runs; parkable:
    (model, tenant) of sequences that could be parked, of models without a free slot."""

    free: tuple[int, ...] = ()
    groups: frozenset[str] = frozenset()
    parkable: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Lease:
    """A ticket in the hands of one holder. `token` fences its writes.

    share_name, waited_seconds: of the tenant's class, from put to take. parks: the tenant of whom the holder parks a
    sequence of this model, None where a slot is free.
    """

    ticket: Ticket
    token: int
    share_name: str = ""
    waited_seconds: float = 0.0
    parks: int | None = None


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
class LiveRequest:
    """One that waits, or runs on `worker`."""

    request_id: str
    tenant_id: int
    key_id: int
    pool: str
    created_at: float
    worker: str = ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A live worker's heartbeat."""

    worker_id: str
    pool: str
    info: dict[str, Any]


class QueueFull(Exception):
    """As many requests wait as may. whose: tenant or key."""

    def __init__(self, whose: str) -> None:
        super().__init__(f"the queue of this {whose} is full")
        self.whose = whose


@dataclass(frozen=True, slots=True)
class QueueLengths:
    """Requests that may wait for a slot; None is any number."""

    tenant: int | None = None
    key: int | None = None

    def arguments(self) -> list[int | str]:
        return ["" if each is None else each for each in (self.tenant, self.key)]


ANY_LENGTH = QueueLengths()


@dataclass(frozen=True, slots=True)
class Crowd:
    """How full a pool is: slots of live workers that nobody has, and requests that wait. full: whose queue takes no
    more, tenant or key; empty for neither's."""

    num_free: int
    num_waiting: int
    full: str = ""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a worker learns when it beats."""

    cancels: Mapping[str, str]
    """Ids and why."""
    leases: frozenset[str]
    num_waiting: int
    num_batch_waiting: int = 0
    oldest_seconds: float = 0.0
    """How long the oldest ticket of the pool has waited."""
    lag_tokens: float = 0.0
    """Weighted tokens between those who wait and have had most, and least."""


class Mark(StrEnum):
    """What a model is to a worker, as lua/waiting.lua reads it."""

    HELD = "held"
    ABLE = "able"
    LATER = "later"
    UNABLE = "unable"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What waits for a model. seconds: how long the oldest does. is_mine: this worker holds the model, or is to load
    it; is_hopeless: no worker can."""

    number: int
    seconds: float
    is_mine: bool
    is_hopeless: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """Claims to end, and pools whose doorbell seems lost with the number of rings that are due."""

    claims: tuple[Claim, ...]
    rings: tuple[tuple[str, int], ...]


def ticket_key(request_id: str) -> str:
    return f"ticket:{request_id}"


def batch_queue(pool: str) -> str:
    """Where lines of batches wait: as if in a pool of its own, which the pool's workers look into last."""
    return f"{pool}~batch"


class TicketQueue:
    """The queue of an installation. Every method is one round trip and raises redis.RedisError if it fails."""

    def __init__(self, client: redis.Redis, *, order: str = "fair") -> None:
        """order: fair, or fifo, which is first come, first served whoever comes."""
        self.client = client
        self.order = order
        self._put = script(client, "put")
        self._take = script(client, "take")
        self._cancel = script(client, "cancel")
        self._discard = script(client, "discard")
        self._beat = script(client, "beat")
        self._beat_web = script(client, "beat_web")
        self._sweep = script(client, "sweep")
        self._forget = script(client, "forget")
        self._give_up = script(client, "give_up")
        self._join = script(client, "join")
        self._leave = script(client, "leave")
        self._waiting = script(client, "waiting")
        self._crowd = script(client, "crowd")

    def put(
        self,
        ticket: Ticket,
        *,
        lengths: QueueLengths = ANY_LENGTH,
        hold: Hold = UNHELD,
        share: Share = NORMAL,
    ) -> None:
        """Queue the ticket. Raises QueueFull where as many requests wait as may, and no slot is free."""
        wait_seconds = max(0.0, ticket.queue_deadline_at - ticket.created_at)
        ttl = int(max(0.0, ticket.deadline_at - ticket.created_at) + MARGIN_SECONDS)
        tenant_length, key_length = lengths.arguments()
        args: list[Any] = [
            ticket.request_id,
            batch_queue(ticket.pool) if ticket.is_batch else ticket.pool,
            ticket.model_id,
            ticket.tenant_id,
            ticket.key_id,
            wait_seconds,
            ttl,
        ]
        args += [tenant_length, ticket.header(), ticket.prompt_bytes(), int(not ticket.is_batch)]
        args += [hold.web, hold.patience_seconds, hold.keep_seconds, hold.question(ticket)]
        args += [share.weight, "" if share.slots is None else share.slots, share.name]
        args += [ticket.num_prompt_tokens, ticket.max_tokens, ticket.group, ticket.quota_key_id, key_length]
        full = self._put(keys=[ticket_key(ticket.request_id), *filter(None, [hold.record])], args=args)
        if full:
            raise QueueFull(_text(full))

    def take(
        self, pool: str, worker_id: str, offer: Offer | Sequence[int], *, order: str | None = None
    ) -> Lease | None:
        """Lease the next ticket in the order of fair share (take.lua). A list of models is an offer of free slots.

        order: another than the queue's; fifo has no caps, for whoever ends what waits."""
        if not isinstance(offer, Offer):
            offer = Offer(free=tuple(offer))
        args: list[Any] = [pool, worker_id, order or self.order, len(offer.free), *offer.free]
        args += [len(offer.groups), *offer.groups, *(part for pair in offer.parkable for part in pair)]
        while offer.free or offer.parkable:
            reply = self._take(args=args)
            if reply is None:
                return None
            request_id, header, prompt, token, name, waited, parks = reply
            lease = self._lease(request_id, header, prompt or b"", token)
            if lease is not None:
                parked = int(parks) if parks else None
                return replace(lease, share_name=_text(name), waited_seconds=max(0.0, float(waited)), parks=parked)
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
        return self._cancelled(self._cancel(args=[request_id, reason]))

    def _cancelled(self, reply: Any) -> tuple[str | None, Claim | None]:
        if reply is None:
            return None, None
        state = reply[0].decode()
        return state, self._claim(reply[1]) if state == "waiting" else None

    # Readers

    def join(self, request_id: str, web: str) -> bool:
        """One more reads it in that web process. False where it has ended or is unknown."""
        return bool(self._join(args=[request_id, web, secrets.token_hex(8)]))

    def leave(self, request_id: str, web: str, leaving: str = "") -> tuple[str | None, Claim | None]:
        """One reads it no more; without any it is cancelled, as its patience says. As `cancel`, or (kept, None).

        leaving: the same where it is said again, since nobody knows whether the first time was heard.
        """
        return self._cancelled(self._leave(args=[request_id, web, leaving or secrets.token_hex(8)]))

    def question(self, request_id: str) -> Question | None:
        """None where the answer cannot be worded again: unknown, too old, or one of several answers."""
        values: list[Any] = self.client.hmget(ticket_key(request_id), ["question", "patience"])
        asked, patience = values
        if asked is None:
            return None
        try:
            return Question.parse(asked, float(patience or 0))
        except (TicketError, ValueError) as error:
            logger.error("request %s cannot be worded again: %s", request_id, error)
            return None

    def beat_web(self, web: str) -> None:
        """The web process lives for another WEB_TTL_SECONDS."""
        self._beat_web(args=[web, int(WEB_TTL_SECONDS * 1000)])

    def sign_off_web(self, web: str) -> None:
        """It goes; whatever it still reads has lost its reader with the next sweep."""
        self.client.delete(f"web:{web}")

    def discard(self, request_id: str) -> bool:
        """Take back a ticket that no worker has seen."""
        return bool(self._discard(args=[request_id]))

    def live_requests(self, *, key_id: int | None = None, tenant_id: int | None = None) -> list[str]:
        """Requests of a key or of a tenant that have not ended."""
        name = f"of:key:{key_id}" if key_id is not None else f"of:tenant:{tenant_id}"
        return sorted(map(_text, self.client.smembers(name)))

    def live_tickets(self, most: int = 10_000) -> list[Ticket]:
        """Without their prompts: the tickets that wait or are leased, in all pools, `most` of each kind. Three round
        trips."""
        pools, workers = (sorted(map(_text, self.client.smembers(name))) for name in ("pools", "workers"))
        with self.client.pipeline(transaction=False) as pipe:
            for pool in pools:
                pipe.zrange(f"waiting:{pool}", 0, most - 1)
            for worker in workers:
                pipe.hkeys(f"leases:{worker}")
            ids = [_text(each) for group in pipe.execute() for each in group[:most]]
        with self.client.pipeline(transaction=False) as pipe:
            for request_id in ids:
                pipe.hget(ticket_key(request_id), "header")
            headers = pipe.execute() if ids else []
        return [ticket for header in headers if header and (ticket := _parsed(header)) is not None]

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

    def crowd(
        self, pool: str, model_id: int, tenant_id: int, quota_key_id: int, lengths: QueueLengths = ANY_LENGTH
    ) -> Crowd:
        """As `put` would find it at this moment."""
        args = [pool, model_id, tenant_id, quota_key_id, *lengths.arguments()]
        num_free, num_waiting, full = self._crowd(args=args)
        return Crowd(num_free, num_waiting, _text(full))

    def num_waiting(self, pool: str) -> int:
        return int(self.client.zcard(f"waiting:{pool}"))

    def every_live(self, most: int) -> list[LiveRequest]:
        """Running ones first, then waiting ones of all pools by their deadlines; three round trips."""
        workers, pools = (sorted(map(_text, self.client.smembers(name))) for name in ("workers", "pools"))
        with self.client.pipeline(transaction=False) as pipe:
            for worker in workers:
                pipe.hkeys(f"leases:{worker}")
            for pool in pools:
                pipe.zrange(f"waiting:{pool}", 0, most - 1)
            groups = pipe.execute()
        owners = [*workers, *("" for _ in pools)]
        found = [(_text(each), owner) for owner, ids in zip(owners, groups, strict=True) for each in ids][:most]
        with self.client.pipeline(transaction=False) as pipe:
            for request_id, _ in found:
                pipe.hmget(ticket_key(request_id), ["tenant", "key", "pool", "created_at"])
            rows = pipe.execute()
        return [
            LiveRequest(request_id, int(row[0]), int(row[1]), _text(row[2]), float(row[3]), owner)
            for (request_id, owner), row in zip(found, rows, strict=True)
            if None not in row  # it ended meanwhile
        ]

    def live_of(self, tenant_ids: Iterable[int], most: int) -> list[LiveRequest]:
        """Those of these tenants, `most` of each: running ones first, then by their beginning. Two round trips."""
        with self.client.pipeline(transaction=False) as pipe:
            for tenant_id in sorted(tenant_ids):
                pipe.srandmember(f"of:tenant:{tenant_id}", most)
            ids = [_text(each) for group in pipe.execute() for each in group]
        with self.client.pipeline(transaction=False) as pipe:
            for request_id in ids:
                pipe.hmget(ticket_key(request_id), ["tenant", "key", "pool", "created_at", "worker"])
            rows = pipe.execute() if ids else []
        found = [
            LiveRequest(request_id, int(row[0]), int(row[1]), _text(row[2]), float(row[3]), _text(row[4] or b""))
            for request_id, row in zip(ids, rows, strict=True)
            if None not in row[:4]  # it ended meanwhile
        ]
        return sorted(found, key=lambda each: (not each.worker, each.created_at))

    def longest_wait(self, pool: str, now: float) -> float:
        """Seconds that the ticket which times out first has waited; 0 where none waits. now: Unix seconds."""
        for request_id in self.client.zrange(f"waiting:{pool}", 0, 0):
            created_at = self.client.hget(ticket_key(_text(request_id)), "created_at")
            return max(0.0, now - float(created_at)) if created_at else 0.0
        return 0.0

    # Workers

    def beat(
        self,
        worker_id: str,
        pool: str,
        slots: int,
        info: dict[str, Any],
        ttl_seconds: float = HEARTBEAT_TTL_SECONDS,
        model_slots: Mapping[int, int] | None = None,
    ) -> Pulse:
        """The worker lives for another `ttl_seconds`. model_slots: of its slots, those of each model."""
        body = orjson.dumps({"pool": pool, **info})
        own = [part for pair in (model_slots or {}).items() for part in pair]
        reply = self._beat(args=[worker_id, pool, slots, body, int(ttl_seconds * 1000), batch_queue(pool), *own])
        words = [word.decode() for word in reply[0]]
        cancels = dict(zip(words[::2], words[1::2], strict=True))
        leases = frozenset(member.decode() for member in reply[1])
        return Pulse(cancels, leases, reply[2], reply[3], float(reply[4]), float(reply[5]))

    def waiting(self, pool: str, worker_id: str, marks: Mapping[int, Mark]) -> dict[int, Waiting]:
        """What waits for these models. Of those that are ABLE and wanted, and that nobody holds, the worker has to load
        each that `is_mine`: nobody else will."""
        args = [part for model_id, mark in marks.items() for part in (model_id, mark.value)]
        answers = self._waiting(args=[pool, worker_id, *args]) if args else []
        return {
            model_id: Waiting(number, float(seconds), verdict == b"mine", verdict == b"none")
            for model_id, (number, seconds, verdict) in zip(marks, answers, strict=True)
        }

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

    def sweep(self, *, most: int = 200) -> Sweep:
        """Claim up to `most` tickets that nobody serves. Safe to call from anywhere at any time.

        Nobody is condemned for a Redis that was away or stood still: it judges by itself how long it heard nothing.
        """
        args = [most, CLAIM_DROPPED_SECONDS, int(RING_AGAIN_SECONDS * 1000)]
        claims, rings = self._sweep(args=args)
        readable = [claim for claim in map(self._claim, claims) if claim is not None]
        return Sweep(tuple(readable), tuple((pool.decode(), number) for pool, number in rings))


def _parsed(header: bytes) -> Ticket | None:
    try:
        return Ticket.parse(header)
    except TicketError:
        return None  # of another version: whoever takes it drops it


def _text(value: Any) -> str:
    return str(value.decode())


@lru_cache(maxsize=1)
def ticket_queue() -> TicketQueue:
    """The queue on this process's client."""
    return TicketQueue(redis_client.client(), order=settings.CONFIG.queue_order)
