"""The console's landing page: how things stand, at a glance. Reads only, a fixed number of queries, all bounded.

`board` is called by django-unfold for every view of the index; `part` answers the page's script, which asks for the
board again every some seconds (static/llmsite/dashboard.js). Each part is there for whoever may see its list, with the
rows of those whom reach.py says. What workers say comes from Redis; if it does not answer, the page says so and shows
the rest. Charts: board_usage.py; workers: board_fleet.py. Times are UTC.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import redis
from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.utils.safestring import SafeString
from django.views.decorators.http import require_GET

from accounts.identity import key_rows
from accounts.models import QuotaAlert, QuotaPeriod, RefusedRequest
from accounts.pages import console
from inference.models import Receipt, ServedModel
from inference.transport import queue
from llmsite.console import board_fleet, board_usage
from llmsite.console.board_fleet import WorkerRow
from llmsite.console.board_usage import Choice, UsageChart
from llmsite.console.reach import Tenants, tenants_of, within

NEWEST = 1000
"""Receipts that times to the first token, speeds and failures are read from."""
NUM_TENANTS = 10
NUM_ALERTS = 5
NUM_SPEEDS = 12
LOST_WITHIN = timedelta(hours=1)
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


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Of one model, among the newest answers."""

    model: str
    answers: str
    first_p50: str
    first_p95: str
    speed_p50: str
    speed_p5: str


@dataclass(slots=True)
class Board:
    """What the template shows; None for a part that the viewer may not see."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    workers: list[WorkerRow] | None = None
    usage: UsageChart | None = None
    outcomes: SafeString | None = None
    codes: Sequence[tuple[str, str, str]] | None = None
    speeds: list[SpeedRow] | None = None
    shown_at: datetime | None = None
    tiles: list[Tile] = field(default_factory=list)
    models: list[ModelRow] | None = None
    tenants: list[TenantRow] | None = None
    failures: list[FailureRow] | None = None
    num_newest: int = 0


def callback(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """UNFOLD["DASHBOARD_CALLBACK"]."""
    context["title"] = "Dashboard"
    context["board"] = board(request.user, timezone.now(), Choice.of(request.GET.dict()))
    return context


@require_GET
def part(request: HttpRequest) -> HttpResponse:
    """The board alone, for the script that shows it anew. Behind the console's sign-in (urls.py)."""
    found = board(request.user, timezone.now(), Choice.of(request.GET.dict()))
    return render(request, "console/board.html", {"board": found})


def board(user: AbstractBaseUser | AnonymousUser, now: datetime, choice: Choice | None = None) -> Board:
    found, tenants = Board(shown_at=now), tenants_of(user)
    may_see_models, may_see_receipts = _may_view(user, "inference.servedmodel"), _may_view(user, "inference.receipt")
    if may_see_models:
        _add_models(found)
    receipts = None
    if may_see_receipts:
        every = within(tenants, Receipt.objects.all())
        receipts = board_usage.bounded(every, _a_day_before(now))
        _add_requests(found, every, receipts, now)
    if _may_view(user, "accounts.dayusage"):
        found.usage = board_usage.usage_chart(choice or Choice(), now, tenants)
    refused = None
    if _may_view(user, "accounts.refusedrequest"):
        refused = board_usage.bounded(within(tenants, RefusedRequest.objects.all()), _a_day_before(now))
        found.codes = board_usage.codes(refused)
    if receipts is not None or refused is not None:
        found.outcomes = board_usage.outcomes(receipts, refused, now)
    if _may_view(user, "accounts.quotaperiod"):
        _add_tenants(found, tenants, now)
    if _may_view(user, "accounts.quotaalert"):
        _add_alerts(found, tenants, now)
    return found


def _a_day_before(now: datetime) -> datetime:
    """The beginning of the first of 24 hours, of which this one is the last."""
    return now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=board_usage.HOURS - 1)


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
        found.problems += board_fleet.stuck_pools(tickets, workers, pools)
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
    found.workers = board_fleet.rows(workers, time.time())
    found.warnings += board_fleet.full_disks(settings.CONFIG.state, workers)
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
        return ["No worker is alive: requests are refused. manage.py doctor says why."]
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
        state = "ready" if ready else ", ".join(sorted({_word(report) for report in reports}))
        tone = "success" if ready else "danger" if "failed" in states else "" if states == ["unloaded"] else "info"
    busy, slots = sum(report["busy"] for report in ready), sum(report["slots"] for report in ready)
    return ModelRow(
        name=model.name,
        url=console.change_page("inference_servedmodel", model.pk),
        state=state,
        tone=tone,
        slots=f"{busy} of {slots}" if ready else "-",
        note="default" if model.is_default else "",
    )


def _word(report: Mapping[str, Any]) -> str:
    """A state, and how far a load is."""
    if report["state"] == "loading" and report.get("progress") is not None:
        return f"loading {report['progress']:.0%}"
    return "waiting for memory" if report.get("is_waiting") else str(report["state"])


# Requests


