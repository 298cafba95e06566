"""What admission asks of the database and of Redis does not grow with what is in the tables."""

from __future__ import annotations

from typing import Any

import django_ratelimit.core
import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.identity import known_keys
from accounts.identity.authentication import authenticate_credentials
from accounts.ledger import quotas
from accounts.limits import throttling
from accounts.models import APIKey, LimitRule, Price
from tests.accounts.quota_cast import reserve_order, settle_order
from tests.conftest import Cast
from tests.round_trips import Trips

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def fill(cast: Cast, number: int) -> None:
    """So many keys of Bob's more, one in ten of them with a rule."""
    keys, rules = APIKey._meta.db_table, LimitRule._meta.db_table
    now, first = connection.ops.adapt_datetimefield_value(timezone.now()), cast.bob.key.pk
    copied = ("tenant_id", "name", "secret_hash", "pepper_id", "scopes", "limit_overrides", "created_at")
    names = ", ".join(copied)
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {keys} (public_id, {names}) "
            f"SELECT CAST(n.i AS TEXT), {names} FROM {keys}, "
            "(WITH RECURSIVE c(i) AS (SELECT %s UNION ALL SELECT i + 1 FROM c WHERE i < %s) SELECT i FROM c) AS n "
            "WHERE id = %s",
            [number * 10, number * 11 - 1, first],
        )
        assert cursor.rowcount == number
        cursor.execute(
            f'INSERT INTO {rules} (key_id, "limit", value, starts_at, created_at, recurrence, reason) '
            f"SELECT id, 'max_output', 5, %s, %s, 'always', '' FROM {keys} WHERE id > %s AND id %% 10 = 0",
            [now, now, first],
        )


def cost_of_a_request(cast: Cast, trips: Trips) -> tuple[int, int]:
    """(queries, round trips to Redis) from the key to the settlement, with nothing in memory."""
    known_keys.CACHE.forget()
    now = timezone.now()
    before = trips.number
    with CaptureQueriesContext(connection) as queries:
        principal = authenticate_credentials(cast.alice.headers)
        throttling.count_request(principal, None)
        order = reserve_order(
            cast.alice, now=now, tenant_limits=principal.tenant_limits, key_limits=principal.key_limits
        )
        throttling.enter(principal, order.request_id, tokens=50, ttl_seconds=60, stream=True)
        quotas.reserve(order)
        quotas.settle(settle_order(order.request_id, now=now))
        throttling.leave(principal.tenant_id, principal.quota_key_id, order.request_id, unused_tokens=20)
    return len(queries), trips.number - before


def test_a_request_costs_the_same_among_ten_and_among_a_hundred_thousand_keys(
    cast: Cast, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_keys.WATCHER.stop()
    monkeypatch.setattr(known_keys.WATCHER, "ensure_started", lambda: None)  # its reading would be counted
    monkeypatch.setattr(django_ratelimit.core.time, "time", lambda: 1_800_000_000.0)  # no window ends meanwhile
    trips = Trips(monkeypatch)
    tenant = cast.alice.tenant
    tenant.limit_overrides = {"requests_per_minute": 100, "tokens_per_minute": 10**6, "concurrent_streams": 9}
    tenant.save()
    Price.objects.create(model="", input_per_million=1, output_per_million=1)
    for _ in range(3):
        cost_of_a_request(cast, trips)  # opens periods and connections, loads the scripts
    costs = []
    for number in (10, 1_000, 100_000):
        fill(cast, number)
        costs.append(cost_of_a_request(cast, trips))
    assert costs[0] == costs[1] == costs[2]
    queries, round_trips = costs[0]
    assert queries <= 20 and round_trips <= 6, costs
