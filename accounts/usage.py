"""What has been used, as a tenant, an operator or a command reads it. Reads only; a fixed number of queries.

Totals come from the periods, never from a count of the ledger.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Sum

from accounts import periods
from accounts.limits import Limits
from accounts.models import LedgerEntry, QuotaPeriod, Tenant
from accounts.principals import Principal


def usage(principal: Principal, now: datetime) -> dict[str, Any]:
    """The key's and the tenant's standing, with the union of names that clients of the testing guide expect.

    quota_used and quota_monthly are tokens, of whichever of key and tenant has less left. The requests a minute that
    are left are Redis's to say (throttling.peek_requests): rpm_remaining is filled in by the caller.
    """
    anchor_day = principal.quota_anchor_day
    tenant = _standing(principal.tenant_id, None, principal.tenant_limits, anchor_day, now)
    key = _standing(principal.tenant_id, principal.quota_key_id, principal.key_limits, anchor_day, now)
    tightest = min(key, tenant, key=_tokens_left)
    return {
        "api_key": f"llms_{principal.public_id}_…",
        "key_name": principal.key_name,
        "tenant": principal.tenant_name,
        "plan": principal.plan_name,
        "role": principal.role,
        "quota_used": tightest["tokens"]["used"],
        "quota_reserved": tightest["tokens"]["reserved"],
        "quota_monthly": tightest["tokens"]["limit"],
        "quota_reset_at": tightest["resets_at"],
        "rpm_limit": principal.limit("requests_per_minute"),
        **totals(principal.tenant_id, principal.quota_key_id),
        "periods": {"key": key, "tenant": tenant},
    }


def tenant_usage(tenant: Tenant, now: datetime) -> dict[str, Any]:
    """The standing of a whole tenant. Reads `tenant.plan`."""
    standing = _standing(tenant.pk, None, tenant.limits, tenant.quota_anchor_day, now)
    return {
        "tenant": tenant.name,
        "plan": tenant.plan.name,
        "role": tenant.plan.role,
        "status": tenant.status,
        "quota_used": standing["tokens"]["used"],
        "quota_reserved": standing["tokens"]["reserved"],
        "quota_monthly": standing["tokens"]["limit"],
        "quota_reset_at": standing["resets_at"],
        "rpm_limit": tenant.limits.requests_per_minute,
        **totals(tenant.pk, None),
        "periods": {"tenant": standing},
    }


def totals(tenant_id: int, key_id: int | None) -> dict[str, Any]:
    """Since the beginning, over all periods of a key (None: of the tenant)."""
    rows = QuotaPeriod.objects.filter(tenant_id=tenant_id, key_id=key_id)
    sums = rows.aggregate(
        requests=Sum("used_requests", default=0),
        tokens=Sum("used_tokens", default=0),
        prompt=Sum("prompt_tokens", default=0),
        completion=Sum("completion_tokens", default=0),
    )
    return {
        "total_requests": sums["requests"],
        "total_tokens": sums["tokens"],
        "total_prompt_tokens": sums["prompt"],
        "total_completion_tokens": sums["completion"],
        "first_request_at": _entry_time(rows.order_by("starts_at").values("pk")[:1], key_id, "created_at"),
        "last_request_at": _entry_time(rows.order_by("-starts_at").values("pk")[:1], key_id, "-created_at"),
    }


def _entry_time(period: Any, key_id: int | None, order: str) -> str | None:
    """Time of the first ledger entry of a period in this order; one step in its index."""
    of_period = {"tenant_period__in" if key_id is None else "key_period__in": period}
    moment = LedgerEntry.objects.filter(**of_period).order_by(order).values_list("created_at", flat=True).first()
    return None if moment is None else iso(moment)


def _standing(tenant_id: int, key_id: int | None, limits: Limits, anchor_day: int, now: datetime) -> dict[str, Any]:
    rows = QuotaPeriod.objects.filter(tenant_id=tenant_id, key_id=key_id)
    row = rows.filter(starts_at__lte=now, ends_at__gt=now).first()
    if row is None:
        previous_end = rows.filter(ends_at__lte=now).order_by("-ends_at").values_list("ends_at", flat=True).first()
        starts_at, ends_at = periods.next_period(anchor_day, now, previous_end)
        row = QuotaPeriod(tenant_id=tenant_id, key_id=key_id, starts_at=starts_at, ends_at=ends_at)
    return {
        "starts_at": iso(row.starts_at),
        "resets_at": iso(row.ends_at),
        "tokens": _counter(row.used_tokens, row.reserved_tokens, limits.monthly_tokens),
        "requests": _counter(row.used_requests, row.reserved_requests, limits.monthly_requests),
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
    }


def _counter(used: int, reserved: int, limit: int | None) -> dict[str, int | None]:
    remaining = None if limit is None else max(0, limit - used - reserved)
    return {"used": used, "reserved": reserved, "limit": limit, "remaining": remaining}


def _tokens_left(standing: dict[str, Any]) -> float:
    remaining = standing["tokens"]["remaining"]
    return float("inf") if remaining is None else float(remaining)


def iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