def _add_requests(found: Board, every: QuerySet[Receipt], of_the_day: QuerySet[Receipt], now: datetime) -> None:
    day, hour = now - timedelta(days=1), now - timedelta(hours=1)
    failed, recent, today = Q(status=Receipt.Status.FAILED), Q(created_at__gte=hour), Q(created_at__gte=day)
    counts = of_the_day.aggregate(
        day=Count("pk", filter=today),
        day_failed=Count("pk", filter=today & failed),
        hour=Count("pk", filter=recent),
        hour_failed=Count("pk", filter=recent & failed),
    )
    found.tiles += [_count_tile("hour", counts), _count_tile("day", counts)]
    fields = ("request_id", "tenant__name", "model", "status", "finish_reason", "error_code", "created_at", "cached")
    measured = ("queue_seconds", "prefill_seconds", "decode_seconds", "completion_tokens")
    newest = list(every.order_by("-created_at").values(*fields, *measured)[:NEWEST])
    found.num_newest = len(newest)
    found.tiles += _latency_tiles(newest)
    found.speeds = _speeds(newest)
    broken = [row for row in newest if row["status"] == Receipt.Status.FAILED]
    found.failures = [_failure_row(row) for row in broken[:NUM_FAILURES]]
    lost = [row for row in broken if row["error_code"] == "worker_lost" and row["created_at"] > now - LOST_WITHIN]
    if lost:
        words = "request was" if len(lost) == 1 else "requests were"
        found.warnings.append(f"A worker was lost: {len(lost)} {words} ended by it within the last hour, uncharged.")


def _count_tile(name: str, counts: Mapping[str, int]) -> Tile:
    title = {"hour": "Requests, last hour", "day": "Requests, 24 hours"}[name]
    number, num_failed = counts[name], counts[f"{name}_failed"]
    more = "> " if number >= board_usage.MOST_COUNTED else ""
    return Tile(
        title, f"{more}{number:,}", f"{num_failed:,} failed", console.listing("inference_receipt"), num_failed > 0
    )


def _latency_tiles(newest: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """Time to the first token is the wait for a slot and the prefill; answers from the cache had neither."""
    times = _first_tokens(newest)
    note = f"newest {len(times):,} answers"
    if len(times) < MIN_SAMPLES:
        return [Tile("First token, p50", "-", "too few answers yet")]
    return [
        Tile("First token, p50", console.seconds(quantile(times, 0.5)), note),
        Tile("First token, p95", console.seconds(quantile(times, 0.95)), note),
    ]


def _first_tokens(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return sorted(
        row["queue_seconds"] + row["prefill_seconds"]
        for row in rows
        if row["status"] == Receipt.Status.COMPLETED and not row["cached"]
    )


def _speeds(newest: Sequence[Mapping[str, Any]]) -> list[SpeedRow]:
    """Times to the first token, and tokens a second behind it, by model; those with most answers first."""
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for row in newest:
        if row["status"] == Receipt.Status.COMPLETED and not row["cached"]:
            by_model.setdefault(row["model"], []).append(row)
    most = sorted(by_model.items(), key=lambda each: (-len(each[1]), each[0]))
    return [_speed_row(model, rows) for model, rows in most[:NUM_SPEEDS]]


def _speed_row(model: str, rows: Sequence[Mapping[str, Any]]) -> SpeedRow:
    first = _first_tokens(rows)
    # the first token is the prefill's, so it takes two to have a speed
    decoded = [row for row in rows if row["decode_seconds"] > 0 and row["completion_tokens"] > 1]
    speeds = sorted((row["completion_tokens"] - 1) / row["decode_seconds"] for row in decoded)
    return SpeedRow(
        model=model,
        answers=f"{len(rows):,}",
        first_p50=console.seconds(quantile(first, 0.5)),
        first_p95=console.seconds(quantile(first, 0.95)),
        speed_p50=f"{quantile(speeds, 0.5):,.0f}" if speeds else "-",
        speed_p5=f"{quantile(speeds, 0.05):,.0f}" if speeds else "-",
    )


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


def _add_tenants(found: Board, tenants: Tenants, now: datetime) -> None:
    periods = within(tenants, QuotaPeriod.objects.filter(key__isnull=True, starts_at__lte=now, ends_at__gt=now))
    rows = list(periods.select_related("tenant__plan").order_by("-used_tokens", "tenant__name")[:NUM_TENANTS])
    limits = key_rows.limits_of_tenants((row.tenant for row in rows), now)
    found.tenants = [
        TenantRow(
            name=row.tenant.name,
            url=console.change_page("accounts_tenant", row.tenant_id),
            bar=console.quota_bar(row.used_tokens, limits[row.tenant_id].monthly_tokens),
            requests=f"{row.used_requests:,}",
        )
        for row in rows
    ]


def _add_alerts(found: Board, tenants: Tenants, now: datetime) -> None:
    """The newest of the periods that run; one query."""
    rows = QuotaAlert.objects.filter(period__starts_at__lte=now, period__ends_at__gt=now, percent__gte=80)
    rows = within(tenants, rows, "period__tenant_id")
    for row in rows.select_related("period__tenant", "period__key").order_by("-created_at", "-percent")[:NUM_ALERTS]:
        who = f"Key {row.period.key.name} of {row.period.tenant}" if row.period.key else str(row.period.tenant)
        words = "has used up its" if row.percent >= 100 else f"has used {row.percent} % of its"
        found.warnings.append(f"{who} {words} {row.counts} of this month ({row.used:,} of {row.quota:,}).")
