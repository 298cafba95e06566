"""The minute's limits, counted in Valkey: never exceeded, all or nothing, given back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import django_ratelimit.core
import pytest
import redis
from django.conf import settings

from accounts import throttling
from accounts.limits import Limits
from accounts.principals import Principal
from accounts.refusals import Refusal
from accounts.throttling import RateState, count_request, enter, leave, peek_requests, peek_tokens

pytestmark = pytest.mark.integration

ALICE = Principal(
    key_id=11,
    quota_key_id=11,
    public_id="alice",
    key_name="main",
    tenant_id=1,
    tenant_name="Alice's",
    plan_name="p",
    role="standard",
    scopes=frozenset(["generate"]),
    tenant_limits=Limits(),
    key_limits=Limits(),
)
BOB = replace(ALICE, tenant_id=2, tenant_name="Bob's", key_id=21, quota_key_id=21)


def on_plan(who: Principal = ALICE, *, key: dict[str, int] | None = None, **limits: int | None) -> Principal:
    return replace(who, tenant_limits=Limits(**limits), key_limits=Limits(**(key or {})))


def with_override(who: Principal = ALICE, *, key: dict[str, int] | None = None, **limits: int) -> Principal:
    return replace(on_plan(who, key=key, **limits), tenant_overrides=frozenset(limits))


def second_key(who: Principal) -> Principal:
    return replace(who, key_id=12, quota_key_id=12)


def refused(action: Any, *args: Any, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action(*args, **options)
    return caught.value


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock of django-ratelimit stands still, so that no window ends within a test."""
    monkeypatch.setattr(django_ratelimit.core.time, "time", lambda: 1_800_000_000.0)
    yield


# Requests a minute


@pytest.mark.usefixtures("still")
def test_the_plan_limits_each_key_by_itself() -> None:
    alice = on_plan(requests_per_minute=3)
    states = [count_request(alice, None) for _ in range(3)]
    assert [state.remaining for state in states] == [2, 1, 0]
    assert {state.limit for state in states} == {3}
    answer = refused(count_request, alice, None)
    assert answer.code == "rate_limit_exceeded"
    assert answer.extra == {"limit": "requests_per_minute", "of": "key", "value": 3}
    assert answer.retry_after is not None and 1 <= answer.retry_after <= 60
    assert count_request(second_key(alice), None).remaining == 2
    assert count_request(on_plan(BOB, requests_per_minute=3), None).remaining == 2


@pytest.mark.usefixtures("still")
def test_an_override_is_shared_by_the_keys_of_the_tenant() -> None:
    alice = with_override(requests_per_minute=2)
    count_request(alice, None)
    count_request(second_key(alice), None)
    assert refused(count_request, alice, None).extra["of"] == "tenant"
    assert count_request(with_override(BOB, requests_per_minute=2), None).remaining == 1


@pytest.mark.usefixtures("still")
def test_a_key_may_have_less_than_its_tenant() -> None:
    alice = with_override(key={"requests_per_minute": 1}, requests_per_minute=5)
    assert count_request(alice, None) == RateState(1, 0, pytest.approx(30, abs=30))
    assert refused(count_request, alice, None).extra["of"] == "key"
    assert count_request(second_key(with_override(requests_per_minute=5)), None).remaining == 2


def test_a_window_ends_and_requests_pass_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_800_000_000.0]
    monkeypatch.setattr(django_ratelimit.core.time, "time", lambda: now[0])
    alice = on_plan(requests_per_minute=1)
    count_request(alice, None)
    wait = refused(count_request, alice, None).retry_after
    assert wait is not None
    now[0] += wait + 1
    assert count_request(alice, None).remaining == 0


@pytest.mark.usefixtures("still")
def test_no_limit_asks_redis_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "get_usage", lambda *_a, **_o: pytest.fail("a trip to Redis"))
    assert count_request(ALICE, None) == RateState(None, None, None)


def test_zero_blocks_for_good() -> None:
    answer = refused(count_request, on_plan(requests_per_minute=0), None)
    assert answer.code == "rate_limit_exceeded" and answer.retry_after is None


@pytest.mark.usefixtures("still")
def test_looking_does_not_count() -> None:
    alice = on_plan(requests_per_minute=5)
    count_request(alice, None)
    assert [peek_requests(alice, None).remaining for _ in range(3)] == [4, 4, 4]


