"""Orders of the cast, and what the ledger must say after any of them."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from accounts.ledger import quotas
from accounts.ledger.audit import audit
from accounts.ledger.quotas import ChargeOrder, ReserveOrder, SettleOrder
from accounts.limits.precedence import Limits
from accounts.models import LedgerEntry, QuotaPeriod
from tests.conftest import Customer

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


def reserve_order(who: Customer, prompt: int = 10, output: int = 40, **more: Any) -> ReserveOrder:
    now = more.pop("now", NOW)
    values: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "tenant_id": who.tenant.pk,
        "key_id": who.key.pk,
        "anchor_day": who.tenant.quota_anchor_day,
        "tenant_limits": Limits(monthly_tokens=1000),
        "key_limits": Limits(),
        "now": now,
        "expires_at": now + timedelta(minutes=10),
    }
    return ReserveOrder(prompt_tokens=prompt, max_tokens=output, **{**values, **more})


def charge_order(who: Customer, **more: Any) -> ChargeOrder:
    values: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "tenant_id": who.tenant.pk,
        "key_id": who.key.pk,
        "anchor_day": 1,
        "tenant_limits": Limits(),
        "key_limits": Limits(),
        "now": NOW,
    }
    return ChargeOrder(**{**values, **more})


def settle_order(request_id: str, prompt: int = 10, output: int = 20, **more: Any) -> SettleOrder:
    values: dict[str, Any] = {"charged_tokens": prompt + output, "model": "small", "now": NOW}
    return SettleOrder(request_id=request_id, prompt_tokens=prompt, completion_tokens=output, **{**values, **more})


def reserved(who: Customer, prompt: int = 10, output: int = 40, **more: Any) -> str:
    order = reserve_order(who, prompt, output, **more)
    quotas.reserve(order)
    return order.request_id


def tenant_period(who: Customer, now: datetime = NOW) -> QuotaPeriod:
    return QuotaPeriod.objects.get(tenant=who.tenant, key=None, starts_at__lte=now, ends_at__gt=now)


def key_period(who: Customer, now: datetime = NOW) -> QuotaPeriod:
    return QuotaPeriod.objects.get(key=who.key, starts_at__lte=now, ends_at__gt=now)


def counters(period: QuotaPeriod) -> tuple[int, int, int, int]:
    """(tokens used, reserved, requests used, reserved)"""
    return period.used_tokens, period.reserved_tokens, period.used_requests, period.reserved_requests


def kinds(request_id: str) -> list[str]:
    return list(LedgerEntry.objects.filter(request_id=request_id).order_by("id").values_list("kind", flat=True))


def assert_proven() -> None:
    assert audit().problems == []
