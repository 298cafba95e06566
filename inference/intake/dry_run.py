"""What would become of a request now: admission up to the point where something would be taken, then what is there.

A thread that asks (`asking`) goes the way of every request, by the view of its dialect and admission.admit, and stops
where limits would be debited: the tokens are exact, and a refusal is the very one that the request would get. Nothing
is held, charged or queued. Blocking, on admission threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import redis
from django.conf import settings
from django.db.models import Avg

from accounts.identity.principals import Principal
from accounts.ledger import prices, quotas
from accounts.ledger.allotment import Balance, Held, ReserveOrder, decide
from accounts.limits import throttling
from accounts.limits.precedence import Limits
from accounts.limits.throttling import RateState
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference import settlement
from inference.catalog.adapters import Choice
from inference.catalog.served import Served
from inference.models import Receipt
from inference.orders import GenerateOrder
from inference.transport.queue import Crowd, QueueLengths, ticket_queue

LOOK_BACK = timedelta(hours=1)
MAX_RECEIPTS = 50


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one order would take."""

    served: Served
    order: GenerateOrder
    prompt_tokens: int = 0
    max_tokens: int = 0
    is_cached: bool = False
    prompt: tuple[int, ...] = ()
    choice: Choice = field(default_factory=lambda: Choice(vector=()))


class Found(BaseException):
    """The dry run has come to its end. No Exception: nobody on the way takes it for an error."""

    def __init__(self, wanted: list[Wanted]) -> None:
        super().__init__()
        self.wanted = wanted


class _Thread(threading.local):
    is_asking = False
    is_for_replay = False


_thread = _Thread()


@contextmanager
def asking(*, for_replay: bool = False) -> Iterator[None]:
    """Within the block this thread's requests take nothing: admission ends in Found. for_replay: also where the
    completion cache has the answer; a forced one's grammar is not fitted to what it might have today."""
    _thread.is_asking, _thread.is_for_replay = True, for_replay
    try:
        yield
    finally:
        _thread.is_asking = _thread.is_for_replay = False


def is_for_replay() -> bool:
    return _thread.is_for_replay


def is_on() -> bool:
    return _thread.is_asking


def end_here(wanted: Wanted) -> None:
    """Called by admission where it would begin to take. Raises Found in a dry run."""
    if _thread.is_asking:
        raise Found([wanted])


def end_with_all(admit: Callable[[int], object], numbers: Iterable[int]) -> None:
    """The orders of one request, each up to its end. Raises Found with all of them, Refusal where one is wrong."""
    wanted: list[Wanted] = []
    for number in numbers:
        try:
            admit(number)
        except Found as found:
            wanted += found.wanted
    raise Found(wanted)


@dataclass(frozen=True, slots=True)
class Room:
    """One limit as it stands: `remaining` of `value` are free; it frees, wholly or in part, in `frees_seconds`."""

    limit: str
    of: str
    value: int
    remaining: int
    needed: int
    frees_seconds: float | None = None

    @property
    def tightness(self) -> float:
        """Above 1 it refuses."""
        return self.needed / self.remaining if self.remaining > 0 else math.inf if self.needed else 0.0


