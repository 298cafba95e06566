"""The proof of the ledger: replays every movement and compares it with the counters. Reads only, in one snapshot.

Entries of one period are written under its lock, so the order of their ids is the order in which they took effect.
Called by the command audit_ledger and by tests, also while requests are served.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from django.db import connection, transaction

from accounts.ledger import day_totals, quota_rows, statements
from accounts.models import DayUsage, LedgerEntry, QuotaPeriod, Reservation, Statement

COUNTERS = (
    "used_tokens",
    "reserved_tokens",
    "used_requests",
    "reserved_requests",
    "prompt_tokens",
    "completion_tokens",
    "cost_nanos",
)
CHUNK = 5000
MAX_PROBLEMS = 1000

Kind = LedgerEntry.Kind


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken promise. `code` is stable."""

    code: str
    subject: str
    message: str


@dataclass(slots=True)
class Report:
    num_periods: int = 0
    num_entries: int = 0
    num_reservations: int = 0
    num_open: int = 0
    num_days: int = 0
    num_statements: int = 0
    used_tokens: int = 0
    used_requests: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.problems

    def add(self, code: str, subject: str, message: str) -> None:
        """Beyond MAX_PROBLEMS there is nothing left to learn."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(code, subject, message))


@dataclass(slots=True)
class _Sum:
    used_tokens: int = 0
    reserved_tokens: int = 0
    used_requests: int = 0
    reserved_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_nanos: int = 0

    def add(self, entry: LedgerEntry) -> None:
        for name in COUNTERS:
            setattr(self, name, getattr(self, name) + getattr(entry, name))

    def add_day(self, row: DayUsage) -> None:
        self.used_requests += row.requests
        for name in ("used_tokens", "prompt_tokens", "completion_tokens", "cost_nanos"):
            setattr(self, name, getattr(self, name) + getattr(row, name))


Days = dict[tuple[Any, ...], list[int]]
"""Names of a row of the days' sums → its counters."""


def audit() -> Report:
    """Checks the whole ledger; memory grows with open requests, periods and days, not with the ledger.

    Where the entries of a period were purged, the days' sums stand for them.
    """
    report = Report()
    with _snapshot():
        purged = frozenset(QuotaPeriod.objects.filter(purged_at__isnull=False).values_list("pk", flat=True))
        sums, held, days = _replay(report, purged)
        _check_days(report, sums, days, purged)
        _check_periods(report, sums)
        _check_reservations(report, held)
        _check_statements(report)
        _check_day_totals(report)
    return report


def _replay(report: Report, purged: frozenset[int]) -> tuple[defaultdict[int, _Sum], dict[str, LedgerEntry], Days]:
    """(sums by period, RESERVE entries that nothing has ended, sums by day)"""
    sums: defaultdict[int, _Sum] = defaultdict(_Sum)
    held: dict[str, LedgerEntry] = {}
    days: Days = {}
    for entry in LedgerEntry.objects.order_by("id").iterator(chunk_size=CHUNK):
        if entry.tenant_period_id in purged:
            continue  # a purge that was interrupted: these will go, too
        _add_to_days(days, entry)
        report.num_entries += 1
        report.used_tokens += entry.used_tokens
        report.used_requests += entry.used_requests
        sums[entry.tenant_period_id].add(entry)
        if entry.key_period_id is not None:
            sums[entry.key_period_id].add(entry)
        if entry.kind == Kind.RESERVE or (entry.kind == Kind.SETTLE and entry.reserved_requests == 0):
            _check_limits(report, entry, sums, purged)
        if entry.kind == Kind.RESERVE:
            held[entry.request_id] = entry
        elif entry.kind in (Kind.SETTLE, Kind.RELEASE) and entry.reserved_requests:
            _check_end(report, entry, held.pop(entry.request_id, None))
    return sums, held, days


def _add_to_days(days: Days, entry: LedgerEntry) -> None:
    if entry.kind in (Kind.SETTLE, Kind.ADJUST):
        total = days.setdefault(quota_rows.day_of(entry), [0] * len(quota_rows.DAY_COUNTERS))
        for place, number in enumerate(quota_rows.day_counters(entry)):
            total[place] += number


def _check_days(report: Report, sums: defaultdict[int, _Sum], days: Days, purged: frozenset[int]) -> None:
    """Each row of the days' sums is what its entries add up to. Adds those of purged periods to `sums`."""
    for row in DayUsage.objects.iterator(chunk_size=CHUNK):
        report.num_days += 1
        if row.tenant_period_id in purged:
            for period_id in (row.tenant_period_id, row.key_period_id):
                if period_id is not None:
                    sums[period_id].add_day(row)
            report.used_tokens += row.used_tokens
            report.used_requests += row.requests
            continue
        names = tuple(getattr(row, name) for name in quota_rows.DAY_NAMES)
        expected = days.pop(names, [0] * len(quota_rows.DAY_COUNTERS))
        found = [getattr(row, name) for name in quota_rows.DAY_COUNTERS]
        if found != expected:
            report.add("day_differs_from_ledger", str(names), f"it has {found}, its entries add up to {expected}")
    for names in days:
        report.add("day_differs_from_ledger", str(names), "entries of this day are in no sum")


