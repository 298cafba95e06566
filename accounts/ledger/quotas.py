"""The only writer of quota periods, reservations and the ledger: reserve before, settle after, exact to the token.

Blocking; called by admission (web), settlement (worker) and the sweep. All threads of a process share one group commit,
so 64 callers are a few transactions and never wait for each other by polling. Counters move by conditional UPDATE.
Inside a caller's own transaction an order is written at once, in it.

A group, in this order: reservations that end, then orders in order of arrival, tenant's and key's period together.
Locks are taken in the same order everywhere: reservations by id, then periods by id.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice

from django.db import IntegrityError, InterfaceError, OperationalError, connection, models, transaction

from accounts.ledger import prices, quota_rows
from accounts.ledger.allotment import Balance, ChargeOrder, Held, Order, ReserveOrder, decide, share_out, sum_of
from accounts.ledger.group_commit import GroupCommit
from accounts.ledger.quota_rows import Balances, Closed, CountersMoved, Movement, OwnerId
from accounts.ledger.turn import turn
from accounts.ledger.usage import usage
from accounts.models import LedgerEntry, Reservation, announce_tenant
from accounts.trail.refusals import Refusal

__all__ = [
    "ChargeOrder",
    "Held",
    "ReleaseOrder",
    "ReserveOrder",
    "SettleOrder",
    "adjust",
    "balances",
    "charge_request",
    "cost_of",
    "give_back",
    "prolong",
    "release",
    "release_many",
    "reserve",
    "reserve_many",
    "reserve_together",
    "settle",
    "settle_many",
    "sweep_expired",
    "usage",
]

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.02, 0.1, 0.3)
GIVE_UP_SECONDS = 5.0
SWEEP_SIZE = 200
GIVEN_BACK = ("used_tokens", "used_requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")


@dataclass(frozen=True, slots=True, kw_only=True)
class SettleOrder:
    """Ends a reservation by charging what was really computed; the rest is free again."""

    request_id: str
    charged_tokens: int
    """Prompt and generated tokens; never more than was reserved."""
    prompt_tokens: int
    cached_tokens: int = 0
    """Of the prompt, those that were in the prompt cache."""
    completion_tokens: int
    model: str = ""
    adapters: str = ""
    """Their names, with + between them."""
    operation: str = "completions"
    now: datetime
    reason: str = ""
    records: tuple[models.Model, ...] = ()
    """Rows of other rooms to insert in the same transaction; those that exist already are left as they are."""
    uncharged_records: Callable[[], tuple[models.Model, ...]] = tuple
    """In their place where the reservation was ended before, and nothing is charged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseOrder:
    """Ends a reservation without a charge."""

    request_id: str
    reason: str
    now: datetime
    model: str = ""
    records: tuple[models.Model, ...] = ()


CloseOrder = SettleOrder | ReleaseOrder


def reserve(order: ReserveOrder) -> Held:
    """Holds prompt and output bound on key and tenant. Idempotent by request id while the reservation is open.

    Raises Refusal: quota_exhausted (final until the period ends), quota_reserved (running requests hold the rest),
    service_unavailable (the database did not take it).
    """
    result = reserve_many([order])[0]
    if isinstance(result, Refusal):
        raise result
    return result


def reserve_many(orders: Sequence[Order]) -> list[Held | Refusal]:
    """One transaction, one answer per order: a refused one does not touch its neighbours."""
    return _submit(_Work(orders=tuple(orders))).held if orders else []


def reserve_together(orders: Sequence[Order]) -> list[Held]:
    """The orders of one request, of one key at one moment: each is granted at least a part, or nothing is held for any.

    Output tokens that the quota does not have for all of them are shared out evenly. Raises Refusal as `reserve`.
    """
    answers = _submit(_Work(orders=tuple(orders), is_together=True)).held
    held = [answer for answer in answers if isinstance(answer, Held)]
    for answer in answers:
        if isinstance(answer, Refusal):
            raise answer
    return held


def prolong(request_ids: Sequence[str], expires_at: datetime) -> int:
    """The sweep leaves these reservations alone until then; how many of them are open. One query."""
    rows = Reservation.objects.filter(pk__in=request_ids, state=Reservation.State.OPEN)
    return rows.update(expires_at=expires_at)


def balances(order: ReserveOrder) -> tuple[Balance, Balance]:
    """What `reserve` would decide on now (allotment.decide): tenant's and key's. Nothing is locked or held."""
    return quota_rows.peek(order)


