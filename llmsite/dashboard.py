"""The console's landing page: how things stand, at a glance. Reads only, a fixed number of queries, all bounded.

`board` is called by django-unfold for every view of the index. Each part is there for whoever may see its list. The
workers' words come from Redis; if it does not answer, the page says so and shows the rest. Times are UTC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import redis
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser
from django.db.models import Count, Q
from django.http import HttpRequest
from django.utils import timezone
from django.utils.safestring import SafeString

from accounts import console
from accounts.models import QuotaPeriod
from inference import queue
from inference.models import Receipt, ServedModel

NEWEST = 1000
"""Receipts that times to the first token and failures are read from."""
MOST_COUNTED = 20_000
"""Receipts of a day that are counted; beyond it the page says `more than`."""
NUM_TENANTS = 10
NUM_FAILURES = 8
MIN_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class Tile:
    title: str
    value: str
    note: str
    url: str = ""
    is_bad: bool = False


@dataclass(frozen=True, slots=True)
class ModelRow:
    name: str
    url: str
    state: str
    tone: str
    slots: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class TenantRow:
    name: str
    url: str
    bar: SafeString
    requests: str


@dataclass(frozen=True, slots=True)
class FailureRow:
    when: SafeString
    url: str
    tenant: str
    model: str
    reason: str


@dataclass(slots=True)
class Board:
    """What the template shows; None for a part that the viewer may not see."""

    problems: list[str] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    models: list[ModelRow] | None = None
    tenants: list[TenantRow] | None = None
    failures: list[FailureRow] | None = None
    num_newest: int = 0


def callback(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """UNFOLD["DASHBOARD_CALLBACK"]."""
    context["title"] = "Dashboard"
    context["board"] = board(request.user, timezone.now())
    return context


def board(user: AbstractBaseUser | AnonymousUser, now: datetime) -> Board:
    found = Board()
    if _may_view(user, "inference.servedmodel"):
        _add_models(found)
    if _may_view(user, "inference.receipt"):
        _add_requests(found, now)
    if _may_view(user, "accounts.quotaperiod"):
        _add_tenants(found, now)
    return found


def _may_view(user: Any, label: str) -> bool:
    application, model = label.split(".")
    return any(user.has_perm(f"{application}.{verb}_{model}") for verb in ("view", "change"))


# Workers and models


def _add_models(found: Board) -> None:
    models = list(ServedModel.objects.order_by("-is_default", "name").only("name", "pool", "load_mode", "is_default"))
    pools = sorted({model.pool for model in models})
    try:
        tickets = queue.ticket_queue()
        workers = tickets.workers()
        num_waiting = sum(map(tickets.num_waiting, pools))
    except redis.RedisError:
        found.problems.append("Redis does not answer: no request can be served, and what the workers do is unknown.")
        found.models = [_model_row(model, [], "unknown") for model in models]
        return
    reports: dict[int, list[Mapping[str, Any]]] = {}
    for worker in workers:
        for report in worker.info.get("models", ()):
            reports.setdefault(report["id"], []).append(report)
    found.models = [_model_row(model, reports.get(model.pk, []), "not held") for model in models]
    found.tiles += _worker_tiles(len(workers), [each for group in reports.values() for each in group], num_waiting)
    found.problems += _problems_of(models, reports, has_workers=bool(workers))


def _worker_tiles(num_workers: int, reports: Sequence[Mapping[str, Any]], num_waiting: int) -> list[Tile]:
    ready = [report for report in reports if report["state"] == "ready"]
    busy, slots = sum(report["busy"] for report in ready), sum(report["slots"] for report in ready)
    loaded = f"{len(ready)} model{'' if len(ready) == 1 else 's'} loaded"
    return [
        Tile("Workers", str(num_workers), loaded, console.listing("inference_servedmodel"), is_bad=not num_workers),
        Tile("Slots busy", f"{busy} of {slots}", f"{num_waiting:,} waiting"),
    ]


def _problems_of(
    models: Sequence[ServedModel], reports: Mapping[int, Sequence[Mapping[str, Any]]], *, has_workers: bool
) -> list[str]:
    if not models:
        return ["No model is registered: add one under Served models."]
    if not has_workers:
        return ["No worker is alive: requests are refused. `manage.py doctor` says why."]
    problems = []
    for model in models:
        states = reports.get(model.pk, [])
        errors = [report["error"] for report in states if report["error"]]
        if errors:
            problems.append(f"{model.name}: {errors[0]}")
        elif not states and model.load_mode != ServedModel.LoadMode.OFF:
            problems.append(f"No worker of pool {model.pool} holds {model.name}.")
    return problems


def _model_row(model: ServedModel, reports: Sequence[Mapping[str, Any]], otherwise: str) -> ModelRow:
    ready = [report for report in reports if report["state"] == "ready"]
    states = sorted({str(report["state"]) for report in reports})
    if model.load_mode == ServedModel.LoadMode.OFF and not reports:
        state, tone = "off", ""
    elif not reports:
        state, tone = otherwise, "danger"
    else:
        state = "ready" if ready else ", ".join(states)
        tone = "success" if ready else "danger" if "failed" in states else "info"
    busy, slots = sum(report["busy"] for report in ready), sum(report["slots"] for report in ready)
    return ModelRow(
        name=model.name,
        url=console.change_page("inference_servedmodel", model.pk),
        state=state,
        tone=tone,
        slots=f"{busy} of {slots}" if ready else "-",
        note="default" if model.is_default else "",
    )


# Requests


def _add_requests(found: Board, now: datetime) -> None:
    day, hour = now - timedelta(days=1), now - timedelta(hours=1)
    of_the_day = Receipt.objects.filter(created_at__gte=day).order_by("-created_at")[:MOST_COUNTED]
    failed, recent = Q(status=Receipt.Status.FAILED), Q(created_at__gte=hour)
    counts = of_the_day.aggregate(
        day=Count("pk"),
        day_failed=Count("pk", filter=failed),
        hour=Count("pk", filter=recent),
        hour_failed=Count("pk", filter=recent & failed),
    )
    found.tiles += [_count_tile("hour", counts), _count_tile("day", counts)]
    fields = ("request_id", "tenant__name", "model", "status", "finish_reason", "error_code", "created_at", "cached")
    newest = list(Receipt.objects.order_by("-created_at").values(*fields, "queue_seconds", "prefill_seconds")[:NEWEST])
    found.num_newest = len(newest)
    found.tiles += _latency_tiles(newest)
    broken = [row for row in newest if row["status"] == Receipt.Status.FAILED][:NUM_FAILURES]
    found.failures = [_failure_row(row) for row in broken]


def _count_tile(name: str, counts: Mapping[str, int]) -> Tile:
    title = {"hour": "Requests, last hour", "day": "Requests, 24 hours"}[name]
    number, num_failed = counts[name], counts[f"{name}_failed"]
    more = "> " if number >= MOST_COUNTED else ""
    return Tile(
        title, f"{more}{number:,}", f"{num_failed:,} failed", console.listing("inference_receipt"), num_failed > 0
    )


def _latency_tiles(newest: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """Time to the first token is the wait for a slot and the prefill; answers from the cache had neither."""
    times = sorted(
        row["queue_seconds"] + row["prefill_seconds"]
        for row in newest
        if row["status"] == Receipt.Status.COMPLETED and not row["cached"]
    )
    note = f"newest {len(times):,} answers"
    if len(times) < MIN_SAMPLES:
        return [Tile("First token, p50", "-", "too few answers yet")]
    return [
        Tile("First token, p50", console.seconds(quantile(times, 0.5)), note),
        Tile("First token, p95", console.seconds(quantile(times, 0.95)), note),
    ]


def quantile(ascending: Sequence[float], part: float) -> float:
    """The nearest rank: a time that really was. `ascending` is not empty."""
    return ascending[max(0, math.ceil(part * len(ascending)) - 1)]


def _failure_row(row: Mapping[str, Any]) -> FailureRow:
    return FailureRow(
        when=console.clock(row["created_at"]),
        url=console.change_page("inference_receipt", row["request_id"]),
        tenant=row["tenant__name"],
        model=row["model"],
        reason=row["error_code"] or row["finish_reason"],
    )


# Tenants


def _add_tenants(found: Board, now: datetime) -> None:
    periods = QuotaPeriod.objects.filter(key__isnull=True, starts_at__lte=now, ends_at__gt=now)
    rows = list(periods.select_related("tenant__plan").order_by("-used_tokens", "tenant__name")[:NUM_TENANTS])
    found.tenants = [
        TenantRow(
            name=row.tenant.name,
            url=console.change_page("accounts_tenant", row.tenant_id),
            bar=console.quota_bar(row.used_tokens, row.tenant.limits.monthly_tokens),
            requests=f"{row.used_requests:,}",
        )
        for row in rows
    ]
