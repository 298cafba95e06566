"""The SQL of periods, reservations and the ledger, in sets: a group of any size costs the same number of statements.

Only quotas.py calls it, inside its transactions; nothing here begins, commits or decides. Written for SQLite 3.35 and
PostgreSQL alike: both name the columns of a VALUES list column1, column2, and both have UPDATE ... FROM ... RETURNING.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain

from django.db import connection
from django.db.models import Max, Q

from accounts import periods
from accounts.allotment import Balance, Order
from accounts.models import LedgerEntry, QuotaPeriod, Reservation

OwnerId = tuple[int, int | None]
"""(tenant id, key id, or None for the tenant itself)"""
Moment = tuple[OwnerId, datetime]

PERIODS = QuotaPeriod._meta.db_table
RESERVATIONS = Reservation._meta.db_table
COUNTERS = (
    "reserved_tokens",
    "used_tokens",
    "reserved_requests",
    "used_requests",
    "prompt_tokens",
    "completion_tokens",
)
COLUMNS = (
    "tenant_id",
    "key_id",
    "starts_at",
    "ends_at",
    "id",
    "used_tokens",
    "reserved_tokens",
    "used_requests",
    "reserved_requests",
)


class CountersMoved(Exception):
    """A conditional UPDATE met other counters than were read: the transaction must be rolled back and tried again."""


@dataclass(slots=True)
class Movement:
    """What a group adds to one period. The limits guard the UPDATE: None lets it pass."""

    reserved_tokens: int = 0
    used_tokens: int = 0
    reserved_requests: int = 0
    used_requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_limit: int | None = None
    request_limit: int | None = None

    def add(self, entry: LedgerEntry) -> None:
        self.reserved_tokens += entry.reserved_tokens
        self.used_tokens += entry.used_tokens
        self.reserved_requests += entry.reserved_requests
        self.used_requests += entry.used_requests
        self.prompt_tokens += entry.prompt_tokens
        self.completion_tokens += entry.completion_tokens


@dataclass(frozen=True, slots=True)
class Closed:
    """A reservation that this transaction has closed."""

    request_id: str
    tokens: int
    tenant_period_id: int
    key_period_id: int


class Balances:
    """Periods as they were read, locked until the transaction ends."""

    def __init__(self) -> None:
        self.by_id: dict[int, Balance] = {}
        self._by_moment: dict[Moment, Balance] = {}

    def at(self, owner: OwnerId, moment: datetime) -> Balance:
        """The period of `owner` that holds this moment; moments of one period get one object."""
        return self._by_moment[owner, moment]

    def add(self, balance: Balance, moments: Iterable[Moment]) -> None:
        self.by_id[balance.id] = balance
        self._by_moment.update(dict.fromkeys(moments, balance))

    def missing(self, wanted: Iterable[Moment]) -> list[Moment]:
        return [moment for moment in wanted if moment not in self._by_moment]


def read_balances(wanted: Mapping[Moment, int], ids: Iterable[int] = ()) -> Balances:
    """Locks and reads the periods of (owner, moment) → anchor day, and those with these ids, in order of id.

    A period that does not exist yet is opened.
    """
    found = _read(wanted, ids)
    missing = found.missing(wanted)
    if missing:
        _open({moment: wanted[moment] for moment in missing})
        found = _read(wanted, ids)
    return found


def owners(order: Order) -> tuple[OwnerId, OwnerId]:
    return (order.tenant_id, None), (order.tenant_id, order.key_id)


def _read(wanted: Iterable[Moment], ids: Iterable[int]) -> Balances:
    moments: dict[OwnerId, list[datetime]] = {}
    for owner, moment in wanted:
        moments.setdefault(owner, []).append(moment)
    times = [moment for each in moments.values() for moment in each]
    condition = Q(_of_owners(moments), starts_at__lte=max(times), ends_at__gt=min(times))
    ids = set(ids)
    if ids:
        condition |= Q(id__in=ids)
    found = Balances()
    rows = QuotaPeriod.objects.select_for_update(no_key=True).filter(condition).order_by("id").values_list(*COLUMNS)
    for tenant_id, key_id, starts_at, ends_at, *counters in rows:
        owner = (tenant_id, key_id)
        inside = [(owner, moment) for moment in moments.get(owner, ()) if starts_at <= moment < ends_at]
        found.add(Balance(counters[0], "tenant" if key_id is None else "key", ends_at, *counters[1:]), inside)
    return found


def _of_owners(owner_ids: Iterable[OwnerId]) -> Q:
    tenants, keys = set(), set()
    for tenant_id, key_id in owner_ids:
        if key_id is None:
            tenants.add(tenant_id)
        else:
            keys.add(key_id)
    return Q(key_id__in=keys) | Q(tenant_id__in=tenants, key_id__isnull=True)


def _open(missing: Mapping[Moment, int]) -> None:
    """Two processes may both come here: the unique constraints let one row through, and both read that one."""
    latest = max(moment for _, moment in missing)
    ends = {
        (tenant_id, key_id): end
        for tenant_id, key_id, end in QuotaPeriod.objects.filter(
            _of_owners(owner for owner, _ in missing), ends_at__lte=latest
        )
        .order_by()
        .values_list("tenant_id", "key_id")
        .annotate(end=Max("ends_at"))
    }
    rows = []
    for (owner, moment), anchor_day in missing.items():
        starts_at, ends_at = periods.next_period(anchor_day, moment, ends.get(owner))
        rows.append(QuotaPeriod(tenant_id=owner[0], key_id=owner[1], starts_at=starts_at, ends_at=ends_at))
    QuotaPeriod.objects.bulk_create(rows, ignore_conflicts=True)


def move(movements: dict[int, Movement]) -> None:
    """Adds to the counters of many periods in one conditional UPDATE. Raises CountersMoved where a limit forbids it."""
    if not movements:
        return
    casts = ", ".join(["CAST(%s AS BIGINT)"] * (len(COUNTERS) + 3))
    adds = ", ".join(f"{name} = p.{name} + v.column{number}" for number, name in enumerate(COUNTERS, start=2))
    token_limit, request_limit = len(COUNTERS) + 2, len(COUNTERS) + 3
    statement = f"""
        UPDATE {PERIODS} AS p SET {adds} FROM (VALUES {", ".join([f"({casts})"] * len(movements))}) AS v
        WHERE p.id = v.column1
        AND (v.column{token_limit} IS NULL
             OR p.used_tokens + p.reserved_tokens + v.column2 + v.column3 <= v.column{token_limit})
        AND (v.column{request_limit} IS NULL
             OR p.used_requests + p.reserved_requests + v.column4 + v.column5 <= v.column{request_limit})
    """
    values = [
        (
            period_id,
            *(getattr(movement, name) for name in COUNTERS),
            movement.token_limit,
            movement.request_limit,
        )
        for period_id, movement in sorted(movements.items())
    ]
    with connection.cursor() as cursor:
        cursor.execute(statement, list(chain.from_iterable(values)))
        if cursor.rowcount != len(movements):
            raise CountersMoved(f"{cursor.rowcount} of {len(movements)} periods had the counters that were read")


def lock_periods(period_ids: Iterable[int]) -> None:
    """In order of id, so that two processes cannot wait for each other; SQLite locks the whole file anyway."""
    _lock(PERIODS, "id", sorted(period_ids))


def _lock(table: str, column: str, values: Sequence[int] | Sequence[str]) -> None:
    if not values or not connection.features.has_select_for_update:
        return
    places = ", ".join(["%s"] * len(values))
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT 1 FROM {table} WHERE {column} IN ({places}) ORDER BY {column} FOR NO KEY UPDATE", list(values)
        )


def close_reservations(states: dict[str, str]) -> dict[str, Closed]:
    """Request id → new state: closes those that are still open, compare-and-set, and returns them."""
    if not states:
        return {}
    ids = sorted(states)
    if len(ids) > 1:
        _lock(RESERVATIONS, "request_id", ids)
    statement = f"""
        UPDATE {RESERVATIONS} SET state = v.column2 FROM (VALUES {", ".join(["(%s, %s)"] * len(ids))}) AS v
        WHERE request_id = v.column1 AND state = %s
        RETURNING request_id, tokens, tenant_period_id, key_period_id
    """
    parameters = [*chain.from_iterable((request_id, states[request_id]) for request_id in ids), Reservation.State.OPEN]
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return {row[0]: Closed(*row) for row in cursor.fetchall()}


def write(reservations: list[Reservation], entries: list[LedgerEntry]) -> None:
    if reservations:
        Reservation.objects.bulk_create(reservations)
    if entries:
        LedgerEntry.objects.bulk_create(entries)
