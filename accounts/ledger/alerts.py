"""Half, four fifths and all of a quota: noticed by the sweep, shown in API and console, mailed once to the owners.

A row for each part of each period stands for having noticed it; the mail is claimed by compare-and-set before it is
sent. Called by the housekeeping of every web process: two at once are harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from smtplib import SMTPDataError, SMTPException, SMTPRecipientsRefused
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.mail import send_mail
from django.db.models import Q, QuerySet

from accounts.identity import key_rows
from accounts.limits.precedence import Limits
from accounts.models import ALERT_PERCENTS, LedgerEntry, Membership, QuotaAlert, QuotaPeriod, StaffRole

logger = logging.getLogger(__name__)

LOOK_BACK = timedelta(minutes=3)
"""A round is missed now and then. What is missed, or was settled late, `notice_all` sees."""
PERIODS_AT_ONCE = 1000
MAX_MAILS = 100
MAX_RECEIVERS = 20
REFUSED = (SMTPRecipientsRefused, SMTPDataError)
"""What a mail server says to one mail, while it may take the next."""
FINAL = 500
"""Codes of SMTP from here on are for good; a full mailbox or greylisting is below."""


def notice(now: datetime, look_back: timedelta = LOOK_BACK) -> int:
    """Notes what was reached in the periods that moved lately; how many alerts are new."""
    entries = LedgerEntry.objects.filter(created_at__gte=now - look_back).order_by()
    tenants, keys = (entries.values(f"{side}_period_id") for side in ("tenant", "key"))
    return _notice(QuotaPeriod.objects.filter(pk__in=tenants) | QuotaPeriod.objects.filter(pk__in=keys), now)


def notice_all(now: datetime) -> int:
    """As `notice`, in all periods of this moment: a quota may have been lowered, and what ended while the database was
    away is settled under its own time."""
    return _notice(QuotaPeriod.objects.exclude(used_tokens=0, used_requests=0), now)


def _notice(periods: QuerySet[QuotaPeriod], now: datetime) -> int:
    live = periods.filter(starts_at__lte=now, ends_at__gt=now).select_related("tenant__plan", "key").order_by("pk")
    total, last = 0, 0
    while rows := list(live.filter(pk__gt=last)[:PERIODS_AT_ONCE]):
        last, limits = rows[-1].pk, key_rows.limits_of_periods(rows, now)
        reached = [alert for period in rows for alert in _reached(period, limits[period.pk], now)]
        noted = QuotaAlert.objects.filter(period__in={alert.period_id for alert in reached})
        before = noted.count()
        QuotaAlert.objects.bulk_create(reached, ignore_conflicts=True)
        total += noted.count() - before
    return total


def _reached(period: QuotaPeriod, limits: Limits, now: datetime) -> Iterator[QuotaAlert]:
    for counts in ("tokens", "requests"):
        quota = getattr(limits, f"monthly_{counts}")
        used = getattr(period, f"used_{counts}")
        if not quota:
            continue  # unlimited, or none at all: there is nothing to run out of
        for percent in ALERT_PERCENTS:
            if used * 100 >= quota * percent:
                yield QuotaAlert(period=period, counts=counts, percent=percent, used=used, quota=quota, created_at=now)


def of_tenant(tenant_id: int, key_id: int | None, now: datetime) -> list[dict[str, Any]]:
    """The alerts of this period that a key may know: its tenant's and its own; one query."""
    rows = QuotaAlert.objects.filter(
        period__tenant_id=tenant_id, period__starts_at__lte=now, period__ends_at__gt=now
    ).select_related("period")
    mine = [row for row in rows.order_by("created_at", "percent")[:200] if row.period.key_id in (None, key_id)]
    return [
        {
            "of": "tenant" if row.period.key_id is None else "key",
            "counts": row.counts,
            "percent": row.percent,
            "quota": row.quota,
            "reached_at": row.created_at,
        }
        for row in mine
    ]


def mail(now: datetime) -> int:
    """Tells the owners of tenants what was not told yet, the highest part of each period alone; how many mails.

    What one of its receivers has is told: nobody gets it again because another's address was refused. An address that
    is refused for good holds up nobody; where the server itself fails, the rest waits for the next round.
    """
    if not settings.CONFIG.email_url:
        return 0
    sent = 0
    for alert in _unmailed()[:MAX_MAILS]:
        if not _claim(alert, now) or _is_outdone(alert):
            continue
        number, failure = _send(alert)
        sent += number
        if failure is None:
            continue
        is_later = not number and not _is_final(failure)
        logger.warning("an alert %s: %s", "is mailed later" if is_later else "did not reach all its receivers", failure)
        if is_later:
            QuotaAlert.objects.filter(pk=alert.pk).update(mailed_at=None)
        if not isinstance(failure, REFUSED):
            break
    return sent


def _unmailed() -> QuerySet[QuotaAlert]:
    rows = QuotaAlert.objects.filter(mailed_at=None).select_related("period__tenant", "period__key")
    return rows.order_by("period_id", "counts", "-percent")


def _claim(alert: QuotaAlert, now: datetime) -> bool:
    return bool(QuotaAlert.objects.filter(pk=alert.pk, mailed_at=None).update(mailed_at=now))


def _is_outdone(alert: QuotaAlert) -> bool:
    """A higher part was reached in the same moment, or is told already."""
    higher = QuotaAlert.objects.filter(period=alert.period_id, counts=alert.counts, percent__gt=alert.percent)
    return higher.filter(mailed_at__isnull=False).exists()


def receivers(tenant_id: int) -> list[str]:
    """The tenant's owners; the operators where it has none with an address: somebody is to know."""
    users = get_user_model()._default_manager.filter(is_active=True).exclude(email="").order_by("pk")
    owners = users.filter(memberships__tenant=tenant_id, memberships__role=Membership.MemberRole.OWNER)
    operators = users.filter(Q(is_superuser=True) | Q(staff_role__role=StaffRole.Role.OPERATOR))
    for each in (owners, operators):
        if addresses := list(each.values_list("email", flat=True)[:MAX_RECEIVERS]):
            return addresses
    return []


def _send(alert: QuotaAlert) -> tuple[int, Exception | None]:
    """One mail to each owner, so that none sees the others; how many, and the last failure."""
    period = alert.period
    whose = f"the key {period.key.name}" if period.key else period.tenant.name
    subject = f"{alert.percent} % of the {alert.counts} of {whose} are used"
    text = (
        f"{alert.used:,} of {alert.quota:,} {alert.counts} of {whose} were used when this was noticed, "
        f"{alert.created_at:%Y-%m-%d %H:%M} UTC.\nThe quota starts anew at {period.ends_at:%Y-%m-%d %H:%M} UTC.\n"
    )
    sent, failure = 0, None
    for address in receivers(period.tenant_id):
        try:
            send_mail(" ".join(subject.split()), text, settings.DEFAULT_FROM_EMAIL, [address])
        except REFUSED as error:
            failure = error
        except (SMTPException, OSError) as error:
            return sent, error
        else:
            sent += 1
    return sent, failure


def _is_final(failure: Exception) -> bool:
    """Whether the server would say the same to the same mail later."""
    if isinstance(failure, SMTPRecipientsRefused):
        return all(code >= FINAL for code, _ in failure.recipients.values())
    return isinstance(failure, SMTPDataError) and failure.smtp_code >= FINAL
