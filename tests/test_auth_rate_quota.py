"""Requests a minute, tokens a minute, places and the monthly quota, as a client meets them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from tests.conftest import make_customer
from tests.in_process import FakeSpeed, InProcessSite, wait_until
from tests.timing import Stopwatch

pytestmark = pytest.mark.api


def customer(site: InProcessSite, **limits: int | None) -> Any:
    return make_customer("Limited", site.cast.alice.tenant.plan, **limits)


# Rates


def test_requests_beyond_the_limit_are_refused_and_say_when_to_come_back(site: InProcessSite) -> None:
    client = site.client(customer(site, requests_per_minute=3))
    replies = [client.get("/v1/me") for _ in range(4)]
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    assert {reply.headers["x-ratelimit-limit-requests"] for reply in replies} == {"3"}
    refused = replies[-1]
    assert refused.json()["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["extra"]["retry_after"] == int(refused.headers["retry-after"])


def test_the_window_ends_and_requests_pass_again(site: InProcessSite, valkey: Any) -> None:
    client = site.client(customer(site, requests_per_minute=1))
    assert [client.get("/v1/me").status_code for _ in range(2)] == [200, 429]
    for name in valkey.scan_iter("*rl:*"):
        valkey.delete(name)  # as time does
    assert client.get("/v1/me").status_code == 200


def test_a_refused_request_counts_as_an_attempt(site: InProcessSite) -> None:
    client = site.client(customer(site, requests_per_minute=2))
    assert client.generate(temperature=99).status_code == 422
    assert client.generate(model="nope").status_code == 404
    assert client.generate().status_code == 429


def test_no_requests_at_all_is_a_limit_too(site: InProcessSite) -> None:
    reply = site.client(customer(site, requests_per_minute=0)).get("/v1/me")
    assert (reply.status_code, reply.json()["code"]) == (429, "rate_limit_exceeded")


def test_a_rate_that_is_exceeded_burns_no_quota(site: InProcessSite) -> None:
    limited = customer(site, requests_per_minute=1)
    client = site.client(limited)
    tokens = int(client.generate().headers["x-usage-total-tokens"])
    assert client.generate("another").status_code == 429
    assert site.charged(limited) == (tokens, 0)


def test_tokens_a_minute_are_taken_at_admission_and_what_is_unused_comes_back(site: InProcessSite) -> None:
    client = site.client(customer(site, tokens_per_minute=100))
    first = client.generate("one two", max_new_tokens=20)
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    assert int(first.headers["x-ratelimit-remaining-tokens"]) <= 78
    refused = client.generate("one two", max_new_tokens=99)
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limit_exceeded")
    assert refused.json()["extra"]["limit"] == "tokens_per_minute"


def test_places_are_given_back_when_a_request_ends(site: InProcessSite, fake_speed: FakeSpeed) -> None:
    fake_speed.seconds_per_step = 0.02
    site.stop_worker()
    site.start_worker()
    client = site.client(customer(site, concurrent_requests=1))
    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda number: client.generate(f"prompt {number}", max_new_tokens=10), range(4)))
    codes = sorted(reply.status_code for reply in replies)
    assert codes[0] == 200
    assert set(codes) <= {200, 429}
    assert {reply.json()["code"] for reply in replies if reply.status_code == 429} <= {"too_many_concurrent_requests"}
    assert client.generate("afterwards").status_code == 200


# Quota


def test_generations_use_up_the_quota_and_then_it_is_exhausted(site: InProcessSite) -> None:
    limited = customer(site, monthly_tokens=40)
    client = site.client(limited)
    replies = []
    for number in range(6):
        replies.append(client.generate(f"p{number}", max_new_tokens=9))
        site.settle()
    assert [reply.status_code for reply in replies] == [200, 200, 200, 200, 402, 402]
    exhausted = replies[-1].json()
    assert exhausted["code"] == "quota_exhausted"
    assert exhausted["extra"]["reset_at"] > timezone.now().isoformat()
    assert "retry-after" not in replies[-1].headers
    assert site.charged(limited) == (40, 0)


def test_an_answer_is_cut_to_what_is_left_of_the_quota(site: InProcessSite) -> None:
    limited = customer(site, monthly_tokens=10)
    reply = site.client(limited).generate("one two", max_new_tokens=50)
    assert reply.status_code == 200
    assert reply.headers["x-quota-clamped"] == "true"
    assert reply.headers["x-usage-total-tokens"] == "10"


def test_a_client_may_ask_for_all_or_nothing(site: InProcessSite) -> None:
    limited = customer(site, monthly_tokens=10)
    client = site.client(limited)
    body = {"prompt": "one two", "max_new_tokens": 50}
    reply = client.post("/v1/generate", json=body, headers={"x-quota-all-or-nothing": "true"})
    assert (reply.status_code, reply.json()["code"]) == (402, "quota_exhausted")
    assert site.charged(limited) == (0, 0)


def test_the_quota_starts_anew_when_its_period_has_ended(site: InProcessSite) -> None:
    from accounts.models import QuotaPeriod

    limited = customer(site, monthly_tokens=10)
    client = site.client(limited)
    assert client.generate("one", max_new_tokens=9).status_code == 200
    site.settle()
    assert client.generate("two", max_new_tokens=9).status_code == 402
    moment = timezone.now()
    QuotaPeriod.objects.filter(tenant=limited.tenant).update(
        starts_at=moment - timedelta(days=31), ends_at=moment - timedelta(seconds=1)
    )
    assert client.generate("three", max_new_tokens=9).status_code == 200


def test_a_quota_of_requests_counts_cached_answers_too(site: InProcessSite) -> None:
    client = site.client(customer(site, monthly_requests=2))
    for _ in range(2):
        assert client.generate("the same").status_code == 200
        site.settle()
    assert client.generate("the same").status_code == 402


def test_many_at_once_never_overspend(site: InProcessSite) -> None:
    limited = customer(site, monthly_tokens=300)
    client = site.client(limited)
    with ThreadPoolExecutor(32) as pool:
        replies = list(
            pool.map(lambda number: client.generate(f"p{number}", max_new_tokens=49, cache=False), range(32))
        )
    delivered = sum(int(reply.headers["x-usage-total-tokens"]) for reply in replies if reply.status_code == 200)
    assert {reply.status_code for reply in replies} <= {200, 402, 429}
    used, reserved = site.charged(limited)
    assert reserved == 0
    assert used == delivered <= 300


# What a key can read of it


def test_usage_is_the_union_of_both_shapes(site: InProcessSite) -> None:
    client = site.client(customer(site, monthly_tokens=1000, requests_per_minute=50))
    reply = client.generate("one two three")
    site.settle()
    usage = client.get("/v1/me/usage").json()
    assert usage["quota_used"] == int(reply.headers["x-usage-total-tokens"])
    assert usage["quota_monthly"] == 1000
    assert usage["quota_reset_at"] > timezone.now().isoformat()
    assert (usage["rpm_limit"], usage["rpm_remaining"]) == (50, 48)
    assert usage["role"] == "standard"
    assert usage["total_requests"] == 1
    assert usage["total_prompt_tokens"] == 3
    assert usage["first_request_at"]
    assert usage["last_request_at"]


def test_me_shows_the_tighter_limits(site: InProcessSite) -> None:
    me = site.client(customer(site, requests_per_minute=7)).get("/v1/me").json()
    assert me["limits"]["requests_per_minute"] == 7
    assert me["limits"]["monthly_tokens"] == 10_000_000
    assert me["tenant"] == {"name": "Limited", "plan": "cast"}


def test_a_revoked_key_ends_what_it_has_running(site: InProcessSite, fake_speed: FakeSpeed) -> None:
    fake_speed.seconds_per_step = 0.02
    site.stop_worker()
    site.start_worker()
    alice, operator = site.client(site.cast.alice), site.client(site.cast.operator)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(alice.generate, max_new_tokens=200)
        wait_until(lambda: site.num_running() == 1)
        watch = Stopwatch()
        assert operator.post(f"/v1/admin/keys/{site.cast.alice.key.pk}/revoke").status_code == 200
        wait_until(lambda: site.num_running() == 0)
        assert watch.seconds() < 1.0
        assert running.result().json()["code"] == "request_cancelled"