def charge_request(order: ChargeOrder) -> None:
    """Counts one request that costs no tokens. Raises Refusal as `reserve`. Idempotent by request id."""
    result = reserve_many([order])[0]
    if isinstance(result, Refusal):
        raise result


def settle(order: SettleOrder) -> bool:
    """Charges; False where the reservation was settled or released before. Idempotent. Raises as settle_many."""
    return settle_many([order])[0]


def release(request_id: str, reason: str, now: datetime) -> bool:
    """Gives everything back; False where the reservation was settled or released before. Raises as settle_many."""
    return settle_many([ReleaseOrder(request_id=request_id, reason=reason, now=now)])[0]


def release_many(orders: Sequence[ReleaseOrder]) -> list[bool]:
    return settle_many(orders)


def settle_many(orders: Sequence[CloseOrder]) -> list[bool]:
    """Ends many reservations in one transaction. Raises Refusal service_unavailable where the database did not take it:
    nothing has happened then."""
    return _submit(_Work(closes=tuple(orders))).closed if orders else []


def cost_of(request_id: str) -> str | None:
    """In the currency; None while it is not settled, or was free. One query."""
    entries = LedgerEntry.objects.of_requests([request_id]).filter(kind=LedgerEntry.Kind.SETTLE)
    nanos = entries.values_list("cost_nanos", flat=True).first()
    return None if nanos is None else prices.money(nanos)


def held_for(request_id: str) -> int | None:
    """Tokens that its reservation held at first; None where there was none, or the ledger is purged. One query."""
    entries = LedgerEntry.objects.of_requests([request_id]).filter(kind=LedgerEntry.Kind.RESERVE)
    return entries.values_list("reserved_tokens", flat=True).first()


def sweep_expired(now: datetime, ended: Callable[[Sequence[str]], Collection[str]] = lambda ids: ()) -> int:
    """Releases reservations that outlived their time; the number of them. Two sweeps at once are harmless.

    ended: of some ids, those of requests that have ended and wait to be settled: they are charged, however late.
    """
    total, spared = 0, set[str]()
    while True:
        expired = Reservation.objects.filter(state=Reservation.State.OPEN, expires_at__lte=now).order_by("expires_at")
        ids = list(expired.exclude(pk__in=spared).values_list("request_id", flat=True)[:SWEEP_SIZE])
        still = set(ended(ids))
        spared |= still
        lost = [each for each in ids if each not in still]
        closed = release_many([ReleaseOrder(request_id=each, reason="expired", now=now) for each in lost])
        total += sum(closed)
        if len(ids) < SWEEP_SIZE or (lost and not any(closed)):
            return total


def adjust(
    *,
    request_id: str,
    tenant_id: int,
    key_id: int | None = None,
    anchor_day: int,
    tokens: int = 0,
    requests: int = 0,
    cost_nanos: int = 0,
    reason: str,
    now: datetime,
) -> None:
    """Corrects the current period by hand, with a reason in the ledger; negative numbers give back.

    Moves the tenant's period, and the (quota) key's if one is named. Raises ValueError where a counter would fall below
    zero (what is owed may: that is a credit), or without a reason. `request_id` names the correction in the ledger.
    """
    if not reason.strip():
        raise ValueError("Say why: the reason stands in the ledger.")
    owners: list[OwnerId] = [(tenant_id, None)]
    if key_id is not None:
        owners.append((tenant_id, key_id))
    try:
        with transaction.atomic():
            balances = quota_rows.read_balances({(owner, now): anchor_day for owner in owners})
            ids = [balances.at(owner, now).id for owner in owners]
            movement = Movement(used_tokens=tokens, used_requests=requests, cost_nanos=cost_nanos)
            quota_rows.move(dict.fromkeys(ids, movement))
            entry = LedgerEntry.objects.create(
                kind=LedgerEntry.Kind.ADJUST,
                request_id=request_id,
                tenant_period_id=ids[0],
                key_period_id=ids[1] if key_id is not None else None,
                used_tokens=tokens,
                used_requests=requests,
                cost_nanos=cost_nanos,
                reason=reason[:200],
                created_at=now,
            )
            quota_rows.add_to_days([entry])
            announce_tenant(tenant_id)
    except IntegrityError as error:
        raise ValueError("An adjustment cannot take back more than was used in this period.") from error


