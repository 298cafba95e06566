"""The SQL of periods, reservations and the ledger, in sets: a group of any size costs the same number of statements.

Only quotas.py calls it, inside its transactions; nothing here begins, commits or decides. Statements are text, kept by
their size: the ORM takes longer to write one than the database to run it. For SQLite 3.35 and PostgreSQL alike: both
name the columns of a VALUES list column1, column2, and both have UPDATE ... FROM ... RETURNING.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

from django.db import connection, models
from django.db.models import Max, Q

from accounts.ledger import periods
from accounts.ledger.allotment import Balance, Order
from accounts.models import DayUsage, LedgerEntry, QuotaPeriod, Reservation

OwnerId = tuple[int, int | None]
"""(tenant id, key id, or None for the tenant itself)"""
Moment = tuple[OwnerId, datetime]

PERIODS = QuotaPeriod._meta.db_table
RESERVATIONS = Reservation._meta.db_table
DAYS = DayUsage._meta.db_table
DAY_NAMES = ("day", "tenant_period_id", "key_period_id", "model", "adapters", "operation")
"""What tells the rows of the days' sums apart."""
DAY_COUNTERS = ("requests", "used_tokens", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")
COUNTERS = (
    "reserved_tokens",
    "used_tokens",
    "reserved_requests",
    "used_requests",
    "prompt_tokens",
    "completion_tokens",
    "cost_nanos",
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
ROWS_PER_STATEMENT = 200
PLAIN_FIELDS = (
    models.CharField,
    models.IntegerField,
    models.FloatField,
    models.BooleanField,
    models.DateTimeField,
    models.ForeignKey,
)
"""Kinds of columns whose values the database's driver takes as they are, times but for their form."""


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
    cost_nanos: int = 0
    token_limit: int | None = None
    request_limit: int | None = None

    def add(self, entry: LedgerEntry) -> None:
        self.reserved_tokens += entry.reserved_tokens
        self.used_tokens += entry.used_tokens
        self.reserved_requests += entry.reserved_requests
        self.used_requests += entry.used_requests
        self.prompt_tokens += entry.prompt_tokens
        self.completion_tokens += entry.completion_tokens
        self.cost_nanos += entry.cost_nanos


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


def peek(order: Order) -> tuple[Balance, Balance]:
    """Tenant's and key's period at the order's moment as they are, without a lock; one that does not exist yet is
    empty and is not opened. Two queries at most."""
    wanted = [(owner, order.now) for owner in owners(order)]
    found = _read(wanted, (), locks=False)
    missing = found.missing(wanted)
    if missing:
        ends = _last_ends(missing, order.now)
        for owner, moment in missing:
            _, ends_at = periods.next_period(order.anchor_day, moment, ends.get(owner))
            whose = "tenant" if owner[1] is None else "key"
            found.add(Balance(0, whose, ends_at, 0, 0, 0, 0), [(owner, moment)])
    tenant, key = (found.at(owner, moment) for owner, moment in wanted)
    return tenant, key


def _read(wanted: Iterable[Moment], ids: Iterable[int], *, locks: bool = True) -> Balances:
    moments: dict[OwnerId, list[datetime]] = {}
    for owner, moment in wanted:
        moments.setdefault(owner, []).append(moment)
    times = [moment for each in moments.values() for moment in each]
    tenants = [tenant_id for tenant_id, key_id in moments if key_id is None]
    keys = [key_id for _, key_id in moments if key_id is not None]
    others = list(ids)
    bounds = [connection.ops.adapt_datetimefield_value(moment) for moment in (max(times), min(times))]
    found = Balances()
    with connection.cursor() as cursor:
        locks = locks and connection.features.has_select_for_update
        statement = _select_periods(len(keys), len(tenants), len(others), locks)
        cursor.execute(statement, [*keys, *tenants, *bounds, *others])
        rows = cursor.fetchall()
    for tenant_id, key_id, starts_at, ends_at, *counters in rows:
        owner, starts_at, ends_at = (tenant_id, key_id), _in_utc(starts_at), _in_utc(ends_at)
        inside = [(owner, moment) for moment in moments.get(owner, ()) if starts_at <= moment < ends_at]
        found.add(Balance(counters[0], "tenant" if key_id is None else "key", ends_at, *counters[1:]), inside)
    return found


@lru_cache(maxsize=256)
def _select_periods(num_keys: int, num_tenants: int, num_ids: int, locks: bool) -> str:
    """Its parameters: keys, tenants, latest and earliest moment, ids."""
    return (
        f"SELECT {', '.join(COLUMNS)} FROM {PERIODS} WHERE (key_id IN {_places(num_keys)}"
        f" OR (key_id IS NULL AND tenant_id IN {_places(num_tenants)})) AND starts_at <= %s AND ends_at > %s"
        + (f" OR id IN {_places(num_ids)}" if num_ids else "")
        + f" ORDER BY id{' FOR NO KEY UPDATE' if locks else ''}"
    )


def _places(number: int) -> str:
    """The right side of IN; of nothing, NULL, which nothing equals."""
    return f"({', '.join(['%s'] * number) or 'NULL'})"


def _in_utc(moment: datetime) -> datetime:
    """SQLite keeps moments in UTC without saying so."""
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


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
    ends = _last_ends(missing, max(moment for _, moment in missing))
    rows = []
    for (owner, moment), anchor_day in missing.items():
        starts_at, ends_at = periods.next_period(anchor_day, moment, ends.get(owner))
        rows.append(QuotaPeriod(tenant_id=owner[0], key_id=owner[1], starts_at=starts_at, ends_at=ends_at))
    QuotaPeriod.objects.bulk_create(rows, ignore_conflicts=True)


def _last_ends(missing: Iterable[Moment], latest: datetime) -> dict[OwnerId, datetime]:
    """When the last period of each of these owners ended, of those that had by then."""
    ended = QuotaPeriod.objects.filter(_of_owners(owner for owner, _ in missing), ends_at__lte=latest).order_by()
    rows = ended.values_list("tenant_id", "key_id").annotate(end=Max("ends_at"))
    return {(tenant_id, key_id): end for tenant_id, key_id, end in rows}


def move(movements: dict[int, Movement]) -> None:
    """Adds to the counters of many periods in one conditional UPDATE. Raises CountersMoved where a limit forbids it."""
    if not movements:
        return
    values: list[int | None] = []
    for period_id, movement in sorted(movements.items()):
        values += (period_id, *_counters(movement), movement.token_limit, movement.request_limit)
    with connection.cursor() as cursor:
        cursor.execute(_update_periods(len(movements)), values)
        if cursor.rowcount != len(movements):
            raise CountersMoved(f"{cursor.rowcount} of {len(movements)} periods had the counters that were read")


_counters = attrgetter(*COUNTERS)


@lru_cache(maxsize=256)
def _update_periods(number: int) -> str:
    """For each period: its id, the movements of COUNTERS, token limit and request limit."""
    casts = ", ".join(["CAST(%s AS BIGINT)"] * (len(COUNTERS) + 3))
    adds = ", ".join(f"{name} = p.{name} + v.column{place}" for place, name in enumerate(COUNTERS, start=2))
    token_limit, request_limit = len(COUNTERS) + 2, len(COUNTERS) + 3
    return f"""
        UPDATE {PERIODS} AS p SET {adds} FROM (VALUES {", ".join([f"({casts})"] * number)}) AS v
        WHERE p.id = v.column1
        AND (v.column{token_limit} IS NULL
             OR p.used_tokens + p.reserved_tokens + v.column2 + v.column3 <= v.column{token_limit})
        AND (v.column{request_limit} IS NULL
             OR p.used_requests + p.reserved_requests + v.column4 + v.column5 <= v.column{request_limit})
    """


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
    parameters = [*chain.from_iterable((request_id, states[request_id]) for request_id in ids), Reservation.State.OPEN]
    with connection.cursor() as cursor:
        cursor.execute(_update_reservations(len(ids)), parameters)
        return {row[0]: Closed(*row) for row in cursor.fetchall()}


@lru_cache(maxsize=256)
def _update_reservations(number: int) -> str:
    """For each reservation its id and new state, then the state that they must have."""
    return f"""
        UPDATE {RESERVATIONS} SET state = v.column2 FROM (VALUES {", ".join(["(%s, %s)"] * number)}) AS v
        WHERE request_id = v.column1 AND state = %s
        RETURNING request_id, tokens, tenant_period_id, key_period_id
    """


def write(reservations: list[Reservation], entries: list[LedgerEntry]) -> None:
    insert(Reservation, reservations)
    insert(LedgerEntry, entries)
    add_to_days(entries)


def day_of(entry: LedgerEntry) -> tuple[Any, ...]:
    """The names of the row of the days' sums that an entry adds to."""
    day = entry.created_at.astimezone(UTC).date()
    return (day, entry.tenant_period_id, entry.key_period_id, entry.model, entry.adapters, entry.operation)


def day_counters(entry: LedgerEntry) -> tuple[int, ...]:
    """What it adds there, in the order of DAY_COUNTERS."""
    return (
        entry.used_requests,
        entry.used_tokens,
        entry.prompt_tokens,
        entry.cached_tokens,
        entry.completion_tokens,
        entry.cost_nanos,
    )


def add_to_days(entries: Iterable[LedgerEntry]) -> None:
    """Adds what was used to the days' sums, one statement for all. Their periods must be locked: that is the order in
    which two transactions meet here, so none can wait for the other in a circle."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for entry in entries:
        if entry.kind not in (LedgerEntry.Kind.SETTLE, LedgerEntry.Kind.ADJUST):
            continue
        total = sums.setdefault(day_of(entry), [0] * len(DAY_COUNTERS))
        for place, number in enumerate(day_counters(entry)):
            total[place] += number
    for has_key in (True, False):
        rows = sorted((names, total) for names, total in sums.items() if (names[2] is not None) == has_key)
        for start in range(0, len(rows), ROWS_PER_STATEMENT):
            _upsert(rows[start : start + ROWS_PER_STATEMENT], has_key)


def _upsert(rows: Sequence[tuple[tuple[Any, ...], list[int]]], has_key: bool) -> None:
    parameters: list[Any] = []
    for (day, *names), total in rows:
        parameters += (connection.ops.adapt_datefield_value(day), *names, *total)
    with connection.cursor() as cursor:
        cursor.execute(_upsert_days(len(rows), has_key), parameters)


@lru_cache(maxsize=256)
def _upsert_days(number: int, has_key: bool) -> str:
    """For each row its DAY_NAMES and DAY_COUNTERS. Tenant and key are those of the periods.

    WHERE TRUE: without it SQLite would take ON CONFLICT for a condition of the join.
    """
    names, counters = len(DAY_NAMES), len(DAY_COUNTERS)
    row = ", ".join(
        ["%s", "CAST(%s AS BIGINT)", "CAST(%s AS BIGINT)", *["%s"] * (names - 3), *["CAST(%s AS BIGINT)"] * counters]
    )
    columns = ", ".join(f"v.column{place}" for place in range(1, names + counters + 1))
    same = [name for name in DAY_NAMES if has_key or name != "key_period_id"]
    sums = ", ".join(f"{name} = {DAYS}.{name} + excluded.{name}" for name in DAY_COUNTERS)
    return f"""
        INSERT INTO {DAYS} ({", ".join(DAY_NAMES)}, {", ".join(DAY_COUNTERS)}, tenant_id, key_id)
        SELECT {columns}, t.tenant_id, k.key_id
        FROM (VALUES {", ".join([f"({row})"] * number)}) AS v
        JOIN {PERIODS} AS t ON t.id = v.column2 LEFT JOIN {PERIODS} AS k ON k.id = v.column3
        WHERE TRUE
        ON CONFLICT ({", ".join(same)}) WHERE key_period_id IS {"NOT NULL" if has_key else "NULL"}
        DO UPDATE SET {sums}
    """


def insert(model: type[models.Model], rows: Sequence[models.Model], *, ignore_conflicts: bool = False) -> None:
    """What `bulk_create` does, without compiling the same statement for each group; rows do not learn their ids.

    With ignore_conflicts rows that are there already are left as they are.
    """
    form = _form(model)
    times, adapt = form.times, connection.ops.adapt_datetimefield_value
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        part = rows[start : start + ROWS_PER_STATEMENT]
        parameters: list[Any] = []
        for row in part:
            values = list(form.values(row))
            for place in times:
                values[place] = adapt(values[place])
            for place, field in form.converted:
                values[place] = field.get_db_prep_save(values[place], connection)
            parameters += values
        with connection.cursor() as cursor:
            cursor.execute(_insert_statement(form, len(part), ignore_conflicts), parameters)


@dataclass(frozen=True, slots=True)
class _Form:
    """How rows of a table are written: their columns but for an id that the database makes, and which are no plain
    values: times, by far the most of them, and what its field converts, such as JSON."""

    table: str
    columns: tuple[str, ...]
    values: Callable[[models.Model], tuple[Any, ...]]
    times: tuple[int, ...]
    converted: tuple[tuple[int, models.Field[Any, Any]], ...]


@cache
def _form(model: type[models.Model]) -> _Form:
    fields = [field for field in model._meta.concrete_fields if not isinstance(field, models.AutoField)]
    columns = tuple(str(field.column) for field in fields)
    times = tuple(place for place, field in enumerate(fields) if isinstance(field, models.DateTimeField))
    converted = tuple((place, field) for place, field in enumerate(fields) if not isinstance(field, PLAIN_FIELDS))
    return _Form(model._meta.db_table, columns, attrgetter(*(field.attname for field in fields)), times, converted)


@lru_cache(maxsize=512)
def _insert_statement(form: _Form, number: int, ignore_conflicts: bool) -> str:
    row = f"({', '.join(['%s'] * len(form.columns))})"
    names = ", ".join(f'"{name}"' for name in form.columns)
    end = " ON CONFLICT DO NOTHING" if ignore_conflicts else ""
    return f"INSERT INTO {form.table} ({names}) VALUES {', '.join([row] * number)}{end}"
