"""How much of a quota a request gets. Pure: counters in, a grant or a refusal out; no database, no clock.

quotas.py reads the counters under a lock, decides here, and writes the sum of what was granted by a conditional UPDATE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol

from accounts.limits.precedence import Limits
from accounts.trail.refusals import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class ReserveOrder:
    """Holds prompt_tokens + max_tokens and one request on the quotas of a key and its tenant."""

    request_id: str
    tenant_id: int
    key_id: int
    """The quota key: the first of a rotation."""
    anchor_day: int
    tenant_limits: Limits
    key_limits: Limits
    prompt_tokens: int
    max_tokens: int
    """Output bound asked for; what is granted may be less, down to 1, unless all_or_nothing."""
    all_or_nothing: bool = False
    num_requests: int = 1
    """Above 1 it is the sum of several (`sum_of`), which `least_output` of them want output tokens."""
    least_output: int = 1
    now: datetime
    expires_at: datetime
    """After it the sweep releases the reservation: later than any time at which the request may still run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargeOrder:
    """One request that costs no tokens, such as a completion from the cache."""

    request_id: str
    tenant_id: int
    key_id: int
    anchor_day: int
    tenant_limits: Limits
    key_limits: Limits
    now: datetime
    model: str = ""
    adapters: str = ""
    operation: str = "completions"
    reason: str = ""
    records: tuple[Any, ...] = ()
    """Rows of other rooms to insert in the same transaction, if the request is granted."""


Order = ReserveOrder | ChargeOrder


@dataclass(frozen=True, slots=True)
class Held:
    """A reservation stands: the request may use its prompt and `max_tokens` of output."""

    request_id: str
    max_tokens: int
    clamped: bool
    reserved_tokens: int


class Counters(Protocol):
    """What changes a balance: a ledger entry, or the sum of several."""

    used_tokens: int
    reserved_tokens: int
    used_requests: int
    reserved_requests: int


@dataclass(slots=True)
class Balance:
    """The counters of one period while orders are decided against it, one after the other."""

    id: int
    whose: str
    """tenant or key"""
    ends_at: datetime
    used_tokens: int
    reserved_tokens: int
    used_requests: int
    reserved_requests: int

    @property
    def tokens(self) -> int:
        return self.used_tokens + self.reserved_tokens

    @property
    def requests(self) -> int:
        return self.used_requests + self.reserved_requests

    def add(self, change: Counters) -> None:
        self.used_tokens += change.used_tokens
        self.reserved_tokens += change.reserved_tokens
        self.used_requests += change.used_requests
        self.reserved_requests += change.reserved_requests


def decide(order: Order, balances: tuple[Balance, Balance]) -> Held | Refusal:
    """What the order gets of (tenant, key) as they stand; changes nothing.

    quota_exhausted where what is used up leaves no room before the period ends; quota_reserved where running requests
    hold the room and may give it back. The prompt and one token must fit, or everything if the order says so.
    """
    bounds = list(zip(balances, (order.tenant_limits, order.key_limits), strict=True))
    number = order.num_requests if isinstance(order, ReserveOrder) else 1
    for balance, limits in bounds:
        if limits.monthly_requests is not None and balance.requests + number > limits.monthly_requests:
            return _refusal(order, balance, "monthly_requests", limits.monthly_requests, number)
    if isinstance(order, ChargeOrder):
        return Held(order.request_id, 0, False, 0)
    wanted = order.prompt_tokens + order.max_tokens
    needed = wanted if order.all_or_nothing else order.prompt_tokens + min(order.least_output, order.max_tokens)
    room = wanted
    refusals = []
    for balance, limits in bounds:
        if limits.monthly_tokens is None:
            continue
        left = limits.monthly_tokens - balance.tokens
        if left < needed:
            refusals.append(_refusal(order, balance, "monthly_tokens", limits.monthly_tokens, needed))
        room = min(room, left)
    if refusals:
        return next((refusal for refusal in refusals if not refusal.retryable), refusals[0])
    return Held(order.request_id, room - order.prompt_tokens, room < wanted, room)


def sum_of(orders: Sequence[Order]) -> ReserveOrder:
    """What the orders of one request need together, each of them a token of output at least."""
    first, holding = orders[0], [order for order in orders if isinstance(order, ReserveOrder)]
    limits = [first.tenant_limits, first.key_limits]
    if not holding:  # nothing but requests that cost no tokens
        limits = [replace(each, monthly_tokens=None) for each in limits]
    return ReserveOrder(
        request_id=first.request_id,
        tenant_id=first.tenant_id,
        key_id=first.key_id,
        anchor_day=first.anchor_day,
        tenant_limits=limits[0],
        key_limits=limits[1],
        prompt_tokens=sum(order.prompt_tokens for order in holding),
        max_tokens=sum(order.max_tokens for order in holding),
        all_or_nothing=any(order.all_or_nothing for order in holding),
        num_requests=len(orders),
        least_output=sum(order.max_tokens > 0 for order in holding),
        now=first.now,
        expires_at=max((order.expires_at for order in holding), default=first.now),
    )


def share_out(orders: Sequence[Order], max_tokens: int) -> list[Order]:
    """The orders with output bounds that add up to `max_tokens`, as even as what each asks for allows."""
    asked = [order.max_tokens if isinstance(order, ReserveOrder) else 0 for order in orders]
    shared = [0] * len(orders)
    left = max_tokens
    by_size = sorted(range(len(orders)), key=asked.__getitem__)
    for place, number in enumerate(by_size):
        shared[number] = min(asked[number], left // (len(orders) - place))
        left -= shared[number]
    return [
        replace(order, max_tokens=shared[number]) if isinstance(order, ReserveOrder) else order
        for number, order in enumerate(orders)
    ]


def _refusal(order: Order, balance: Balance, name: str, limit: int, needed: int) -> Refusal:
    counts = name.removeprefix("monthly_")
    used = balance.used_tokens if counts == "tokens" else balance.used_requests
    reserved = balance.reserved_tokens if counts == "tokens" else balance.reserved_requests
    facts: dict[str, Any] = {
        "limit": name,
        "of": balance.whose,
        "value": limit,
        "used": used,
        "reserved": reserved,
        "needed": needed,
        "reset_at": balance.ends_at.isoformat().replace("+00:00", "Z"),
        "reset_in_seconds": max(1, round((balance.ends_at - order.now).total_seconds())),
    }
    if used + needed <= limit:
        return Refusal(
            "quota_reserved",
            f"{reserved} of the {limit} {counts} a month of this {balance.whose} are held by running requests and "
            f"{used} are used; this request needs {needed}. Try again when they have ended.",
            retry_after=1,
            **facts,
        )
    return Refusal(
        "quota_exhausted",
        f"The quota of {limit} {counts} a month of this {balance.whose} is used up: {used} are used and this request "
        f"needs {needed}. It starts anew at {facts['reset_at']}.",
        **facts,
    )
