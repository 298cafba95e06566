"""What a tenant reads about itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from accounts.identity.key_rows import principal_of
from accounts.ledger import quotas
from accounts.ledger.usage import tenant_usage, usage
from accounts.limits.precedence import Limits
from accounts.models import Tenant
from tests.accounts.quota_cast import NOW, charge_order, reserved, settle_order
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def test_before_the_first_request_nothing_is_used(cast: Cast) -> None:
    facts = usage(principal_of(cast.alice.key), NOW)
    assert (facts["quota_used"], facts["quota_monthly"], facts["quota_reset_at"]) == (
        0,
        10_000_000,
        "2026-12-01T00:00:00Z",
    )
    assert facts["first_request_at"] is facts["last_request_at"] is None
    assert facts["total_requests"] == facts["total_prompt_tokens"] == 0


def test_usage_is_the_union_of_the_names_that_clients_expect(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice), 10, 7))
    quotas.charge_request(charge_order(cast.alice))
    reserved(cast.alice)
    facts = usage(principal_of(cast.alice.key), NOW)
    expected = {
        "role": "standard",
        "quota_used": 17,
        "quota_reserved": 50,
        "total_requests": 2,
        "total_tokens": 17,
        "total_prompt_tokens": 10,
        "total_completion_tokens": 7,
        "first_request_at": "2026-11-21T12:00:00Z",
        "rpm_limit": None,
    }
    assert {name: facts[name] for name in expected} == expected
    assert facts["periods"]["tenant"]["tokens"] == {
        "used": 17,
        "reserved": 50,
        "limit": 10_000_000,
        "remaining": 10_000_000 - 67,
    }
    secret = cast.alice.text.split("_")[2]
    assert secret not in repr(facts) and facts["api_key"] == cast.alice.key.display


def test_the_tighter_of_key_and_tenant_is_shown(cast: Cast) -> None:
    cast.alice.key.limit_overrides = {"monthly_tokens": 100}
    facts = usage(principal_of(cast.alice.key), NOW)
    assert facts["quota_monthly"] == 100


def test_totals_go_on_over_months_and_the_period_does_not(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice)))
    later = datetime(2026, 12, 24, tzinfo=UTC)
    quotas.settle(settle_order(reserved(cast.alice, now=later), now=later))
    facts = usage(principal_of(cast.alice.key), later)
    assert (facts["quota_used"], facts["total_tokens"], facts["total_requests"]) == (30, 60, 2)
    assert (facts["first_request_at"], facts["last_request_at"]) == ("2026-11-21T12:00:00Z", "2026-12-24T00:00:00Z")


def test_charlie_sees_nothing_of_alice(cast: Cast) -> None:
    reserved(cast.alice)
    facts = usage(principal_of(cast.charlie.key), NOW)
    assert facts["quota_reserved"] == 0 and facts["first_request_at"] is None
    assert "Alice" not in repr(facts)


def test_a_tenant_as_a_whole(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice, tenant_limits=Limits())))
    facts = tenant_usage(Tenant.objects.get(pk=cast.alice.tenant.pk), NOW)
    assert (facts["tenant"], facts["quota_used"], facts["total_requests"]) == ("Alice's", 30, 1)


def test_the_number_of_queries_is_fixed(cast: Cast, django_assert_max_num_queries: Any) -> None:
    for _ in range(5):
        quotas.settle(settle_order(reserved(cast.alice)))
    with django_assert_max_num_queries(7):
        usage(principal_of(cast.alice.key), NOW)