def _check_statements(report: Report) -> None:
    """What tenants were told is what the days add up to."""
    for statement in Statement.objects.select_related("tenant").iterator(chunk_size=CHUNK):
        report.num_statements += 1
        told = (statement.requests, statement.used_tokens, statement.cost_nanos)
        found = statements.totals(statement.tenant_id, statement.month)
        if told != found:
            report.add("statement_differs", str(statement), f"it says {told}, the days add up to {found}")


def _check_day_totals(report: Report) -> None:
    """What charts show of days that are over is what the days of usage add up to."""
    for day, kept in day_totals.kept():
        found = day_totals.added_up(day)
        differ = sorted(place for place in kept.keys() | found.keys() if kept.get(place) != found.get(place))
        if differ:
            told, actual = kept.get(differ[0]), found.get(differ[0])
            report.add("day_total_differs", f"{day} {differ[0]}", f"it says {told}, the days add up to {actual}")


def _check_limits(report: Report, entry: LedgerEntry, sums: dict[int, _Sum], purged: frozenset[int]) -> None:
    """The grant respected the limits of its moment, and what it recorded is what the ledger adds up to."""
    for whose, period_id in (("tenant", entry.tenant_period_id), ("key", entry.key_period_id)):
        if period_id is None or period_id in purged:  # a key's period may be older than the tenant's that it now is in
            continue
        total = sums[period_id]
        checks = (
            (f"{whose}_limit", f"{whose}_committed_after", total.used_tokens + total.reserved_tokens),
            (f"{whose}_request_limit", f"{whose}_requests_after", total.used_requests + total.reserved_requests),
        )
        for limit_name, after_name, actual in checks:
            limit, after = getattr(entry, limit_name), getattr(entry, after_name)
            if after != actual:
                report.add(
                    "replay_differs", entry.request_id, f"{after_name} is {after}, the ledger adds up to {actual}"
                )
            if limit is not None and actual > limit:
                report.add(
                    "limit_passed", entry.request_id, f"{limit_name} was {limit}, {actual} were committed after it"
                )


def _check_end(report: Report, entry: LedgerEntry, reserve: LedgerEntry | None) -> None:
    if reserve is None:
        report.add("ended_twice", entry.request_id, f"{entry.kind} of a request that holds nothing")
        return
    if entry.reserved_tokens != -reserve.reserved_tokens or entry.reserved_requests != -reserve.reserved_requests:
        report.add(
            "release_differs", entry.request_id, f"held {reserve.reserved_tokens}, freed {-entry.reserved_tokens}"
        )
    if entry.used_tokens > reserve.reserved_tokens:
        report.add("overcharged", entry.request_id, f"charged {entry.used_tokens} of {reserve.reserved_tokens} held")
    if (entry.tenant_period_id, entry.key_period_id) != (reserve.tenant_period_id, reserve.key_period_id):
        report.add("period_differs", entry.request_id, "ended in other periods than it was reserved in")


def _check_periods(report: Report, sums: dict[int, _Sum]) -> None:
    empty = _Sum()
    for period in QuotaPeriod.objects.select_related("tenant", "key").order_by("id").iterator(chunk_size=CHUNK):
        report.num_periods += 1
        total = sums.get(period.pk, empty)
        for name in COUNTERS:
            if getattr(period, name) != getattr(total, name):
                report.add(
                    "period_differs_from_ledger",
                    str(period),
                    f"{name} is {getattr(period, name)}, its entries add up to {getattr(total, name)}",
                )


def _check_reservations(report: Report, held: dict[str, LedgerEntry]) -> None:
    """Open reservations and unfinished RESERVE entries are the same set."""
    for row in Reservation.objects.order_by("pk").iterator(chunk_size=CHUNK):
        report.num_reservations += 1
        is_open = row.state == Reservation.State.OPEN
        report.num_open += is_open
        entry = held.pop(row.pk, None)
        if is_open != (entry is not None):
            report.add("state_differs", row.pk, f"the reservation is {row.state}, the ledger says otherwise")
        elif entry is not None and entry.reserved_tokens != row.tokens:
            report.add(
                "state_differs", row.pk, f"the reservation holds {row.tokens}, the ledger {entry.reserved_tokens}"
            )
    for request_id in held:
        report.add("state_differs", request_id, "the ledger holds tokens for a request without a reservation")


@contextmanager
def _snapshot() -> Iterator[None]:
    """One moment of the database, without a lock that would stop writers."""
    if connection.in_atomic_block:
        yield
    elif connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("BEGIN DEFERRED")  # atomic() would be BEGIN IMMEDIATE and keep writers out
            try:
                yield
            finally:
                cursor.execute("ROLLBACK")
    else:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield
