"""What has been used, as a tenant, an operator or a command reads it. Reads only; a fixed number of queries.

Totals come from the periods, never from a count of the ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date, datetime
from typing import Any

from django.conf import settings
from django.db.models import QuerySet, Sum
from django.db.models.functions import Coalesce

from accounts.identity import key_rows
from accounts.identity.principals import Principal
from accounts.ledger import alerts, periods
from accounts.ledger.prices import money
from accounts.limits.precedence import Limits
from accounts.models import APIKey, DayUsage, LedgerEntry, QuotaPeriod, Tenant

GROUPS = {"model": "model", "adapter": "adapters", "key": "key__public_id", "day": "day", "operation": "operation"}
"""What usage can be grouped by → its column in the days' sums."""
SUMS = ("requests", "used_tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")
MAX_ROWS = 10_000


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
        "alerts": alerts.of_tenant(principal.tenant_id, principal.quota_key_id, now),
        "currency": settings.CONFIG.currency,
    }


def grouped(
    tenant_id: int, since: date, until: date, by: Sequence[str], *, key: str | None = None
) -> tuple[list[dict[str, Any]], bool]:
    """Usage of a tenant from one day to another, both included, by names of GROUPS; whether more than MAX_ROWS were
    there. `key`: of one alone with all of its rotation, by the public id of any of them. One query."""
    rows = DayUsage.objects.filter(tenant_id=tenant_id, day__gte=since, day__lte=until)
    if key is not None:
        rows = rows.filter(key_id__in=first_of_rotations([key]))
    columns = [GROUPS[name] for name in by]
    sums = rows.order_by().values(*columns).annotate(**{f"{name}_sum": Sum(name, default=0) for name in SUMS})
    found = list(sums.order_by(*columns)[: MAX_ROWS + 1]) if columns else [_total(rows)]
    return [_row(each, by) for each in found[:MAX_ROWS]], len(found) > MAX_ROWS


def first_of_rotations(public_ids: Collection[str]) -> QuerySet[APIKey, int]:
    """The keys that usage is counted on, of keys by their public ids: a query within the caller's."""
    rows = APIKey.objects.filter(public_id__in=public_ids).order_by()
    return rows.values_list(Coalesce("quota_key_id", "pk"), flat=True)


def _total(rows: Any) -> dict[str, Any]:
    total: dict[str, Any] = rows.aggregate(**{f"{name}_sum": Sum(name, default=0) for name in SUMS})
    return total


def _row(found: dict[str, Any], by: Sequence[str]) -> dict[str, Any]:
    names = {name: found[GROUPS[name]] for name in by}
    sums = {name: found[f"{name}_sum"] for name in SUMS if name != "cost_nanos"}
    return {**names, **sums, "cost": money(found["cost_nanos_sum"])}


def tenant_usage(tenant: Tenant, now: datetime) -> dict[str, Any]:
    """The standing of a whole tenant. Reads `tenant.plan`."""
    limits = key_rows.limits_of(tenant, now)
    standing = _standing(tenant.pk, None, limits, tenant.quota_anchor_day, now)
    return {
        "tenant": tenant.name,
        "plan": tenant.plan.name,
        "role": tenant.plan.role,
        "status": tenant.status,
        "quota_used": standing["tokens"]["used"],
        "quota_reserved": standing["tokens"]["reserved"],
        "quota_monthly": standing["tokens"]["limit"],
        "quota_reset_at": standing["resets_at"],
        "rpm_limit": limits.requests_per_minute,
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
        "first_request_at": _first_time(rows, key_id),
        "last_request_at": _entry_time(rows.order_by("-starts_at").values("pk")[:1], key_id, "-created_at"),
    }


def _first_time(rows: Any, key_id: int | None) -> str | None:
    """To the day alone where the first entries were purged."""
    first = rows.order_by("starts_at").values("pk")[:1]
    moment = _entry_time(first, key_id, "created_at")
    if moment is not None or not rows.filter(purged_at__isnull=False).exists():
        return moment
    days = DayUsage.objects.filter(**{"tenant_period__in" if key_id is None else "key_period__in": first})
    day = days.order_by("day").values_list("day", flat=True).first()
    return None if day is None else f"{day.isoformat()}T00:00:00Z"


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
        "cost": money(row.cost_nanos),
    }


def _counter(used: int, reserved: int, limit: int | None) -> dict[str, int | None]:
    remaining = None if limit is None else max(0, limit - used - reserved)
    return {"used": used, "reserved": reserved, "limit": limit, "remaining": remaining}


def _tokens_left(standing: dict[str, Any]) -> float:
    remaining = standing["tokens"]["remaining"]
    return float("inf") if remaining is None else float(remaining)


def iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