@pytest.mark.usefixtures("still")
def test_sixteen_threads_get_exactly_the_limit() -> None:
    alice = on_plan(requests_per_minute=50)

    def attempt(_number: int) -> bool:
        try:
            count_request(alice, None)
        except Refusal:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(160))) == 50


def broken_get_usage(*_args: Any, **_options: Any) -> None:
    raise redis.ConnectionError("away")


def test_closed_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "get_usage", broken_get_usage)
    answer = refused(count_request, on_plan(requests_per_minute=5), None)
    assert answer.code == "service_unavailable" and answer.retry_after == 2
    throttling.count_failure("10.0.0.1")  # the key is refused anyway


def test_open_without_redis_lets_a_bounded_number_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "get_usage", broken_get_usage)
    monkeypatch.setattr(throttling, "OPEN_POLICY_REQUESTS_PER_MINUTE", 2)
    monkeypatch.setattr(throttling, "LOCAL_COUNTS", throttling.LocalCounts())
    monkeypatch.setattr(throttling.time, "time", lambda: 1_800_000_000.0)
    monkeypatch.setattr(settings.CONFIG, "redis_outage_policy", "open")
    alice = on_plan(requests_per_minute=50)
    assert [count_request(alice, None).remaining for _ in range(2)] == [1, 0]
    assert refused(count_request, alice, None).code == "rate_limit_exceeded"
    count_request(second_key(alice), None)
    monkeypatch.setattr(throttling.time, "time", lambda: 1_800_000_060.0)
    assert count_request(alice, None).remaining == 1


@pytest.mark.parametrize(("usage", "count"), [(None, 0), ({"count": 0, "time_left": -1}, None)])
def test_a_limiter_without_an_answer(monkeypatch: pytest.MonkeyPatch, usage: Any, count: int | None) -> None:
    monkeypatch.setattr(throttling, "get_usage", lambda *_a, **_o: usage)
    alice = on_plan(requests_per_minute=5)
    if count is None:
        assert refused(count_request, alice, None).code == "service_unavailable"
    else:
        assert count_request(alice, None).remaining == 5


# Tokens a minute and places


def test_without_limits_everybody_enters_and_leaves(valkey: Any) -> None:
    assert enter(ALICE, "r1", tokens=10**9, ttl_seconds=60).tokens == RateState()
    assert throttling.running(1) == 1 and throttling.running(2) == 0
    assert leave(1, 11, "r1", unused_tokens=5)
    assert not leave(1, 11, "r1", unused_tokens=5)
    assert throttling.running(1) == 0


def test_tokens_are_taken_and_the_unused_ones_come_back(valkey: Any) -> None:
    alice = on_plan(tokens_per_minute=6000)
    state = enter(alice, "r1", tokens=5000, ttl_seconds=60).tokens
    assert state.limit == 6000 and state.remaining == 1000
    assert state.reset_seconds == pytest.approx(50, abs=3)
    answer = refused(enter, alice, "r2", tokens=2000, ttl_seconds=60)
    assert answer.code == "rate_limit_exceeded" and answer.extra["limit"] == "tokens_per_minute"
    assert answer.retry_after == pytest.approx(10, abs=4)
    leave(1, 11, "r1", unused_tokens=4000)
    assert peek_tokens(alice).remaining == pytest.approx(5000, abs=500)
    assert enter(alice, "r2", tokens=2000, ttl_seconds=60).tokens.remaining == pytest.approx(3000, abs=500)
    assert enter(on_plan(BOB, tokens_per_minute=6000), "b", tokens=6000, ttl_seconds=60).tokens.remaining == 0


def test_a_bucket_refills_and_never_overflows(valkey: Any) -> None:
    alice = on_plan(tokens_per_minute=60_000)
    enter(alice, "r1", tokens=60_000, ttl_seconds=60)
    before = peek_tokens(alice).remaining
    time.sleep(0.2)
    after = peek_tokens(alice).remaining
    assert before is not None and after is not None and 150 <= after - before <= 10_000
    leave(1, 11, "r1", unused_tokens=60_000)
    assert peek_tokens(alice).remaining == 60_000


def test_more_than_a_minute_holds_is_refused_for_good(valkey: Any) -> None:
    answer = refused(enter, on_plan(tokens_per_minute=100), "r1", tokens=101, ttl_seconds=60)
    assert answer.code == "rate_limit_exceeded" and not answer.retryable
    assert refused(enter, on_plan(tokens_per_minute=0), "r1", tokens=1, ttl_seconds=60).retry_after is None