def give_back(charged: LedgerEntry, *, request_id: str, reason: str, now: datetime) -> None:
    """Takes a SETTLE entry back, tokens, request and cost, in the periods that it was charged to.

    It counts on the day on which it is given back: a month that is over may have its statement already. `request_id`
    names the correction in the ledger. Raises ValueError where a counter would fall below zero.
    """
    entry = LedgerEntry(
        kind=LedgerEntry.Kind.ADJUST,
        request_id=request_id,
        tenant_period_id=charged.tenant_period_id,
        key_period_id=charged.key_period_id,
        model=charged.model,
        adapters=charged.adapters,
        operation=charged.operation,
        reason=reason[:200],
        created_at=now,
        **{name: -getattr(charged, name) for name in GIVEN_BACK},
    )
    movement = Movement()
    movement.add(entry)
    ids = [each for each in (charged.tenant_period_id, charged.key_period_id) if each is not None]
    try:
        with transaction.atomic():
            quota_rows.lock_periods(ids)
            quota_rows.move(dict.fromkeys(ids, movement))
            entry.save(force_insert=True)
            quota_rows.add_to_days([entry])
            announce_tenant(charged.tenant_period.tenant_id)
    except IntegrityError as error:
        raise ValueError("More than is used in this period cannot be given back.") from error


# Groups


@dataclass(frozen=True, slots=True)
class _Work:
    """What one caller wants done, in one transaction with the others of its group."""

    closes: tuple[CloseOrder, ...] = ()
    orders: tuple[Order, ...] = ()
    is_together: bool = False
    """All of the orders, or none."""


@dataclass(slots=True)
class _Done:
    closed: list[bool] = field(default_factory=list)
    held: list[Held | Refusal] = field(default_factory=list)


def _submit(work: _Work) -> _Done:
    if connection.in_atomic_block:
        return _alone(work)
    return _GROUPS.submit(work)


def _commit_group(works: Sequence[_Work]) -> Sequence[_Done | Exception]:
    """One transaction; where the group as a whole fails, one each, so that a bad order cannot harm its neighbours."""
    try:
        return _with_retries(lambda: _transaction(works))
    except Refusal:
        raise
    except Exception as error:  # each caller gets the error of its own work
        if len(works) > 1:
            logger.warning("a group of %d quota orders failed and is written one by one", len(works), exc_info=error)
    return [_outcome(work) for work in works]


def _outcome(work: _Work) -> _Done | Exception:
    try:
        return _alone(work)
    except Exception as error:  # noqa: BLE001 - raised in the thread of the caller
        return error


def _alone(work: _Work) -> _Done:
    try:
        return _with_retries(lambda: _transaction([work]))[0]
    except IntegrityError:
        repeated = _repeated(work)
        if repeated is None:
            raise
        return repeated


def _with_retries(action: Callable[[], list[_Done]]) -> list[_Done]:
    """Tries again what failed for a lock, a deadlock or a lost connection: bounded, then service_unavailable.

    In a caller's transaction nothing can be tried again: the error goes to who can roll it back.
    """
    if connection.in_atomic_block:
        return action()
    started = time.monotonic()
    for pause in (*RETRY_SECONDS, None):
        try:
            with turn():
                return action()
        except (OperationalError, InterfaceError, CountersMoved) as error:
            connection.close_if_unusable_or_obsolete()
            if pause is None or time.monotonic() - started > GIVE_UP_SECONDS:
                logger.error("quota orders were not written", exc_info=error)
                raise Refusal("service_unavailable", "Quotas cannot be written now.", retry_after=1) from error
            time.sleep(pause)
    raise AssertionError("unreachable: the last round returns or raises")


def _transaction(works: Sequence[_Work]) -> list[_Done]:
    """See the module's header for the order. The caller's thread, one transaction (a savepoint in the caller's own)."""
    closes = [order for work in works for order in work.closes]
    orders = [order for work in works for order in work.orders]
    with transaction.atomic():
        book = _Book()
        closed = book.close(closes) if closes else []
        held = book.open(works) if orders else []
        book.write()
        granted = [order for order, answer in zip(orders, held, strict=True) if isinstance(answer, Held)]
        charges = [order for order in granted if isinstance(order, ChargeOrder)]
        records = [row for order in charges for row in order.records]
        for order, is_closed in zip(closes, closed, strict=True):
            if isinstance(order, SettleOrder) and not is_closed:
                records += order.uncharged_records()
            else:
                records += order.records
        _insert_records(records)
    answers, places = iter(closed), iter(held)
    return [_Done(list(islice(answers, len(work.closes))), list(islice(places, len(work.orders)))) for work in works]


