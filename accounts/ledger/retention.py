"""What is kept for how long, and the purge of the rest in small transactions: for the sweep and `manage.py purge`.

Entries of a period go when it has ended long ago, nothing of it is open, its sums are proven, and the statements of its
months are kept. From then on the days' sums stand for them (audit.py). The days' sums and the periods stay.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Any

from django.db import transaction
from django.db.models import Exists, F, Max, Model, OuterRef, QuerySet, Sum

from accounts.ledger import quota_rows, statements
from accounts.models import AuditEntry, DayUsage, LedgerEntry, QuotaPeriod, RefusedRequest, Reservation

logger = logging.getLogger(__name__)

CHUNK = 1000
PERIODS_AT_ONCE = 200


def delete_in_chunks(rows: QuerySet[Any], most: int | None = None) -> int:
    """Deletes rows, CHUNK in a transaction; how many. Never more than `most`."""
    model: type[Model] = rows.model
    total = 0
    while most is None or total < most:
        size = CHUNK if most is None else min(CHUNK, most - total)
        ids = list(rows.order_by().values_list("pk", flat=True)[:size])
        if not ids:
            break
        model._default_manager.filter(pk__in=ids)._raw_delete(rows.db)
        total += len(ids)
    return total


def purge_refusals(before: datetime, most: int | None = None) -> int:
    return delete_in_chunks(RefusedRequest.objects.filter(created_at__lt=before), most)


def purge_audit(before: datetime, most: int | None = None) -> int:
    return delete_in_chunks(AuditEntry.objects.filter(created_at__lt=before), most)


def due_periods(before: datetime) -> QuerySet[QuotaPeriod]:
    """Tenants' periods that ended before then and still have entries, the oldest first."""
    ended = QuotaPeriod.objects.filter(key=None, ends_at__lt=before)
    entries = LedgerEntry.objects.filter(tenant_period=OuterRef("pk"))
    return ended.filter(Exists(entries)).select_related("tenant").order_by("ends_at", "pk")


def purge_ledger(before: datetime, now: datetime, most: int | None = None) -> int:
    """Entries of periods that ended before then; how many. Goes on where it was interrupted."""
    total = 0
    for period in list(due_periods(before)[:PERIODS_AT_ONCE]):
        if period.purged_at is None and not close_period(period, now):
            continue
        left = None if most is None else most - total
        total += delete_in_chunks(LedgerEntry.objects.filter(tenant_period=period), left)
        ended = Reservation.objects.filter(tenant_period=period).exclude(state=Reservation.State.OPEN)
        delete_in_chunks(ended, left)
        if most is not None and total >= most:
            break
    return total


def close_period(period: QuotaPeriod, now: datetime) -> bool:
    """Lets the days' sums stand for the entries of a tenant's period. False, with a line in the log, where it must not.

    The months that it touches get their statements first.
    """
    last = LedgerEntry.objects.filter(tenant_period=period).aggregate(last=Max("created_at"))["last"] or period.ends_at
    since, until = period.starts_at.date(), max(last, period.ends_at).date()
    for month in statements.missing(period.tenant_id, since.replace(day=1), until):
        if statements.close(period.tenant, month, now) is None:
            logger.warning("the ledger of %s is not purged: the statement of %s is not closed", period, month)
            return False
    with transaction.atomic():
        quota_rows.lock_periods([period.pk])
        if Reservation.objects.filter(tenant_period=period, state=Reservation.State.OPEN).exists():
            logger.warning("the ledger of %s is not purged: it has open reservations", period)
            return False
        if not _is_proven(period):
            logger.error("the ledger of %s is not purged: its sums differ, run audit_ledger", period)
            return False
        keys = LedgerEntry.objects.filter(tenant_period=period, key_period__isnull=False).order_by()
        QuotaPeriod.objects.filter(pk__in=keys.values("key_period_id")).update(purged_at=now)
        QuotaPeriod.objects.filter(pk=period.pk).update(purged_at=now)
    period.purged_at = now
    return True


def _is_proven(period: QuotaPeriod) -> bool:
    """The entries, the days and the period's counters say the same."""
    entries = LedgerEntry.objects.filter(tenant_period=period)
    days = DayUsage.objects.filter(tenant_period=period)
    pairs = {
        "used_requests": "requests",
        **{name: name for name in ("used_tokens", "prompt_tokens", "completion_tokens", "cost_nanos")},
    }
    of_entries = entries.aggregate(**{f"{name}_sum": Sum(name, default=0) for name in pairs})
    of_days = days.aggregate(**{f"{name}_sum": Sum(F(day), default=0) for name, day in pairs.items()})
    fresh = QuotaPeriod.objects.get(pk=period.pk)
    counters = {f"{name}_sum": getattr(fresh, name) for name in pairs}
    return of_entries == of_days == counters and fresh.reserved_tokens == fresh.reserved_requests == 0
