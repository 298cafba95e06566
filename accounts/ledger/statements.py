"""What a tenant used in a month (UTC), by model, key, adapters and operation, from the days' sums. Month's clock.

A statement is kept once nothing of its month can change any more: when no reservation of before its end is open, for a
request that is not reserved cannot be charged. Called by commands, the API and the sweep.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import IntegrityError, connection, transaction
from django.db.models import Exists, OuterRef, Sum

from accounts.ledger.prices import money
from accounts.models import APIKey, DayUsage, QuotaPeriod, Reservation, Statement, Tenant

COUNTERS = ("requests", "used_tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")
TOTALS = ("requests", "used_tokens", "cost_nanos")
NAMES = ("model", "key", "adapters", "operation")
COLUMNS = (*NAMES, *COUNTERS[:-1], "cost", "currency")
MAX_LINES = 5000
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""The last four are the wide forms of the first."""
CLOSE_AT_ONCE = 100
LAST_MONTH = date.max.replace(day=1)
GRACE = timedelta(minutes=10)
"""Clocks of several machines need not agree on when a month ends."""


def month_of(text: str) -> date:
    """2026-11 as its first day. Raises ValueError."""
    if len(text) != 7:
        raise ValueError("a month is written as 2026-11")
    month = date.fromisoformat(f"{text}-01")
    if month >= LAST_MONTH:  # it has no end
        raise ValueError("there is no such month")
    return month


def next_month(month: date) -> date:
    return (month.replace(day=1) + timedelta(days=32)).replace(day=1)


def totals(tenant_id: int, month: date) -> tuple[int, int, int]:
    """(requests, tokens, billionths of the currency) of a month, as the days have them."""
    sums = _days(tenant_id, month).aggregate(**{name: Sum(name, default=0) for name in TOTALS})
    return sums["requests"], sums["used_tokens"], sums["cost_nanos"]


def statement(tenant: Tenant, month: date, now: datetime) -> dict[str, Any]:
    """The statement that was kept, else how the month stands."""
    kept = Statement.objects.filter(tenant=tenant, month=month).first()
    if kept is None:
        lines = _lines(_days(tenant.pk, month))
        requests, tokens, nanos = (sum(line[name] for line in lines) for name in TOTALS)
        currency, closed_at = settings.CONFIG.currency, None
    else:
        lines, requests, tokens, nanos = kept.lines, kept.requests, kept.used_tokens, kept.cost_nanos
        currency, closed_at = kept.currency, kept.created_at
    return {
        "object": "statement",
        "tenant": tenant.name,
        "month": f"{month:%Y-%m}",
        "status": "open" if closed_at is None else "closed",
        "closed_at": closed_at,
        "currency": currency,
        "requests": requests,
        "tokens": tokens,
        "cost": money(nanos),
        "lines": [{**line, "cost": money(line["cost_nanos"])} for line in lines],
    }


def of_period(period: QuotaPeriod) -> dict[str, Any]:
    """As much of a statement as `as_csv` needs, of one quota period: of the tenant, or of a key."""
    days = DayUsage.objects.filter(**{"key_period" if period.key_id else "tenant_period": period}).order_by()
    lines = _lines(days)
    return {
        "currency": settings.CONFIG.currency,
        "lines": [{**line, "cost": money(line["cost_nanos"])} for line in lines],
    }


def as_csv(facts: dict[str, Any]) -> str:
    """RFC 4180, a header and one row a line."""
    rows = ({**line, "currency": facts["currency"]} for line in facts["lines"])
    return table(COLUMNS, rows)


def table(columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    """A name that a spreadsheet would take for a formula gets a quotation mark in front."""
    return (
        f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_SIGNS) and not _is_number(value) else value
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def close(tenant: Tenant, month: date, now: datetime) -> Statement | None:
    """Keeps the statement of a month that is over; None while a request of it may still be settled. Idempotent."""
    end = datetime.combine(next_month(month), datetime.min.time(), UTC)
    if now < end + GRACE or _may_change(tenant.pk, end):
        return None
    lines = _lines(_days(tenant.pk, month))
    requests, tokens, nanos = (sum(line[name] for line in lines) for name in TOTALS)
    try:
        with transaction.atomic():
            row, _ = Statement.objects.get_or_create(
                tenant=tenant,
                month=month,
                defaults={
                    "currency": settings.CONFIG.currency,
                    "requests": requests,
                    "used_tokens": tokens,
                    "cost_nanos": nanos,
                    "lines": lines,
                    "created_at": now,
                },
            )
    except IntegrityError:  # another process was first
        row = Statement.objects.get(tenant=tenant, month=month)
    return row


def close_due(now: datetime, most: int = CLOSE_AT_ONCE) -> int:
    """Keeps statements of the month before this one that are missing; how many. The sweep calls it."""
    today = now.astimezone(UTC).date()
    month = (today.replace(day=1) - timedelta(days=1)).replace(day=1)
    return sum(close(tenant, month, now) is not None for tenant in _without(month, most))


def missing(tenant_id: int, since: date, until: date) -> Iterator[date]:
    """Months with usage between two days that have no statement yet."""
    kept = set(Statement.objects.filter(tenant_id=tenant_id).values_list("month", flat=True))
    days = DayUsage.objects.filter(tenant_id=tenant_id, day__gte=since, day__lte=until)
    for month in days.order_by().dates("day", "month"):
        if month not in kept:
            yield month


def _without(month: date, most: int) -> list[Tenant]:
    """Tenants that used something in a month and have no statement of it: a step or two in an index for each tenant."""
    used = DayUsage.objects.filter(tenant=OuterRef("pk"), day__gte=month, day__lt=next_month(month))
    kept = Statement.objects.filter(tenant=OuterRef("pk"), month=month)
    return list(Tenant.objects.filter(~Exists(kept), Exists(used)).order_by("pk")[:most])


def _may_change(tenant_id: int, end: datetime) -> bool:
    still_open = Reservation.objects.filter(state=Reservation.State.OPEN, created_at__lt=end)
    return still_open.filter(tenant_period__tenant_id=tenant_id).exists()


def _days(tenant_id: int, month: date) -> Any:
    return DayUsage.objects.filter(tenant_id=tenant_id, day__gte=month, day__lt=next_month(month)).order_by()


def _lines(days: Any) -> list[dict[str, Any]]:
    """One for each model, key, adapters and operation; what exceeds MAX_LINES is summed up in the last."""
    order = ("model", "key_id", "adapters", "operation")  # grouped as they are ordered: sorted once
    rows = days.values_list(*order).annotate(*(Sum(name) for name in COUNTERS)).order_by(*order)
    lines: list[dict[str, Any]] = []
    with _room_to_sum():
        for row in rows.iterator():
            line = dict(zip((*NAMES, *COUNTERS), row, strict=True))
            if len(lines) < MAX_LINES:
                lines.append(line)
                continue
            rest = lines[-1]
            rest.update(dict.fromkeys(NAMES, "others"), **{name: rest[name] + line[name] for name in COUNTERS})
    wanted = {line["key"] for line in lines if isinstance(line["key"], int)}
    public: dict[Any, str] = dict(APIKey.objects.filter(pk__in=wanted).values_list("pk", "public_id"))
    return [{**line, "key": public.get(line["key"], line["key"] or "")} for line in lines]


@contextmanager
def _room_to_sum() -> Iterator[None]:
    """PostgreSQL adds up a month of a large tenant in memory. In its usual 4 MB it would sort every row on disk first,
    which takes twice as long."""
    if connection.vendor != "postgresql":
        yield
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET LOCAL work_mem = '32MB'")
        yield