class _Book:
    """The movements of one transaction: collected in memory, written once."""

    def __init__(self) -> None:
        self._movements: defaultdict[int, Movement] = defaultdict(Movement)
        self._guards: defaultdict[int, tuple[list[int | None], list[int | None]]] = defaultdict(lambda: ([], []))
        self._reservations: list[Reservation] = []
        self._entries: list[LedgerEntry] = []
        self._is_locked = False

    def close(self, orders: list[CloseOrder]) -> list[bool]:
        """Whether each order ended its reservation; of two for one request the first counts."""
        first: dict[str, int] = {}
        for place, order in enumerate(orders):
            first.setdefault(order.request_id, place)
        states = {each: _state_after(orders[place]) for each, place in first.items()}
        closed = quota_rows.close_reservations(states)
        for request_id, row in closed.items():
            self._end(orders[first[request_id]], row)
        return [order.request_id in closed and first[order.request_id] == place for place, order in enumerate(orders)]

    def open(self, works: Sequence[_Work]) -> list[Held | Refusal]:
        orders = [order for work in works for order in work.orders]
        wanted = {(owner, order.now): order.anchor_day for order in orders for owner in quota_rows.owners(order)}
        balances = quota_rows.read_balances(wanted, self._movements)
        self._is_locked = True
        for period_id, movement in self._movements.items():
            balances.by_id[period_id].add(movement)
        answers: list[Held | Refusal] = []
        for work in works:
            answers += (
                self._decide_together(work.orders, balances)
                if work.is_together and len(work.orders) > 1
                else [self._decide(order, balances) for order in work.orders]
            )
        return answers

    def write(self) -> None:
        for period_id, (token_limits, request_limits) in self._guards.items():
            self._movements[period_id].token_limit = _loosest(token_limits)
            self._movements[period_id].request_limit = _loosest(request_limits)
        if not self._is_locked:
            quota_rows.lock_periods(self._movements)
        quota_rows.move(self._movements)
        quota_rows.write(self._reservations, self._entries)

    def _end(self, order: CloseOrder, row: Closed) -> None:
        entry = LedgerEntry(
            kind=LedgerEntry.Kind.RELEASE,
            request_id=row.request_id,
            tenant_period_id=row.tenant_period_id,
            key_period_id=row.key_period_id,
            reserved_tokens=-row.tokens,
            reserved_requests=-1,
            model=order.model,
            reason=order.reason[:200],
            created_at=order.now,
        )
        if isinstance(order, SettleOrder):
            entry.kind = LedgerEntry.Kind.SETTLE
            entry.used_tokens = _charge(order, row)
            entry.used_requests = 1
            entry.prompt_tokens = order.prompt_tokens
            entry.cached_tokens = order.cached_tokens
            entry.completion_tokens = order.completion_tokens
            entry.adapters, entry.operation = order.adapters[:200], order.operation
            entry.cost_nanos = _cost(entry)
        self._note(entry)

    def _decide_together(self, orders: Sequence[Order], balances: Balances) -> list[Held | Refusal]:
        whole = sum_of(orders)
        tenant, key = (balances.at(owner, whole.now) for owner in quota_rows.owners(whole))
        granted = decide(whole, (tenant, key))
        if isinstance(granted, Refusal):
            return [granted] * len(orders)
        answers = [self._decide(order, balances) for order in share_out(orders, granted.max_tokens)]
        return [
            replace(answer, clamped=isinstance(order, ReserveOrder) and answer.max_tokens < order.max_tokens)
            if isinstance(answer, Held)
            else answer
            for order, answer in zip(orders, answers, strict=True)
        ]

    def _decide(self, order: Order, balances: Balances) -> Held | Refusal:
        tenant, key = (balances.at(owner, order.now) for owner in quota_rows.owners(order))
        answer = decide(order, (tenant, key))
        if isinstance(answer, Refusal):
            return answer
        entry = LedgerEntry(
            kind=LedgerEntry.Kind.RESERVE,
            request_id=order.request_id,
            tenant_period_id=tenant.id,
            key_period_id=key.id,
            reserved_tokens=answer.reserved_tokens,
            reserved_requests=1,
            tenant_limit=order.tenant_limits.monthly_tokens,
            key_limit=order.key_limits.monthly_tokens,
            tenant_request_limit=order.tenant_limits.monthly_requests,
            key_request_limit=order.key_limits.monthly_requests,
            created_at=order.now,
        )
        if isinstance(order, ChargeOrder):
            entry.kind = LedgerEntry.Kind.SETTLE
            entry.reserved_requests, entry.used_requests = 0, 1
            entry.tenant_limit = entry.key_limit = None  # it takes no tokens: their limits do not bind it
            entry.model, entry.reason = order.model, order.reason[:200]
            entry.adapters, entry.operation = order.adapters[:200], order.operation
        else:
            self._reservations.append(
                Reservation(
                    request_id=order.request_id,
                    tenant_period_id=tenant.id,
                    key_period_id=key.id,
                    tokens=answer.reserved_tokens,
                    expires_at=order.expires_at,
                    created_at=order.now,
                )
            )
        for balance, limits in ((tenant, order.tenant_limits), (key, order.key_limits)):
            balance.add(entry)
            if isinstance(order, ReserveOrder):
                self._guards[balance.id][0].append(limits.monthly_tokens)
            self._guards[balance.id][1].append(limits.monthly_requests)
        entry.tenant_committed_after, entry.key_committed_after = tenant.tokens, key.tokens
        entry.tenant_requests_after, entry.key_requests_after = tenant.requests, key.requests
        self._note(entry)
        return answer

    def _note(self, entry: LedgerEntry) -> None:
        self._entries.append(entry)
        for period_id in (entry.tenant_period_id, entry.key_period_id):
            assert period_id is not None
            self._movements[period_id].add(entry)


