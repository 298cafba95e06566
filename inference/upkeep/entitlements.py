"""Who may go on: a request ends at the token that it is at when its key, tenant, model, adapter or quota has ended.

Every change of such rows moves a counter in Redis (identity/known_keys.py). In each worker a thread of its own, in each
web process the reaper's, looks at it and then at all live requests, waiting ones included, wherever they are: so it
does not matter who made the change, by console, command, API or a row's save(). Changes that announce nothing (SQL, a
queryset's update) are found a few seconds later. Any number of processes may do this; ending twice is harmless.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import redis
from django.db import DatabaseError, connection
from django.db.models import Q

from accounts.identity import key_rows, known_keys
from accounts.identity.principals import Principal
from accounts.limits.precedence import Allowed
from accounts.models import APIKey, QuotaPeriod, Tenant
from inference import settlement
from inference.catalog.adapters import is_named
from inference.models import Adapter, AdapterAlias, AdapterGrant, ServedModel
from inference.transport.queue import TicketQueue
from inference.transport.ticket import Ticket

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""How often the counter is looked at."""
EVERY_SECONDS = 5.0
"""How often all is looked at, whatever the counter says."""

KEY_REVOKED = "key_revoked"
KEY_EXPIRED = "key_expired"
TENANT_SUSPENDED = "tenant_suspended"
MODEL_WITHDRAWN = "model_withdrawn"
ADAPTER_WITHDRAWN = "adapter_withdrawn"
QUOTA_EXHAUSTED = "quota_exhausted"

Principals = Mapping[int, Principal]
"""By the id of the key."""


@dataclass(slots=True)
class Verdict:
    """Why requests may not go on, by id; and when the next key of the others ends or has other limits, in Unix time."""

    ended: dict[str, str] = field(default_factory=dict)
    next_change: float = float("inf")


def judge(tickets: Sequence[Ticket], now: datetime) -> Verdict:
    """A fixed number of queries, none without tickets. Raises DatabaseError."""
    verdict = Verdict()
    if not tickets:
        return verdict
    wanted = {ticket.key_id for ticket in tickets} | {ticket.quota_key_id for ticket in tickets}
    keys = {key.pk: key for key in APIKey.objects.select_related("tenant__plan").filter(pk__in=wanted)}
    credentials = key_rows.credentials_of(keys.values(), now)
    for ticket in tickets:
        key = keys.get(ticket.key_id)
        if why := _why_key(key, now):
            verdict.ended[ticket.request_id] = why
        else:
            credential = credentials[ticket.key_id]
            moments = [each.timestamp() for each in (credential.expires_at, credential.changes_at) if each is not None]
            verdict.next_change = min((verdict.next_change, *moments))
    who = {key_id: credential.principal for key_id, credential in credentials.items()}
    for find in (_without_model, _without_adapter):
        left = [ticket for ticket in tickets if ticket.request_id not in verdict.ended]
        verdict.ended.update(find(left, who))
    left = [ticket for ticket in tickets if ticket.request_id not in verdict.ended]
    for request_id in _beyond_quota(left, who, now):
        verdict.ended[request_id] = QUOTA_EXHAUSTED
    return verdict


def _why_key(key: APIKey | None, now: datetime) -> str | None:
    if key is None or key.revoked_at is not None:
        return KEY_REVOKED
    if key.tenant.status != Tenant.Status.ACTIVE:
        return TENANT_SUSPENDED
    return KEY_EXPIRED if key.expires_at is not None and key.expires_at <= now else None


def _without_model(tickets: Sequence[Ticket], who: Principals) -> Iterator[tuple[str, str]]:
    """Whose model is for some tenants, and not for theirs any more, or not among those that plan, tenant and key allow.
    One that is gone altogether serves what it has."""
    granted = ServedModel.Visibility.GRANTED
    models = ServedModel.objects.filter(pk__in={ticket.model_id for ticket in tickets}, visibility=granted)
    rows = models.prefetch_related("granted_tenants")
    allowed = {row.pk: {tenant.pk for tenant in row.granted_tenants.all()} for row in rows}
    for ticket in tickets:
        names = who[ticket.key_id].allowed_models
        is_granted = ticket.model_id not in allowed or ticket.tenant_id in allowed[ticket.model_id]
        if not is_granted or (names is not None and ticket.model_name not in names):
            yield ticket.request_id, MODEL_WITHDRAWN


