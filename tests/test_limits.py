"""The helpers beneath the limits: windows, buckets, places, reservations, and the headers that tell of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rest_framework.test import APIRequestFactory

from accounts.ledger import quotas
from accounts.ledger.quotas import ReserveOrder, SettleOrder
from accounts.limits import throttling
from accounts.limits.precedence import MAX_LIMIT, Limits
from accounts.limits.throttling import RateState
from accounts.trail.refusals import Refusal
from inference.api.errors import NATIVE, STATUS, refusal_headers, whole_seconds
from inference.api.headers import duration, rate_headers, server_timing, usage_headers
from tests.conftest import Customer, make_customer

pytestmark = pytest.mark.integration

NOW = datetime(2026, 3, 14, 12, tzinfo=UTC)


def principal_of(customer: Customer) -> Any:
    from accounts.identity.key_rows import principal_of as make

    return make(customer.key)


def order(
    customer: Customer, request_id: str, *, prompt: int = 5, output: int = 5, now: datetime = NOW
) -> ReserveOrder:
    principal = principal_of(customer)
    return ReserveOrder(
        request_id=request_id,
        tenant_id=principal.tenant_id,
        key_id=principal.quota_key_id,
        anchor_day=1,
        tenant_limits=principal.tenant_limits,
        key_limits=principal.key_limits,
        prompt_tokens=prompt,
        max_tokens=output,
        now=now,
        expires_at=now + timedelta(minutes=10),
    )


# Headers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0121, "13ms"),
        (0.999, "999ms"),
        (1, "1s"),
        (59.2, "60s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (3723, "1h2m3s"),
        (-5, "0s"),
    ],
)
def test_resets_are_written_as_durations_and_rounded_up(seconds: float, text: str) -> None:
    expected = {"60s": "1m0s"}.get(text, text)
    assert duration(seconds) == expected


def test_no_limit_is_the_largest_number() -> None:
    for rate in (None, RateState()):
        headers = rate_headers("tokens", rate)
        assert headers["x-ratelimit-limit-tokens"] == headers["x-ratelimit-remaining-tokens"] == str(MAX_LIMIT)
        assert headers["x-ratelimit-reset-tokens"] == "0s"


def test_what_is_left_is_never_negative() -> None:
    headers = rate_headers("requests", RateState(5, -3, 12.0))
    assert headers == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "12s",
    }


def test_usage_and_timing_headers() -> None:
    assert usage_headers(3, 4)["X-Usage-Total-Tokens"] == "7"
    assert server_timing({"queue": 0.0015, "decode": 1}) == "queue;dur=1.5, decode;dur=1000.0"


def test_retry_after_is_whole_and_at_least_one() -> None:
    assert [whole_seconds(seconds) for seconds in (0, 0.2, 1, 1.1)] == [1, 1, 1, 2]


def test_clients_that_retry_by_themselves_are_told_not_to() -> None:
    assert refusal_headers(Refusal("quota_exhausted", ""), 402) == {"x-should-retry": "false"}
    assert refusal_headers(Refusal("queue_full", "", retry_after=1.5), 503) == {"Retry-After": "2"}
    assert refusal_headers(Refusal("invalid_api_key", ""), 401) == {"WWW-Authenticate": "Bearer"}


def test_a_code_that_nobody_wrote_down_is_an_internal_error() -> None:
    assert NATIVE.status("never_heard_of") == 500
    assert all(400 <= status < 600 for status in STATUS.values())


# Requests a minute


def test_attempts_are_counted_up_to_the_limit(cast: Any, plan: Any) -> None:
    principal = principal_of(make_customer("Two a minute", plan, requests_per_minute=2))
    request = APIRequestFactory().get("/")
    assert throttling.count_request(principal, request).remaining == 1
    assert throttling.count_request(principal, request).remaining == 0
    with pytest.raises(Refusal) as refused:
        throttling.count_request(principal, request)
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= (refused.value.retry_after or 0) <= 60
    assert throttling.peek_requests(principal, request).remaining == 0


def test_one_key_does_not_use_up_the_limit_of_another_tenant(cast: Any, plan: Any) -> None:
    plan.requests_per_minute = 1
    plan.save()
    request = APIRequestFactory().get("/")
    for customer in (cast.alice, cast.bob):
        customer.tenant.plan.refresh_from_db()
        assert throttling.count_request(principal_of(customer), request).remaining == 0


# Tokens a minute and places


def test_tokens_are_taken_together_or_not_at_all(plan: Any) -> None:
    principal = principal_of(make_customer("Bucket", plan, tokens_per_minute=100, concurrent_requests=2))
    throttling.enter(principal, "a", tokens=90, ttl_seconds=60)
    with pytest.raises(Refusal):
        throttling.enter(principal, "b", tokens=50, ttl_seconds=60)
    assert throttling.running(principal.tenant_id) == 1
    assert throttling.leave(principal.tenant_id, principal.quota_key_id, "a", unused_tokens=90)
    assert throttling.enter(principal, "c", tokens=95, ttl_seconds=60).tokens.limit == 100


def test_places_are_bounded_and_given_back_once(plan: Any) -> None:
    principal = principal_of(make_customer("One place", plan, concurrent_requests=1))
    throttling.enter(principal, "a", tokens=1, ttl_seconds=60)
    with pytest.raises(Refusal) as refused:
        throttling.enter(principal, "b", tokens=1, ttl_seconds=60)
    assert refused.value.code == "too_many_concurrent_requests"
    assert throttling.leave(principal.tenant_id, principal.quota_key_id, "a") is True
    assert throttling.leave(principal.tenant_id, principal.quota_key_id, "a") is False
    throttling.enter(principal, "b", tokens=1, ttl_seconds=60)


# The monthly quota


def test_a_reservation_is_settled_once_and_to_the_token(plan: Any) -> None:
    limited = make_customer("Quota", plan, monthly_tokens=20)
    assert quotas.reserve(order(limited, "r1")).max_tokens == 5
    settle = SettleOrder(request_id="r1", charged_tokens=7, prompt_tokens=5, completion_tokens=2, now=NOW)
    assert quotas.settle(settle) is True
    assert quotas.settle(settle) is False
    assert quotas.reserve(order(limited, "r2", output=50)).max_tokens == 8


def test_a_released_reservation_costs_nothing(plan: Any) -> None:
    limited = make_customer("Quota", plan, monthly_tokens=10)
    quotas.reserve(order(limited, "r1"))
    assert quotas.release("r1", "cancelled", NOW) is True
    assert quotas.reserve(order(limited, "r2")).clamped is False


def test_an_exhausted_quota_says_when_it_starts_anew(plan: Any) -> None:
    limited = make_customer("Quota", plan, monthly_tokens=5)
    with pytest.raises(Refusal) as refused:
        quotas.reserve(order(limited, "r1"))
    assert refused.value.code == "quota_exhausted"
    assert refused.value.extra["reset_at"].startswith("2026-04-01T00:00:00")
    assert refused.value.retry_after is None


def test_the_next_month_has_a_quota_of_its_own(plan: Any) -> None:
    limited = make_customer("Quota", plan, monthly_tokens=10)
    quotas.reserve(order(limited, "r1"))
    quotas.settle(SettleOrder(request_id="r1", charged_tokens=10, prompt_tokens=5, completion_tokens=5, now=NOW))
    with pytest.raises(Refusal):
        quotas.reserve(order(limited, "r2"))
    assert quotas.reserve(order(limited, "r3", now=datetime(2026, 4, 1, tzinfo=UTC))).clamped is False


def test_zero_is_none_at_all_and_nothing_is_unlimited(plan: Any) -> None:
    with pytest.raises(Refusal):
        quotas.reserve(order(make_customer("None", plan, monthly_tokens=0), "r1"))
    assert quotas.reserve(order(make_customer("All", plan, monthly_tokens=None), "r2", output=10**6)).clamped is False
    assert Limits().monthly_tokens is None