def test_places_are_counted_and_freed(valkey: Any) -> None:
    alice = on_plan(concurrent_requests=2)
    for name in ("r1", "r2"):
        enter(alice, name, tokens=1, ttl_seconds=60)
    answer = refused(enter, second_key(alice), "r3", tokens=1, ttl_seconds=60)
    assert answer.code == "too_many_concurrent_requests" and answer.retry_after == 1
    assert answer.extra == {"limit": "concurrent_requests", "of": "tenant", "value": 2}
    leave(1, 11, "r1")
    enter(alice, "r3", tokens=1, ttl_seconds=60)
    assert refused(enter, on_plan(concurrent_requests=0), "r4", tokens=1, ttl_seconds=60).retry_after is None


def test_a_key_may_have_fewer_places_and_tokens(valkey: Any) -> None:
    alice = on_plan(key={"concurrent_requests": 1}, concurrent_requests=5)
    enter(alice, "r1", tokens=1, ttl_seconds=60)
    assert refused(enter, alice, "r2", tokens=1, ttl_seconds=60).extra["of"] == "key"
    thrifty = second_key(on_plan(key={"tokens_per_minute": 10}, tokens_per_minute=1000))
    assert refused(enter, thrifty, "r3", tokens=20, ttl_seconds=60).extra["of"] == "key"
    assert enter(thrifty, "r3", tokens=10, ttl_seconds=60).tokens.limit == 10


def test_a_refusal_takes_nothing(valkey: Any) -> None:
    alice = on_plan(key={"concurrent_requests": 1}, tokens_per_minute=1000, concurrent_requests=10)
    enter(alice, "r1", tokens=100, ttl_seconds=60)
    before = peek_tokens(alice).remaining
    for number in range(20):
        refused(enter, alice, f"x{number}", tokens=100, ttl_seconds=60)
        refused(enter, second_key(alice), f"y{number}", tokens=1001, ttl_seconds=60)
    after = peek_tokens(alice).remaining
    assert before is not None and after is not None and before <= after <= before + 99
    assert throttling.running(1) == 1


def test_a_place_that_is_never_left_frees_itself(valkey: Any) -> None:
    alice = on_plan(concurrent_requests=1)
    enter(alice, "lost", tokens=1, ttl_seconds=1)
    time.sleep(1.1)
    enter(alice, "next", tokens=1, ttl_seconds=60)
    assert not leave(1, 11, "lost", unused_tokens=1)


def test_entering_twice_with_one_id_takes_once(valkey: Any) -> None:
    alice = on_plan(tokens_per_minute=1000, concurrent_requests=1)
    enter(alice, "r1", tokens=600, ttl_seconds=60)
    assert enter(alice, "r1", tokens=600, ttl_seconds=60).tokens.remaining == pytest.approx(400, abs=100)


def test_keys_of_limits_do_not_stay_for_ever(valkey: Any) -> None:
    enter(on_plan(tokens_per_minute=10, concurrent_requests=5), "r1", tokens=1, ttl_seconds=60)
    assert all(0 < valkey.ttl(key) <= 120 for key in valkey.keys("accounts:*"))


def test_two_processes_never_exceed_tokens_or_places(valkey: Any) -> None:
    alice = on_plan(tokens_per_minute=1000, concurrent_requests=12)

    def attempt(number: int) -> bool:
        try:
            enter(alice, f"r{number}", tokens=100, ttl_seconds=60)
        except Refusal:
            return False
        return True

    with ThreadPoolExecutor(32) as pool:
        granted = sum(pool.map(attempt, range(64)))
    assert 10 <= granted <= 12  # ten, and what refills meanwhile
    assert throttling.running(1) == granted


class NoRedis:
    def __getattr__(self, name: str) -> Any:
        raise redis.ConnectionError("away")


def test_without_redis_nobody_enters_and_leaving_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "client", NoRedis)
    assert refused(enter, ALICE, "r1", tokens=1, ttl_seconds=60).code == "service_unavailable"
    assert refused(peek_tokens, ALICE).retry_after == 2
    assert leave(1, 11, "r1", unused_tokens=1) is False
    assert throttling.running(1) == 0