def verdict(principal: Principal, wanted: list[Wanted], request_rate: RateState, now: datetime) -> dict[str, Any]:
    """What would be taken, which limit binds and when it frees, how long the queue is. Raises Refusal where Redis or
    the database cannot be asked."""
    computed = [each for each in wanted if not each.is_cached]
    prompt, output = (sum(getattr(each, name) for each in computed) for name in ("prompt_tokens", "max_tokens"))
    streams = any(each.order.stream for each in computed)
    order = _reserve_order(principal, wanted, prompt, output, now)
    settlement.catch_up()  # as admission does before it refuses for a quota
    balances = quotas.balances(order)
    held, refusal, tokens = None, None, RateState()
    try:
        if computed:  # in the order of admission
            check_queue(computed[0].served, principal)
            tokens = throttling.would_enter(principal, tokens=prompt + output, stream=streams).tokens
        held = decide(order, balances)
        if isinstance(held, Refusal):
            raise held
    except Refusal as found:
        if found.code == "service_unavailable":
            raise
        refusal, held = found, None
    rooms = [
        *_rates(principal, prompt + output, tokens, request_rate),
        *_places(principal, streams),
        *_quotas(principal, order, balances),
    ]
    granted = held.max_tokens if isinstance(held, Held) else output
    return {
        "admitted": refusal is None,
        "model": wanted[0].served.name,
        "requests": len(wanted),
        "cached": not computed,
        "prompt_tokens": prompt,
        "max_tokens": granted,
        "clamped": granted < output,
        "reserved_tokens": prompt + granted if refusal is None else 0,
        "cost_at_most": _cost(wanted[0].served, prompt, granted, now),
        "currency": settings.CONFIG.currency,
        "refusal": None if refusal is None else _words(refusal, now),
        "binding": _binding(rooms, refusal, now),
        "limits": [_as_json(room, now) for room in rooms],
        "queue": _queue(wanted[0].served, principal, now),
    }


def check_queue(served: Served, principal: Principal) -> None:
    """Raises Refusal queue_full where as many requests wait as may; service_unavailable."""
    if principal.limit("queue_length") is not None and (whose := crowd_of(served, principal).full):
        raise queue_full(principal, whose)


def queue_full(principal: Principal, whose: str) -> Refusal:
    lengths = queue_lengths(principal)
    value = lengths.key if whose == "key" else lengths.tenant
    return Refusal(
        "queue_full",
        f"{value} requests of this {whose} wait already. Try again in 1 s.",
        retry_after=1,
        limit="queue_length",
        of=whose,
        value=value,
    )


def queue_lengths(principal: Principal) -> QueueLengths:
    return QueueLengths(principal.tenant_limits.queue_length, principal.key_limits.queue_length)


def _reserve_order(principal: Principal, wanted: list[Wanted], prompt: int, output: int, now: datetime) -> ReserveOrder:
    """Of all orders of the request: they are reserved together. What is cached needs a request, and no tokens."""
    limits = _both(principal)
    if all(each.is_cached for each in wanted):
        limits = (replace(limits[0], monthly_tokens=None), replace(limits[1], monthly_tokens=None))
    return ReserveOrder(
        request_id="",
        tenant_id=principal.tenant_id,
        key_id=principal.quota_key_id,
        anchor_day=principal.quota_anchor_day,
        tenant_limits=limits[0],
        key_limits=limits[1],
        prompt_tokens=prompt,
        max_tokens=output,
        all_or_nothing=wanted[0].order.all_or_nothing,
        num_requests=len(wanted),
        least_output=sum(each.max_tokens > 0 for each in wanted if not each.is_cached),
        now=now,
        expires_at=now,
    )


def crowd_of(served: Served, principal: Principal) -> Crowd:
    """Raises Refusal service_unavailable."""
    ids = (served.id, principal.tenant_id, principal.quota_key_id)
    try:
        return ticket_queue().crowd(served.pool, *ids, queue_lengths(principal))
    except redis.RedisError as error:
        raise Refusal("service_unavailable", "The queue does not answer.", retry_after=2) from error


# Which limit binds?


def _rates(principal: Principal, needed: int, tokens: RateState, requests: RateState) -> Iterator[Room]:
    if requests.limit is not None:
        yield Room("requests_per_minute", "", requests.limit, requests.remaining or 0, 0, requests.reset_seconds)
    if principal.limit("tokens_per_minute") is not None:
        state = tokens if tokens.limit is not None else throttling.peek_tokens(principal)
        yield Room("tokens_per_minute", "", state.limit or 0, state.remaining or 0, needed, state.reset_seconds)


