"""What keys did: periods, reservations, the ledger, receipts, refusals, days' sums, statements and alerts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta

from accounts.ledger import day_totals
from accounts.ledger.statements import next_month
from accounts.models import (
    DayTotal,
    DayUsage,
    LedgerEntry,
    QuotaAlert,
    QuotaPeriod,
    RefusedRequest,
    Reservation,
    Statement,
)
from inference.bench.lists.bulk import Writer
from inference.bench.lists.sizes import Sizes
from inference.models import Receipt

Owned = Sequence[tuple[int, int]]
"""(key, tenant)."""
WINDOW = timedelta(days=60)
OF_TODAY = 0.4
"""Part of the receipts and refusals that are younger than a day: more than the dashboard counts."""
CODES = ("rate_limited", "quota_exceeded", "invalid_api_key", "model_not_found", "queue_full")
NUM_MODELS = 3
ACTIVE = 10
"""One key in so many has days of usage."""


def write(writer: Writer, sizes: Sizes, keys: Owned, now: datetime) -> None:
    of_tenants, of_keys = _periods(writer, sizes, keys, now)
    ids = [writer.request_id() for _ in range(sizes.ledger // 2)]
    _ledger(writer, sizes, keys, ids, of_tenants, of_keys, now)
    writer.write(
        Reservation,
        sizes.reservations,
        lambda i: Reservation(
            request_id=ids[-1 - i],
            tenant_period_id=of_tenants[keys[i % len(keys)][1]],
            key_period_id=of_keys[i % len(keys)],
            tokens=500,
            state="open" if i < 20 else "released" if i % 500 == 0 else "settled",
            created_at=now - timedelta(seconds=i),
            expires_at=now + timedelta(hours=1) - timedelta(seconds=i),
        ),
    )
    writer.write(Receipt, sizes.receipts, lambda i: _receipt(writer, i, sizes.receipts, keys, ids, now))
    writer.write(RefusedRequest, sizes.refusals, lambda i: _refusal(writer, i, sizes.refusals, keys, now))
    _days(writer, sizes, keys, of_tenants, of_keys, now)
    _months(writer, sizes, of_tenants, now)


def _moment(number: int, count: int, now: datetime) -> datetime:
    """Ascending: of the last WINDOW, and OF_TODAY of them of the last day."""
    share = number / count
    if share < 1 - OF_TODAY:
        return now - WINDOW + (WINDOW - timedelta(days=1)) * (share / (1 - OF_TODAY))
    return now - timedelta(days=1) * ((1 - share) / OF_TODAY)


# Periods and the ledger


def _periods(writer: Writer, sizes: Sizes, keys: Owned, now: datetime) -> tuple[dict[int, int], list[int]]:
    """Those of this month: by tenant, and one for each key in its order."""
    tenants = sorted({tenant for _, tenant in keys})
    this = datetime.combine(now.date().replace(day=1), time(), UTC)
    starts = [this]
    for _ in range(sizes.months - 1):
        starts.insert(0, (starts[0] - timedelta(days=1)).replace(day=1))

    def of_tenant(number: int) -> QuotaPeriod:
        start = starts[number // len(tenants)]
        return _period(tenants[number % len(tenants)], None, start, number * 131)

    ids = writer.write(QuotaPeriod, len(tenants) * len(starts), of_tenant)
    of_tenants = dict(zip(tenants, ids[-len(tenants) :], strict=True))
    of_keys = writer.write(QuotaPeriod, len(keys), lambda i: _period(keys[i][1], keys[i][0], this, i))
    return of_tenants, of_keys


def _period(tenant: int, key: int | None, start: datetime, used: int) -> QuotaPeriod:
    end = datetime.combine(next_month(start.date()), time(), UTC)
    return QuotaPeriod(
        tenant_id=tenant, key_id=key, starts_at=start, ends_at=end, used_tokens=used, used_requests=used // 100
    )


def _ledger(
    writer: Writer,
    sizes: Sizes,
    keys: Owned,
    ids: Sequence[str],
    of_tenants: dict[int, int],
    of_keys: Sequence[int],
    now: datetime,
) -> None:
    """Each request reserves and settles; a few are released, next to none are corrections by hand."""

    def entry(number: int) -> LedgerEntry:
        request, is_end = divmod(number, 2)
        place = (request * 7919) % len(keys)
        row = LedgerEntry(
            kind="reserve",
            request_id=ids[request],
            tenant_period_id=of_tenants[keys[place][1]],
            key_period_id=of_keys[place],
            reserved_tokens=500,
            reserved_requests=1,
            created_at=_moment(number, sizes.ledger, now),
        )
        if is_end:
            row.kind = "adjust" if request % 20_000 == 9 else "release" if request % 1000 == 7 else "settle"
            row.reserved_tokens, row.reserved_requests = -500, -1
            row.used_tokens, row.used_requests, row.model = 350, 1, f"model-{request % NUM_MODELS}"
        return row

    writer.write(LedgerEntry, sizes.ledger, entry)


# Requests


def _receipt(writer: Writer, number: int, count: int, keys: Owned, ids: Sequence[str], now: datetime) -> Receipt:
    key, tenant = keys[(number * 7919) % len(keys)]
    moment = _moment(number, count, now)
    status = "failed" if number % 500 == 0 else "cancelled" if number % 50 == 1 else "completed"
    return Receipt(
        request_id=ids[len(ids) - count + number],
        tenant_id=tenant,
        key_id=key,
        model=f"model-{number % NUM_MODELS}",
        model_digest="0" * 64,
        adapters=[["formal", 1.0]],
        route="/v1/chat/completions",
        status=status,
        finish_reason="error" if status == "failed" else "stop",
        error_code="worker_lost" if status == "failed" else "",
        prompt_tokens=100,
        completion_tokens=50 + number % 100,
        charged_tokens=150,
        queue_seconds=0.01 * (number % 10),
        prefill_seconds=0.1,
        decode_seconds=1.0,
        total_seconds=1.2,
        created_at=moment,
        finished_at=moment,
    )


def _refusal(writer: Writer, number: int, count: int, keys: Owned, now: datetime) -> RefusedRequest:
    key, tenant = keys[(number * 104_729) % len(keys)]
    return RefusedRequest(
        request_id=writer.request_id(),
        tenant_id=tenant,
        key_id=key,
        route="/v1/chat/completions",
        code=CODES[-1] if number % 1000 == 0 else CODES[number % (len(CODES) - 1)],
        limit="requests_per_minute",
        bound_to="tenant",
        value=60,
        message="Too many requests a minute.",
        created_at=_moment(number, count, now),
    )


# Sums


def _days(
    writer: Writer, sizes: Sizes, keys: Owned, of_tenants: dict[int, int], of_keys: Sequence[int], now: datetime
) -> None:
    active = max(1, len(keys) // ACTIVE)

    def day(number: int) -> DayUsage:
        back, place = divmod(number, active)
        key, tenant = keys[place * ACTIVE]
        return DayUsage(
            day=now.date() - timedelta(days=back),
            tenant_id=tenant,
            key_id=key,
            tenant_period_id=of_tenants[tenant],
            key_period_id=of_keys[place * ACTIVE],
            model=f"model-{place % NUM_MODELS}",
            adapters="formal" if place % 4 == 0 else "",
            operation="completions",
            requests=10,
            used_tokens=1000 + place % 100,
            prompt_tokens=600,
            completion_tokens=400,
            cost_nanos=10**6,
        )

    writer.write(DayUsage, min(sizes.days, active * 90), day)
    DayTotal.objects.all().delete()  # of fewer rows, if there were some
    day_totals.close_due(now, most=day_totals.KEPT_DAYS)  # as the housekeeping has done by then


def _months(writer: Writer, sizes: Sizes, of_tenants: dict[int, int], now: datetime) -> None:
    tenants = list(of_tenants)
    last = (now.date().replace(day=1) - timedelta(days=1)).replace(day=1)
    line = {"model": "model-0", "key": "0", "adapters": "", "operation": "completions", "requests": 1}
    tokens = {"used_tokens": 1, "prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 0, "cost_nanos": 1}
    writer.write(
        Statement,
        len(tenants),
        lambda i: Statement(
            tenant_id=tenants[i],
            month=last,
            currency="EUR",
            requests=10,
            used_tokens=1000,
            cost_nanos=10**6,
            lines=[{**line, **tokens}] * 20,
            created_at=now,
        ),
    )
    writer.write(
        QuotaAlert,
        len(tenants),
        lambda i: QuotaAlert(
            period_id=of_tenants[tenants[i]],
            counts="tokens",
            percent=(50, 80, 100)[i % 3],
            used=1000,
            quota=1000,
            created_at=now - timedelta(minutes=i),
        ),
    )
