"""What all keys used on a day (UTC) together, by tenant, by model and by adapters: sums of the days of usage, kept for
charts once nothing of the day can change any more. Month's clock; the housekeeping writes, the dashboard reads.

A day cannot change when no reservation of before its end is open: what is not reserved is charged at the moment it
comes, and a correction counts on the day it is made. Days that are not kept yet are read from the days of usage.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

from django.db import IntegrityError, transaction
from django.db.models import Sum

from accounts.models import DayTotal, DayUsage, Reservation

KEPT_DAYS = 90
"""The longest chart; older totals are removed, since the days of usage outlive them."""
CLOSE_AT_ONCE = 30
GRACE = timedelta(minutes=10)
"""Clocks of several machines need not agree on when a day ends."""
COUNTERS = ("requests", "used_tokens", "cost_nanos")
OF_USAGE = {DayTotal.By.TENANT: "tenant_id", DayTotal.By.MODEL: "model", DayTotal.By.ADAPTERS: "adapters"}
"""What totals are told apart by → its column in the days of usage."""

Totals = dict[tuple[str, str], list[int]]
"""(what they are told apart by, its name) → COUNTERS."""


def close_due(now: datetime, most: int = CLOSE_AT_ONCE) -> int:
    """Keeps the totals of days that are missing, the latest first; how many days. Removes those that are too old."""
    today = now.astimezone(UTC).date()
    DayTotal.objects.filter(day__lt=today - timedelta(days=KEPT_DAYS)).delete()
    return sum(_close(day) for day in _missing(today, now, most))


def _missing(today: date, now: datetime, most: int) -> list[date]:
    """Days of which nothing can change. Those without any usage are kept, too, so that nobody looks again."""
    wanted = [today - timedelta(days=number) for number in range(1, KEPT_DAYS + 1)]
    kept = set(DayTotal.objects.filter(by=DayTotal.By.DAY, day__in=wanted).values_list("day", flat=True))
    missing = [day for day in wanted if day not in kept]
    if not missing:
        return []
    open_since = Reservation.objects.filter(state=Reservation.State.OPEN).order_by("created_at")
    oldest = min([now - GRACE, *open_since.values_list("created_at", flat=True)[:1]])
    return [day for day in missing if datetime.combine(day, datetime.min.time(), UTC) + timedelta(days=1) <= oldest][
        :most
    ]


def _close(day: date) -> bool:
    """False where another process was first."""
    rows = [
        DayTotal(day=day, by=by, name=name, **dict(zip(COUNTERS, total, strict=True)))
        for (by, name), total in added_up(day).items()
    ]
    try:
        with transaction.atomic():
            DayTotal.objects.bulk_create(rows, batch_size=500)
    except IntegrityError:
        return False
    return True


def added_up(day: date) -> Totals:
    """From the days of usage, in one query."""
    sums = DayUsage.objects.filter(day=day).order_by().values_list(*OF_USAGE.values())
    totals: Totals = {(DayTotal.By.DAY, ""): [0] * len(COUNTERS)}
    for row in sums.annotate(*(Sum(name) for name in COUNTERS)).iterator():
        names, counters = row[: len(OF_USAGE)], row[len(OF_USAGE) :]
        for place in ((DayTotal.By.DAY, ""), *((by, str(name)) for by, name in zip(OF_USAGE, names, strict=True))):
            total = totals.setdefault(place, [0] * len(COUNTERS))
            for number, counter in enumerate(counters):
                total[number] += counter
    return totals


def kept() -> Iterator[tuple[date, Totals]]:
    """Every day that is kept, the latest first: for the proof of the ledger."""
    for day in DayTotal.objects.filter(by=DayTotal.By.DAY).order_by("-day").values_list("day", flat=True):
        rows = DayTotal.objects.filter(day=day).values_list("by", "name", *COUNTERS)
        yield day, {(by, name): counters for by, name, *counters in rows}