def _places(principal: Principal, streams: bool) -> Iterator[Room]:
    of_both = zip(("tenant", "key"), _both(principal), throttling.peek_places(principal), strict=True)
    for of, limits, places in of_both:
        if limits.concurrent_requests is not None:
            value = limits.concurrent_requests
            yield Room("concurrent_requests", of, value, max(0, value - places.requests), 1)
        if limits.concurrent_streams is not None and streams:
            value = limits.concurrent_streams
            yield Room("concurrent_streams", of, value, max(0, value - places.streams), 1)


def _quotas(principal: Principal, order: ReserveOrder, balances: tuple[Balance, Balance]) -> Iterator[Room]:
    for balance, limits in zip(balances, _both(principal), strict=True):
        seconds = (balance.ends_at - order.now).total_seconds()
        needed = order.prompt_tokens + order.max_tokens
        for name, taken, need in (
            ("tokens", balance.tokens, needed),
            ("requests", balance.requests, order.num_requests),
        ):
            quota = getattr(limits, f"monthly_{name}")
            if quota is not None:
                yield Room(f"monthly_{name}", balance.whose, quota, max(0, quota - taken), need, seconds)


def _both(principal: Principal) -> tuple[Limits, Limits]:
    return principal.tenant_limits, principal.key_limits


def _binding(rooms: list[Room], refusal: Refusal | None, now: datetime) -> dict[str, Any] | None:
    """The limit that refuses; else the one of which this request would take the largest part."""
    if refusal is not None:
        facts = refusal.extra
        frees_at = refusal_log.frees_at(refusal, now)
        return {
            **{name: facts.get(name) for name in ("limit", "of", "value")},
            "remaining": facts.get("available"),
            "needed": facts.get("needed"),
            "frees_at": frees_at,
        }
    tightest = max((room for room in rooms if room.needed), key=lambda room: room.tightness, default=None)
    return None if tightest is None else _as_json(tightest, now)


def _as_json(room: Room, now: datetime) -> dict[str, Any]:
    frees = None if room.frees_seconds is None else now + timedelta(seconds=room.frees_seconds)
    return {
        "limit": room.limit,
        "of": room.of or None,
        "value": room.value,
        "remaining": room.remaining,
        "needed": room.needed,
        "frees_at": frees,
    }


def _words(refusal: Refusal, now: datetime) -> dict[str, Any]:
    """The sentence that the request itself would get."""
    extra = {name: value for name, value in refusal.extra.items() if not name.startswith("_")}
    return {
        "code": refusal.code,
        "message": refusal.message,
        "retry_after": refusal.retry_after,
        "frees_at": refusal_log.frees_at(refusal, now),
        "extra": extra,
    }


def _cost(served: Served, prompt: int, output: int, now: datetime) -> str:
    nanos = prices.cost_nanos(served.name, now, prompt_tokens=prompt, cached_tokens=0, completion_tokens=output)
    return prices.money(nanos)


# How long is the queue?


def _queue(served: Served, principal: Principal, now: datetime) -> dict[str, Any]:
    """`seconds` is a guess from the last hour's receipts: as many of them at a time as a worker runs at once."""
    crowd = crowd_of(served, principal)
    ahead = max(0, crowd.num_waiting - crowd.num_free + 1)
    return {
        "waiting": crowd.num_waiting,
        "free_slots": crowd.num_free,
        "seconds": round(math.ceil(ahead / max(1, served.n_slots)) * _mean_seconds(served, now), 1) if ahead else 0.0,
    }


def _mean_seconds(served: Served, now: datetime) -> float:
    lately = Receipt.objects.filter(created_at__gte=now - LOOK_BACK, model=served.name, cached=False)
    ids = lately.order_by("-created_at").values("pk")[:MAX_RECEIPTS]
    found = Receipt.objects.filter(pk__in=ids).aggregate(mean=Avg("prefill_seconds") + Avg("decode_seconds"))["mean"]
    return float(found or 0.0)