def _without_adapter(tickets: Sequence[Ticket], who: Principals) -> Iterator[tuple[str, str]]:
    """Who uses an adapter that is for others only, or not allowed any more. One that is switched off or gone serves
    what it has."""
    wanted = {digest for ticket in tickets for digest, _ in ticket.adapters}
    if not wanted:
        return
    bases = {ticket.model_id for ticket in tickets}
    rows = list(Adapter.objects.filter(base_model_id__in=bases, digest__in=wanted))
    are_listed = any(who[ticket.key_id].allowed_adapters is not None for ticket in tickets)
    aliases = list(AdapterAlias.objects.filter(base_model_id__in=bases)) if are_listed else []
    grants = set(AdapterGrant.objects.filter(adapter__in=rows).values_list("adapter_id", "tenant_id"))
    for ticket in tickets:
        for digest, _ in ticket.adapters:
            own = [row for row in rows if (row.base_model_id, row.digest) == (ticket.model_id, digest)]
            granted = [
                row
                for row in own
                if row.visibility == Adapter.Visibility.SHARED or (row.pk, ticket.tenant_id) in grants
            ]
            names = who[ticket.key_id].allowed_adapters
            if own and not any(_is_allowed(row, ticket.model_name, names, aliases) for row in granted):
                yield ticket.request_id, ADAPTER_WITHDRAWN
                break


def _is_allowed(row: Adapter, model: str, names: Allowed, aliases: Iterable[AdapterAlias]) -> bool:
    """By its own name, or by an alias that leads to it or led there before: a promotion ends no request that runs."""
    if is_named(row.name, model, names):
        return True
    leading = (each for each in aliases if row.pk in (each.target_id, each.canary_id, each.previous_id))
    return any(is_named(alias.name, model, names) for alias in leading)


# Quotas

Owner = tuple[int, int | None]
"""Tenant, and key or None for the tenant itself."""


def _beyond_quota(tickets: Sequence[Ticket], who: Principals, now: datetime) -> set[str]:
    """Of a tenant or key that holds more than its monthly limit, which was lowered: the youngest requests, until the
    rest fits. Those that were admitted under a limit that still covers them go on."""
    limits = {owner: limit for owner, limit in _limits(tickets, who) if limit is not None}
    over = _overdrafts(limits, now)
    if over and settlement.catch_up():  # what has ended a moment ago holds more than it used
        over = _overdrafts(limits, now)
    ended: set[str] = set()
    for owner, tokens in over.items():
        left = tokens
        own = [ticket for ticket in tickets if owner in _owners(ticket)]
        for ticket in sorted(own, key=lambda each: -each.created_at):
            if left <= 0:
                break
            ended.add(ticket.request_id)
            left -= ticket.reserved_tokens
    return ended


def _owners(ticket: Ticket) -> tuple[Owner, Owner]:
    return (ticket.tenant_id, None), (ticket.tenant_id, ticket.quota_key_id)


def _limits(tickets: Iterable[Ticket], who: Principals) -> Iterator[tuple[Owner, int | None]]:
    for ticket in tickets:
        principal = who[ticket.key_id]
        of_tenant, of_key = _owners(ticket)
        yield of_tenant, principal.tenant_limits.monthly_tokens
        yield of_key, principal.key_limits.monthly_tokens


def _overdrafts(limits: dict[Owner, int], now: datetime) -> dict[Owner, int]:
    """By how many tokens what is used and held passes the limit."""
    if not limits:
        return {}
    tenants = {tenant_id for tenant_id, _ in limits}
    whose = Q(key__isnull=True) | Q(key_id__in={key_id for _, key_id in limits if key_id is not None})
    periods = QuotaPeriod.objects.filter(whose, tenant_id__in=tenants, starts_at__lte=now, ends_at__gt=now)
    found: dict[Owner, int] = {}
    for tenant_id, key_id, used, reserved in periods.values_list(
        "tenant_id", "key_id", "used_tokens", "reserved_tokens"
    ):
        limit = limits.get((tenant_id, key_id))
        if limit is not None and used + reserved > limit:
            found[tenant_id, key_id] = used + reserved - limit
    return found


# Watching


class Entitlements:
    """One process's look at the counter. Called from one thread. end: called with the id of a request and why."""

    def __init__(self, queue: TicketQueue, end: Callable[[str, str], object]) -> None:
        self._queue, self._end = queue, end
        self._version: bytes | None = None
        self._due = 0.0
        self._next_change = float("inf")

    def poll(self) -> int:
        """Look whether there is something to look at; how many requests this ended. Never raises."""
        try:
            version = self._queue.client.get(known_keys.VERSION_KEY)
            now = time.time()
            is_same = version == self._version and now < self._next_change
            if is_same and time.monotonic() < self._due:
                return 0
            number = self.check()
        except redis.RedisError as error:
            logger.warning("whether requests may go on is looked at when Redis is back: %s", error)
        except DatabaseError as error:
            logger.warning("whether requests may go on is looked at when the database is back: %s", error)
            connection.close()
        except Exception:
            logger.exception("whether requests may go on could not be looked at")
        else:
            self._version = version if isinstance(version, bytes) else None
            self._due = time.monotonic() + EVERY_SECONDS
            return number
        return 0

    def check(self) -> int:
        """End every live request that may not go on. Raises redis.RedisError or DatabaseError."""
        verdict = judge(self._queue.live_tickets(), datetime.now(UTC))
        self._next_change = verdict.next_change
        for request_id, why in verdict.ended.items():
            logger.info("request %s ends: %s", request_id, why)
            self._end(request_id, why)
        return len(verdict.ended)
