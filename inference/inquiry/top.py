"""What the site does at this moment: workers and models from heartbeats in Redis, queues, tenants of the last minute.

Reads only: a few bounded queries and a few commands of Redis. Called by the command top.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import redis
from django.db.models import Count, Q, Sum

from accounts.identity import key_rows
from accounts.limits import throttling
from accounts.limits.precedence import Limits
from accounts.models import QuotaPeriod
from inference.models import Receipt, ServedModel
from inference.transport import queue

WINDOW = timedelta(minutes=1)
NUM_TENANTS = 50


def look(now: datetime) -> dict[str, Any]:
    """JSON-able. Without Redis `redis` is False, and what only it knows is empty."""
    pools = sorted(set(ServedModel.objects.values_list("pool", flat=True)))
    rows = _tenants(now)
    found: dict[str, Any] = {"at": now.isoformat(timespec="seconds"), "redis": True, "workers": [], "pools": []}
    try:
        tickets = queue.ticket_queue()
        found["workers"] = [_worker(each.worker_id, each.pool, each.info, now) for each in tickets.workers()]
        found["pools"] = [{"pool": pool, "waiting": tickets.num_waiting(pool)} for pool in pools]
        running = {row["tenant_id"]: throttling.running(row["tenant_id"]) for row in rows}
    except redis.RedisError:
        found["redis"], running = False, {}
    found["tenants"] = [{"running": running.get(row.pop("tenant_id")), **row} for row in rows]
    return found


def _worker(worker_id: str, pool: str, info: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    names = ("name", "state", "busy", "slots", "n_ctx", "steps", "adapters", "error")
    started = info.get("started_at")
    return {
        "worker": worker_id,
        "pool": pool,
        "host": info.get("host", ""),
        "pid": info.get("pid"),
        "seconds": round(now.timestamp() - started) if started else None,
        "stopping": bool(info.get("stopping")),
        "models": [{name: model.get(name) for name in names} for model in info.get("models", ())],
    }


def _tenants(now: datetime) -> list[dict[str, Any]]:
    """Those whose requests ended in the last minute, busiest first, then those that used most of this period."""
    recent = {row["tenant_id"]: row for row in _recent(now)}
    periods = QuotaPeriod.objects.filter(key__isnull=True, starts_at__lte=now, ends_at__gt=now)
    chosen = list(periods.filter(tenant_id__in=recent).select_related("tenant__plan"))
    most_used = periods.exclude(tenant_id__in=recent).order_by("-used_tokens", "tenant__name")
    chosen += list(most_used.select_related("tenant__plan")[: NUM_TENANTS - len(chosen)])
    limits = key_rows.limits_of_tenants((period.tenant for period in chosen), now)
    rows = [_tenant(period, limits[period.tenant_id], recent.get(period.tenant_id, {})) for period in chosen]
    return sorted(rows, key=lambda row: (-row["tokens_per_minute"], -row["requests_per_minute"], row["tenant"]))


def _recent(now: datetime) -> Any:
    rows = Receipt.objects.filter(created_at__gte=now - WINDOW).order_by().values("tenant_id")
    failed = Q(status=Receipt.Status.FAILED)
    counts = rows.annotate(requests=Count("pk"), tokens=Sum("completion_tokens"), failed=Count("pk", filter=failed))
    return counts.order_by("-tokens")[:NUM_TENANTS]


def _tenant(period: QuotaPeriod, limits: Limits, recent: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tenant_id": period.tenant_id,
        "tenant": period.tenant.name,
        "plan": period.tenant.plan.name,
        "requests_per_minute": recent.get("requests", 0),
        "failed_per_minute": recent.get("failed", 0),
        "tokens_per_minute": recent.get("tokens") or 0,
        "used_tokens": period.used_tokens,
        "reserved_tokens": period.reserved_tokens,
        "monthly_tokens": limits.monthly_tokens,
    }
