"""Quota raises that need two people: one asks, another approves. Off while QUOTA_APPROVAL_TOKENS is 0.

What needs them is approval.py's. An approval writes the tenant's override, as its first asker wanted it, or a limit
for a time where the raise ends. `check_refund` looks at tokens that are given back by hand.
"""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.db import transaction
from django.db.models import Sum
from django.utils import timezone

from accounts.limits.approval import LIMIT, RaiseError
from accounts.models import LedgerEntry, LimitRule, QuotaRaise, Tenant
from accounts.trail import audit_log


def check_refund(tenant_id: int, tokens: int, now: datetime) -> None:
    """Raises RaiseError where giving back so many used tokens, beside what was given back in this period by hand, would
    be a raise above the threshold by another name. One query."""
    threshold: int = settings.CONFIG.quota_approval_tokens
    if not threshold or tokens >= 0:
        return
    by_hand = LedgerEntry.objects.filter(kind=LedgerEntry.Kind.ADJUST, request_id__startswith="adjust-")
    by_hand = by_hand.filter(used_tokens__lt=0, tenant_period__tenant=tenant_id, tenant_period__key=None)
    current = by_hand.filter(tenant_period__starts_at__lte=now, tenant_period__ends_at__gt=now)
    given = -current.aggregate(sum=Sum("used_tokens", default=0))["sum"]
    if given - tokens > threshold:
        raise RaiseError(
            f"More than {threshold:,} tokens given back in a month need a second operator: ask for a quota raise that "
            "ends with the month (console, manage.py quota_raise, POST /v1/admin/quota-raises).",
            code="approval_required",
        )


def ask(
    tenant: Tenant,
    monthly_tokens: int | None,
    reason: str,
    ends_at: datetime | None = None,
    *,
    now: datetime | None = None,
) -> QuotaRaise:
    """Raises ValidationError. In force only when another operator approves it."""
    row = QuotaRaise(tenant=tenant, monthly_tokens=monthly_tokens, reason=reason, ends_at=ends_at)
    row.asked_by, row.asked_at = str(audit_log.actor()), now or timezone.now()
    row.full_clean()
    row.save()
    return row


def decide(pk: int, *, approve: bool, now: datetime | None = None) -> QuotaRaise:
    """Approve, or refuse, what was asked. Raises RaiseError for one's own, and for what was decided before."""
    who, now = str(audit_log.actor()), now or timezone.now()
    state = QuotaRaise.State.APPROVED if approve else QuotaRaise.State.REFUSED
    with transaction.atomic():
        row = QuotaRaise.objects.select_related("tenant__plan").get(pk=pk)
        if approve and who == row.asked_by:
            raise RaiseError("You asked for it: another operator has to approve it.", code="approval_of_ones_own")
        if approve and row.ends_at is not None and row.ends_at <= now:
            raise RaiseError("The time that it was asked for is over.", code="decided")
        open_one = QuotaRaise.objects.filter(pk=pk, state=QuotaRaise.State.ASKED)
        if not open_one.update(state=state, decided_by=who, decided_at=now):
            raise RaiseError("It was decided before.", code="decided")
        if approve and row.ends_at is not None:
            _save_rule(row, now)
        elif approve:
            tenant = Tenant.objects.select_for_update(of=("self",)).select_related("plan").get(pk=row.tenant_id)
            tenant.limit_overrides = {**tenant.limit_overrides, LIMIT: row.monthly_tokens}
            tenant.quota_is_approved = True
            tenant.save(update_fields=["limit_overrides"])
    row.refresh_from_db()
    return row


def _save_rule(row: QuotaRaise, now: datetime) -> None:
    rule = LimitRule(
        tenant=row.tenant,
        limit=LIMIT,
        value=row.monthly_tokens,
        starts_at=now,
        ends_at=row.ends_at,
        reason=f"quota raise {row.pk}: {row.reason}"[:200],
    )
    rule.quota_is_approved = True
    rule.full_clean()
    rule.save()
