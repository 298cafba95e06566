"""Usage of the whole installation in equal stretches of time, as operators' dashboards ask for it. Reads only.

Days come from the days' sums; hours from the ledger, as far back as LEDGER_DAYS keeps it. One query a page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.db.models import F, Sum
from django.db.models.functions import TruncHour

from accounts.ledger.usage import first_of_rotations
from accounts.models import DayUsage, LedgerEntry

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NAMES = {"project_id": "tenant_id", "api_key_id": "key__public_id", "model": "model", "line_item": "model"}
"""What results can be grouped by → the column of the days' sums."""
OF_THE_LEDGER = {
    "tenant_id": "tenant_period__tenant_id",
    "key_id": "key_period__key_id",
    "key__public_id": "key_period__key__public_id",
    "model": "model",
    "operation": "operation",
    "requests": "used_requests",
}
"""The same columns in the ledger."""
SUMS = ("requests", "used_tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")
MAX_RESULTS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """From `start`, `number` stretches of `width`, DAY or HOUR."""

    start: datetime
    width: timedelta
    number: int
    group_by: tuple[str, ...] = ()
    operation: str | None = None
    models: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    tenants: tuple[int, ...] = ()

    @property
    def end(self) -> datetime:
        return self.start + self.number * self.width


@dataclass(frozen=True, slots=True)
class Result:
    """names: by group; sums: by counter."""

    names: Mapping[str, Any] = field(default_factory=dict)
    sums: Mapping[str, int] = field(default_factory=dict)


def floor(moment: datetime, width: timedelta) -> datetime:
    """The beginning of its day or hour."""
    moment = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    return moment.replace(hour=0) if width == DAY else moment


def results(question: Question) -> list[tuple[datetime, Sequence[Result]]]:
    """Each stretch with its results, empty ones too: the first of them, as many as MAX_RESULTS have room for. Only one
    that is too long by itself is cut."""
    found: defaultdict[datetime, list[Result]] = defaultdict(list)
    is_daily = question.width == DAY
    rows = list((_days(question) if is_daily else _hours(question))[: MAX_RESULTS + 1])
    columns = {name: NAMES[name] for name in question.group_by}
    if not is_daily:
        columns = {name: OF_THE_LEDGER[column] for name, column in columns.items()}
    for row in rows[:MAX_RESULTS]:
        names = {name: row[column] for name, column in columns.items()}
        found[_moment(row["at"])].append(Result(names, {name: row[f"{name}_sum"] for name in SUMS}))
    moments = [question.start + place * question.width for place in range(question.number)]
    if len(rows) > MAX_RESULTS:
        not_whole = _moment(rows[-1]["at"])
        moments = [moment for moment in moments if moment < not_whole] or moments[:1]
    return [(moment, found[moment]) for moment in moments]


def _moment(at: date) -> datetime:
    """Of a day, or of an hour."""
    return at.astimezone(UTC) if isinstance(at, datetime) else datetime(at.year, at.month, at.day, tzinfo=UTC)


def _days(question: Question) -> Any:
    rows = DayUsage.objects.filter(day__gte=question.start.date(), day__lt=question.end.date())
    rows = rows.filter(**_filters(question))
    columns = dict.fromkeys(NAMES[name] for name in question.group_by)
    sums = {f"{name}_sum": Sum(name, default=0) for name in SUMS}
    return rows.order_by().values(*columns, at=F("day")).annotate(**sums).order_by("at", *columns)


def _hours(question: Question) -> Any:
    kinds = (LedgerEntry.Kind.SETTLE, LedgerEntry.Kind.ADJUST)
    rows = LedgerEntry.objects.filter(created_at__gte=question.start, created_at__lt=question.end, kind__in=kinds)
    rows = rows.filter(**{_in_ledger(name): value for name, value in _filters(question).items()})
    columns = dict.fromkeys(OF_THE_LEDGER[NAMES[name]] for name in question.group_by)
    sums = {f"{name}_sum": Sum(OF_THE_LEDGER.get(name, name), default=0) for name in SUMS}
    hour = TruncHour("created_at", tzinfo=UTC)
    return rows.order_by().values(*columns, at=hour).annotate(**sums).order_by("at", *columns)


def _in_ledger(lookup: str) -> str:
    column, _, kind = lookup.rpartition("__in")
    return f"{OF_THE_LEDGER[column]}__in{kind}" if column else OF_THE_LEDGER[lookup]


def _filters(question: Question) -> dict[str, Any]:
    found: dict[str, Any] = {} if question.operation is None else {"operation": question.operation}
    keys = first_of_rotations(question.keys) if question.keys else ()
    named = {"model__in": question.models, "key_id__in": keys, "tenant_id__in": question.tenants}
    return found | {name: values for name, values in named.items() if values != ()}
