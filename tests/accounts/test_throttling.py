"""The minute's limits, counted in Valkey: never exceeded, all or nothing, given back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import django_ratelimit.core
import pytest
import redis
from django.conf import settings

from accounts.identity.principals import Principal
from accounts.limits import throttling
from accounts.limits.precedence import Limits
from accounts.limits.throttling import RateState, count_request, enter, leave, peek_requests, peek_tokens
from accounts.trail.refusals import Refusal
from tests.accounts.principals import ALICE, BOB, on_plan

pytestmark = pytest.mark.integration


def with_override(who: Principal = ALICE, *, key: dict[str, int] | None = None, **limits: int) -> Principal:
    return replace(on_plan(who, key=key, **limits), tenant_overrides=frozenset(limits))


def second_key(who: Principal) -> Principal:
    return replace(who, key_id=12, quota_key_id=12)


def refused(action: Any, *args: Any, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        action(*args, **options)
    return caught.value


# Requests a minute


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


def test_an_override_is_shared_by_the_keys_of_the_tenant() -> None:
    alice = with_override(requests_per_minute=2)
    count_request(alice, None)
    count_request(second_key(alice), None)
    assert refused(count_request, alice, None).extra["of"] == "tenant"
    assert count_request(with_override(BOB, requests_per_minute=2), None).remaining == 1


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


def test_no_limit_asks_redis_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttling, "get_usage", lambda *_a, **_o: pytest.fail("a trip to Redis"))
    assert count_request(ALICE, None) == RateState(None, None, None)


def test_zero_blocks_for_good() -> None:
    answer = refused(count_request, on_plan(requests_per_minute=0), None)
    assert answer.code == "rate_limit_exceeded" and answer.retry_after is None


def test_looking_does_not_count() -> None:
    alice = on_plan(requests_per_minute=5)
    count_request(alice, None)
    assert [peek_requests(alice, None).remaining for _ in range(3)] == [4, 4, 4]


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


def test_thirty_two_threads_never_exceed_tokens_or_places(valkey: Any) -> None:
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


# Streams at once


def test_streams_have_places_of_their_own_among_the_requests(valkey: Any) -> None:
    alice = on_plan(key={"concurrent_streams": 1}, concurrent_streams=2, concurrent_requests=10)
    enter(alice, "s1", tokens=1, ttl_seconds=60, stream=True)
    answer = refused(enter, alice, "s2", tokens=1, ttl_seconds=60, stream=True)
    assert (answer.code, answer.extra["of"], answer.extra["value"]) == ("too_many_concurrent_streams", "key", 1)
    enter(alice, "plain", tokens=1, ttl_seconds=60)
    other = replace(second_key(alice), key_limits=Limits())
    enter(other, "s3", tokens=1, ttl_seconds=60, stream=True)
    assert refused(enter, other, "s4", tokens=1, ttl_seconds=60, stream=True).extra["of"] == "tenant"
    of_tenant, of_key = throttling.peek_places(alice)
    assert (of_tenant, of_key) == (throttling.Places(3, 2), throttling.Places(2, 1))
    leave(1, 11, "s1")
    assert throttling.peek_places(alice)[1] == throttling.Places(1, 0)
    enter(alice, "s2", tokens=1, ttl_seconds=60, stream=True)


def test_what_leaves_in_a_pipeline_leaves_its_stream_too(valkey: Any) -> None:
    enter(ALICE, "s1", tokens=1, ttl_seconds=60, stream=True)
    assert valkey.execute_command(*throttling.leave_command(1, 11, "s1", 0)) == 1
    assert throttling.peek_places(ALICE) == (throttling.Places(0, 0), throttling.Places(0, 0))


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [({"tokens_per_minute": 10}, 11), ({"concurrent_requests": 1}, 1), ({"concurrent_streams": 1}, 1)],
)
def test_asking_whether_one_would_enter_says_the_same_and_takes_nothing(
    valkey: Any, limits: dict[str, int], tokens: int
) -> None:
    alice = on_plan(**limits)
    assert throttling.would_enter(alice, tokens=1, stream=True).tokens.limit == limits.get("tokens_per_minute")
    assert valkey.keys("accounts:*") == []
    enter(alice, "r1", tokens=1, ttl_seconds=60, stream=True)
    told = refused(throttling.would_enter, alice, tokens=tokens, stream=True)
    real = refused(enter, alice, "r2", tokens=tokens, ttl_seconds=60, stream=True)
    assert (told.code, told.message) == (real.code, real.message)


# Without Redis, and without a key


@pytest.mark.parametrize(("house", "plan", "passes"), [("closed", "open", True), ("open", "closed", False)])
def test_a_plan_has_its_own_policy_for_when_redis_is_away(
    monkeypatch: pytest.MonkeyPatch, house: str, plan: str, passes: bool
) -> None:
    def away(*_arguments: Any, **_options: Any) -> None:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(throttling, "get_usage", away)
    monkeypatch.setattr(settings.CONFIG, "redis_outage_policy", house)
    alice = replace(on_plan(requests_per_minute=3), outage_policy=plan, quota_key_id=9000 + passes)
    if passes:
        assert count_request(alice, None).limit == 3
    else:
        assert refused(count_request, alice, None).code == "service_unavailable"


@pytest.mark.usefixtures("valkey")
def test_who_has_no_key_is_counted_by_address() -> None:
    for _ in range(throttling.ANONYMOUS_PER_MINUTE):
        throttling.count_anonymous("192.0.2.1")
    assert refused(throttling.count_anonymous, "192.0.2.1").extra["limit"] == "anonymous_requests_per_minute"
    throttling.count_anonymous("192.0.2.2")


@pytest.mark.usefixtures("valkey")
def test_wrong_passwords_make_an_address_and_a_name_wait() -> None:
    for number in range(throttling.LOGINS_PER_MINUTE):
        assert throttling.login_wait("192.0.2.1", "root") == 0
        throttling.count_failed_login("192.0.2.1", f"name{number}")
    assert throttling.login_wait("192.0.2.1", "root") > 0
    assert throttling.login_wait("192.0.2.2", "root") == 0
    for number in range(throttling.LOGINS_OF_A_NAME_PER_MINUTE):
        throttling.count_failed_login(f"198.51.100.{number}", "Root")
    assert throttling.login_wait("192.0.2.2", "root") > 0


@pytest.mark.django_db
@pytest.mark.usefixtures("valkey")
def test_the_console_lets_nobody_guess_passwords(client: Any, settings: Any) -> None:
    from django.contrib.auth.models import User

    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # quick; what is wrong stays wrong
    User.objects.create_superuser("root", password="a long password for tests")
    wrong = {"username": "root", "password": "wrong"}
    pages = [client.post("/admin/login/", wrong).content.decode() for _ in range(throttling.LOGINS_PER_MINUTE + 1)]
    assert ["Too many wrong passwords" in page for page in pages] == [False] * throttling.LOGINS_PER_MINUTE + [True]
    right = client.post("/admin/login/", {**wrong, "password": "a long password for tests"})
    assert right.status_code == 200 and "Too many wrong passwords" in right.content.decode()