def _state_after(order: CloseOrder) -> str:
    return Reservation.State.SETTLED if isinstance(order, SettleOrder) else Reservation.State.RELEASED


def _charge(order: SettleOrder, row: Closed) -> int:
    """What was computed, and never more than was promised at most: the excess would be ours."""
    if order.charged_tokens > row.tokens:
        logger.error(
            "request %s computed %d tokens and had reserved %d", order.request_id, order.charged_tokens, row.tokens
        )
    return max(0, min(order.charged_tokens, row.tokens))


def _cost(entry: LedgerEntry) -> int:
    """Of what was charged, by the price of the entry's moment."""
    if not entry.used_tokens:
        return 0
    return prices.cost_nanos(
        entry.model,
        entry.created_at,
        prompt_tokens=entry.prompt_tokens,
        cached_tokens=entry.cached_tokens,
        completion_tokens=entry.completion_tokens,
    )


def _loosest(limits: list[int | None]) -> int | None:
    """Each grant was checked against its own limit; the UPDATE is guarded by the widest of the group."""
    bounds = [limit for limit in limits if limit is not None]
    return max(bounds) if bounds and len(bounds) == len(limits) else None


def _insert_records(rows: Sequence[models.Model]) -> None:
    by_model: defaultdict[type[models.Model], list[models.Model]] = defaultdict(list)
    for row in rows:
        by_model[type(row)].append(row)
    for model, records in by_model.items():
        quota_rows.insert(model, records, ignore_conflicts=True)


def _repeated(work: _Work) -> _Done | None:
    """The answer to orders that were written before, as by a commit whose reply was lost; None if they were not."""
    if work.closes or connection.in_atomic_block:
        return None
    held = [_held_before(order) for order in work.orders]
    found = [each for each in held if each is not None]
    return _Done(held=[*found]) if len(found) == len(held) else None


def _held_before(order: Order) -> Held | None:
    if isinstance(order, ChargeOrder):
        entries = LedgerEntry.objects.of_requests([order.request_id]).filter(kind=LedgerEntry.Kind.SETTLE)
        charged = entries.filter(tenant_period__tenant_id=order.tenant_id, reserved_requests=0).exists()
        return Held(order.request_id, 0, False, 0) if charged else None
    rows = Reservation.objects.filter(pk=order.request_id, state=Reservation.State.OPEN)
    tokens = rows.filter(tenant_period__tenant_id=order.tenant_id).values_list("tokens", flat=True).first()
    if tokens is None:
        return None
    bound = tokens - order.prompt_tokens
    return Held(order.request_id, bound, bound < order.max_tokens, tokens)


_GROUPS: GroupCommit[_Work, _Done] = GroupCommit(_commit_group)
