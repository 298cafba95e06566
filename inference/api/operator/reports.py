"""Questions about many receipts at once: usage by key, the log, totals of a window. Aggregated by the database."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from django.db.models import Avg, Count, Max, Min, Q, QuerySet, Sum
from rest_framework import serializers

from accounts.models import APIKey, Tenant
from inference.api.operator.paging import PageQuery, slice_of, total_of
from inference.api.operator.serializers import ReceiptSerializer
from inference.models import Receipt

MAX_ROWS = 1000
TOTALS = {
    "total_requests": Count("pk"),
    "total_cached": Count("pk", filter=Q(cached=True)),
    "total_failed": Count("pk", filter=Q(status=Receipt.Status.FAILED)),
    "total_prompt_tokens": Sum("prompt_tokens", default=0),
    "total_completion_tokens": Sum("completion_tokens", default=0),
    "total_charged_tokens": Sum("charged_tokens", default=0),
    "avg_latency_seconds": Avg("total_seconds", default=0.0),
}


class WindowQuery(serializers.Serializer[Any]):
    window_days = serializers.IntegerField(min_value=1, max_value=365, default=30)


class StatsQuery(WindowQuery):
    """GET /v1/admin/stats."""


class SummaryQuery(WindowQuery):
    """GET /v1/admin/reports/summary."""

    format = serializers.ChoiceField(choices=["text", "json", "md"], default="text")


class LogQuery(PageQuery):
    """GET /v1/admin/logs."""

    model_id = serializers.CharField(max_length=100, required=False)
    api_key = serializers.CharField(max_length=12, required=False, help_text="The public id of a key.")
    tenant = serializers.CharField(max_length=100, required=False)
    route = serializers.CharField(max_length=64, required=False)
    status = serializers.ChoiceField(choices=Receipt.Status.choices, required=False)
    from_ts = serializers.DateTimeField(required=False)
    to_ts = serializers.DateTimeField(required=False)


LOG_FILTERS = {
    "model_id": "model",
    "route": "route",
    "status": "status",
    "from_ts": "created_at__gte",
    "to_ts": "created_at__lt",
}


class LogPage(serializers.Serializer[Any]):
    total = serializers.IntegerField()
    limit = serializers.IntegerField()
    offset = serializers.IntegerField()
    items = ReceiptSerializer(many=True)


class UsageRow(serializers.Serializer[Any]):
    key_prefix = serializers.CharField()
    name = serializers.CharField()
    tenant = serializers.CharField()
    role = serializers.CharField()
    total_requests = serializers.IntegerField()
    total_prompt_tokens = serializers.IntegerField()
    total_completion_tokens = serializers.IntegerField()
    total_charged_tokens = serializers.IntegerField()
    first_request_at = serializers.DateTimeField()
    last_request_at = serializers.DateTimeField()


class UsageRows(serializers.Serializer[Any]):
    results = UsageRow(many=True)


def usage_by_key() -> list[dict[str, Any]]:
    """The keys that were used most, with all their receipts. Two queries: receipt_by_key has all that is summed."""
    rows: Any = (
        Receipt.objects.order_by()
        .values("key_id")
        .annotate(
            total_requests=Count("*"),
            total_prompt_tokens=Sum("prompt_tokens", default=0),
            total_completion_tokens=Sum("completion_tokens", default=0),
            total_charged_tokens=Sum("charged_tokens", default=0),
            first_request_at=Min("created_at"),
            last_request_at=Max("created_at"),
        )
    )
    most = _most_used(rows)
    keys = APIKey.objects.select_related("tenant__plan").in_bulk([row["key_id"] for row in most])
    return [_usage_row(keys[row.pop("key_id")], row) for row in most]


def _usage_row(key: APIKey, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "key_prefix": key.display,
        "name": key.name,
        "tenant": key.tenant.name,
        "role": key.tenant.plan.role,
        **row,
    }


def log_page(query: dict[str, Any]) -> dict[str, Any]:
    found = {LOG_FILTERS[name]: value for name, value in query.items() if name in LOG_FILTERS}
    if "tenant" in query:
        found["tenant_id"] = _pk_of(Tenant.objects.filter(name=query["tenant"]))
    if "api_key" in query:
        found["key_id"] = _pk_of(APIKey.objects.filter(public_id=query["api_key"]))
    rows: QuerySet[Receipt] = Receipt.objects.filter(**found).order_by("-created_at", "request_id")
    limit, offset = query["limit"], query["offset"]
    page = slice_of(rows.select_related("tenant", "key"), offset, limit)
    return {
        "total": total_of(rows),
        "limit": limit,
        "offset": offset,
        "items": ReceiptSerializer(page, many=True).data,
    }


def _pk_of(rows: QuerySet[Any]) -> int:
    """Asked for first, so that the receipts are found along an index; 0, which no row has, for a name that none has."""
    return rows.values_list("pk", flat=True).first() or 0


def stats(window_days: int, now: datetime) -> dict[str, Any]:
    """Totals of the last `window_days`, and the same by model."""
    rows = Receipt.objects.filter(created_at__gte=now - timedelta(days=window_days)).order_by()
    per_model = _most_used(rows.values("model").annotate(**TOTALS))
    totals = _summed(per_model) if len(per_model) < MAX_ROWS else rows.aggregate(**TOTALS)
    return {
        "window_days": window_days,
        "generated_at": now.isoformat(),
        **_in_milliseconds(totals),
        "per_model": [{"model_id": row.pop("model"), **_in_milliseconds(row)} for row in per_model],
    }


def _summed(per_model: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole from its parts: the receipts of the window are read once."""
    totals = {name: sum(row[name] for row in per_model) for name in TOTALS if name.startswith("total_")}
    seconds = sum(row["avg_latency_seconds"] * row["total_requests"] for row in per_model)
    return {**totals, "avg_latency_seconds": seconds / max(1, totals["total_requests"])}


def _most_used(rows: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in rows.order_by("-total_requests")[:MAX_ROWS]]


def _in_milliseconds(totals: dict[str, Any]) -> dict[str, Any]:
    seconds = totals.pop("avg_latency_seconds") or 0.0
    return {**totals, "avg_latency_ms": round(seconds * 1000, 2)}


def as_text(found: dict[str, Any]) -> str:
    lines = [
        f"Usage of the last {found['window_days']} days",
        f"requests {found['total_requests']}, from the cache {found['total_cached']}, failed {found['total_failed']}",
        f"tokens in {found['total_prompt_tokens']}, out {found['total_completion_tokens']}, "
        f"charged {found['total_charged_tokens']}",
        f"mean latency {found['avg_latency_ms']} ms",
    ]
    lines += [
        f"  {row['model_id']}: {row['total_requests']} requests, {row['total_completion_tokens']} tokens out, "
        f"{row['avg_latency_ms']} ms"
        for row in found["per_model"]
    ]
    return "\n".join(lines) + "\n"


def as_markdown(found: dict[str, Any]) -> str:
    """A table; names of models have no pipes (see models.py)."""
    lines = [
        f"# Usage of the last {found['window_days']} days",
        "",
        "| model | requests | cached | failed | tokens in | tokens out | charged | mean latency (ms) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_markdown_row(row["model_id"], row) for row in [*found["per_model"], {**found, "model_id": "**all**"}]]
    return "\n".join(lines) + "\n"


def _markdown_row(name: str, row: dict[str, Any]) -> str:
    names = ("requests", "cached", "failed", "prompt_tokens", "completion_tokens", "charged_tokens")
    cells = [name, *(str(row[f"total_{each}"]) for each in names), str(row["avg_latency_ms"])]
    return f"| {' | '.join(cells)} |"
