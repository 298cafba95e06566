"""Headers in, a principal out; what is refused, in which words, and at what cost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.db import OperationalError
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rest_framework.test import APIRequestFactory
from rest_framework.views import APIView

from accounts import redis_client
from accounts.identity import authentication, issuing, key_rows, keys, known_keys
from accounts.identity.authentication import APIKeyAuthentication, authenticate_credentials
from accounts.identity.permissions import HasScope, IsOperator, require_scope
from accounts.limits import throttling
from accounts.models import APIKey, Scope, Tenant, announce_tenant
from accounts.trail.refusals import Refusal
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def wait_for(condition: Any, seconds: float = 20) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not happen in time"
        time.sleep(0.01)
    return time.monotonic() - started


@pytest.fixture(autouse=True)
def _fresh_cache(_clean_slate: None) -> Iterator[None]:
    known_keys.CACHE.forget()
    known_keys.WATCHER.ensure_started()
    wait_for(lambda: known_keys.WATCHER.keep_seconds() == known_keys.KEEP_SECONDS)
    yield
    known_keys.WATCHER.stop()
    known_keys.CACHE.forget()


def refusal(headers: dict[str, str], **options: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        authenticate_credentials(headers, **options)
    return caught.value


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def unknown_key() -> str:
    return keys.generate().text


def with_wrong_secret(text: str) -> str:
    body = text[: -keys.CHECKSUM_LENGTH]
    body = body[:-1] + ("a" if body[-1] != "a" else "b")
    return body + keys.checksum(body)


def test_both_headers_name_the_same_caller(cast: Cast) -> None:
    alice = authenticate_credentials({"X-API-Key": cast.alice.text})
    assert alice == authenticate_credentials(bearer(cast.alice.text))
    assert alice == authenticate_credentials({"Authorization": f"bearer   {cast.alice.text} "})
    assert (alice.tenant_id, alice.tenant_name, alice.key_id) == (
        cast.alice.tenant.pk,
        "Alice's",
        cast.alice.key.pk,
    )
    assert alice.plan_name == "cast" and alice.role == "standard" and alice.is_authenticated
    assert alice.tenant_limits.monthly_tokens == 10_000_000


def test_charlie_is_charlie(cast: Cast) -> None:
    assert authenticate_credentials(bearer(cast.charlie.text)).tenant_name == "Charlie's"
    assert (
        authenticate_credentials({"X-API-Key": cast.charlie.text, **bearer(cast.alice.text)}).tenant_name == "Charlie's"
    )


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": ""}, bearer(""), bearer(" "), {"Authorization": "Basic YTpi"}]
)
def test_a_missing_key_is_missing(headers: dict[str, str]) -> None:
    assert refusal(headers).code == "missing_api_key"


def test_unknown_wrong_revoked_and_suspended_are_not_told_apart(cast: Cast) -> None:
    issuing.revoke(cast.bob.key)
    Tenant.objects.filter(pk=cast.charlie.tenant.pk).update(status=Tenant.Status.SUSPENDED)
    answers = [
        refusal(bearer(text))
        for text in (unknown_key(), with_wrong_secret(cast.alice.text), cast.bob.text, cast.charlie.text, "nonsense")
    ]
    assert {(each.code, each.message, str(each.extra)) for each in answers} == {
        ("invalid_api_key", "This API key is not valid.", "{}")
    }


def test_expired_is_told_only_to_the_owner(cast: Cast) -> None:
    APIKey.objects.filter(pk=cast.alice.key.pk).update(expires_at=timezone.now() - timedelta(seconds=1))
    assert refusal(bearer(cast.alice.text)).code == "expired_api_key"
    assert refusal(bearer(with_wrong_secret(cast.alice.text))).code == "invalid_api_key"


def test_a_key_expires_while_it_is_in_memory(cast: Cast) -> None:
    end = timezone.now() + timedelta(seconds=30)
    APIKey.objects.filter(pk=cast.alice.key.pk).update(expires_at=end)
    authenticate_credentials(bearer(cast.alice.text))
    assert refusal(bearer(cast.alice.text), now=end).code == "expired_api_key"


def test_hostile_headers_cost_no_query_and_no_redis(
    cast: Cast, django_assert_num_queries: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(throttling, "count_failure", lambda _address: pytest.fail("a trip to Redis"))
    dice = random.Random(11)
    alice = cast.alice.text
    hostile = [
        "' OR 1=1 --",
        "llms_" + "a" * 51,
        "\x00" * 56,
        "é" * 56,
        "a" * 100_000,
        "%00",
        "${jndi:ldap://x}",
        "null",
    ]
    while len(hostile) < 2000:
        position = dice.randrange(len(alice))
        hostile.append(alice[:position] + chr(dice.randrange(1, 0x3FF)) + alice[position + 1 :])
    with django_assert_num_queries(0):
        codes = {refusal(bearer(text)).code for text in hostile if text != alice}
    assert codes == {"invalid_api_key"}


def test_an_unknown_id_costs_the_same_work_as_a_wrong_secret(cast: Cast, monkeypatch: Any) -> None:
    from django.db import connection

    verified: list[str] = []
    real = keys.verify
    monkeypatch.setattr(keys, "verify", lambda *arguments: verified.append(arguments[1]) or real(*arguments))
    costs = []
    for text in (unknown_key(), with_wrong_secret(cast.alice.text)):
        verified.clear()
        with CaptureQueriesContext(connection) as queries:
            refusal(bearer(text))
            refusal(bearer(text))
        costs.append((len(verified), len(queries)))
    assert costs[0] == costs[1] == (2, 2)


def test_an_unknown_id_takes_as_long_as_a_wrong_secret(cast: Cast) -> None:
    texts = {"unknown": unknown_key(), "wrong": with_wrong_secret(cast.alice.text)}
    best = dict.fromkeys(texts, 1.0)
    credentials = {name: key_rows.find(text.split("_")[1]) for name, text in texts.items()}
    for _ in range(300):
        for name, text in texts.items():
            parsed = keys.parse(text)
            assert parsed is not None
            started = time.perf_counter()
            assert not authentication._matches(credentials[name], parsed.secret)
            best[name] = min(best[name], time.perf_counter() - started)
    assert 0.5 < best["unknown"] / best["wrong"] < 2


def test_after_the_first_look_up_there_is_no_query(cast: Cast, django_assert_num_queries: Any) -> None:
    with django_assert_num_queries(3):  # the row, its rules, and the note that the key was used
        authenticate_credentials(bearer(cast.alice.text))
    with django_assert_num_queries(0):
        for _ in range(20):
            authenticate_credentials(bearer(cast.alice.text))


def test_the_last_use_is_noted_once_a_minute(cast: Cast) -> None:
    start = timezone.now()
    for seconds in (0, 1, 59):
        authenticate_credentials(bearer(cast.alice.text), now=start + timedelta(seconds=seconds))
    row = APIKey.objects.get(pk=cast.alice.key.pk)
    assert row.last_used_at == start
    authenticate_credentials(bearer(cast.alice.text), now=start + timedelta(seconds=61))
    row.refresh_from_db()
    assert row.last_used_at == start + timedelta(seconds=61)


def test_a_busy_database_loses_the_note_and_not_the_request(cast: Cast, monkeypatch: Any) -> None:
    credential = key_rows.find(cast.alice.key.public_id)
    assert credential is not None

    def busy(*_args: Any, **_options: Any) -> None:
        raise OperationalError("database is locked")

    monkeypatch.setattr(APIKey.objects, "filter", busy)
    key_rows.touch(credential, timezone.now())
    monkeypatch.undo()
    assert APIKey.objects.get(pk=cast.alice.key.pk).last_used_at is None


def test_without_a_database_the_answer_is_unavailable(cast: Cast, monkeypatch: Any) -> None:
    def down(_public_id: str) -> None:
        raise OperationalError("no database")

    monkeypatch.setattr(key_rows, "find", down)
    answer = refusal(bearer(cast.alice.text))
    assert answer.code == "service_unavailable" and answer.retry_after == 1


@pytest.mark.django_db(transaction=True)
def test_a_revoked_key_is_refused_at_once_in_this_process(cast: Cast) -> None:
    authenticate_credentials(bearer(cast.alice.text))
    issuing.revoke(cast.alice.key)
    assert refusal(bearer(cast.alice.text)).code == "invalid_api_key"
    authenticate_credentials(bearer(cast.bob.text))


def heard(channel: Any) -> str | None:
    message = channel.get_message(timeout=0.1)
    return None if message is None else message["data"].decode()


def is_in_memory(public_id: str) -> bool:
    return known_keys.CACHE.get(public_id, known_keys.KEEP_SECONDS, time.monotonic())[0]


@pytest.mark.django_db(transaction=True)
def test_another_process_forgets_a_revoked_key_within_a_second(cast: Cast) -> None:
    waits = []
    for _ in range(3):
        wait_for(lambda: known_keys.WATCHER.keep_seconds() == known_keys.KEEP_SECONDS)
        authenticate_credentials(bearer(cast.alice.text))
        redis_client.client().incr(known_keys.VERSION_KEY)  # as another process does
        waits.append(wait_for(lambda: not is_in_memory(cast.alice.key.public_id)))
    assert min(waits) < 1.0, "even once, on a machine that is busy with other tests"


@pytest.mark.django_db(transaction=True)
def test_a_change_is_published_with_the_id_of_the_key(cast: Cast, valkey: Any) -> None:
    with valkey.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(known_keys.CHANNEL)
        channel.get_message(timeout=1)
        for customer, change in (
            (cast.alice, lambda: issuing.revoke(cast.alice.key)),
            (cast.bob, lambda: announce_tenant(cast.bob.tenant.pk)),
        ):
            change()
            # A channel is shared by all databases of a server, so that others may be heard too.
            wait_for(lambda: heard(channel) == customer.key.public_id)  # noqa: B023 - called at once
    assert int(valkey.get(known_keys.VERSION_KEY)) == 2


def test_what_was_read_before_a_change_is_not_kept_after_it(cast: Cast) -> None:
    credential = key_rows.find(cast.alice.key.public_id)
    generation = known_keys.CACHE.generation
    known_keys.CACHE.forget(cast.alice.key.public_id)
    known_keys.CACHE.put(cast.alice.key.public_id, credential, generation, time.monotonic())
    assert not is_in_memory(cast.alice.key.public_id)


def test_the_cache_is_bounded_and_guesses_do_not_push_out_keys(cast: Cast, monkeypatch: Any) -> None:
    monkeypatch.setattr(known_keys, "MAX_UNKNOWN", 3)
    credential = key_rows.find(cast.alice.key.public_id)
    for number in range(10):
        known_keys.CACHE.put(f"guess{number}", None, known_keys.CACHE.generation, time.monotonic())
    assert len(known_keys.CACHE._unknown) == 3
    assert is_in_memory(cast.alice.key.public_id) and credential is not None


class NoRedis:
    """Stands in for a client whose server is away."""

    def __getattr__(self, name: str) -> Any:
        raise redis.ConnectionError("away")


def test_without_redis_rows_are_kept_for_a_second_only(cast: Cast, monkeypatch: Any, caplog: Any) -> None:
    known_keys.WATCHER.stop()
    monkeypatch.setattr(known_keys, "client", NoRedis)
    authenticate_credentials(bearer(cast.alice.text))
    wait_for(lambda: "out of reach" in caplog.text)
    assert known_keys.WATCHER.keep_seconds() == known_keys.KEEP_SECONDS_WITHOUT_REDIS


@pytest.mark.django_db(transaction=True)
def test_an_announcement_that_did_not_arrive_is_made_up_for(cast: Cast, monkeypatch: Any, valkey: Any) -> None:
    with monkeypatch.context() as away:
        away.setattr(known_keys, "client", NoRedis)
        issuing.revoke(cast.alice.key)
    assert valkey.get(known_keys.VERSION_KEY) is None
    known_keys.WATCHER.poll()
    assert int(valkey.get(known_keys.VERSION_KEY)) == 1
    known_keys.WATCHER.poll()
    assert int(valkey.get(known_keys.VERSION_KEY)) == 1


def test_only_one_thread_watches(cast: Cast) -> None:
    for _ in range(5):
        authenticate_credentials(bearer(cast.alice.text))
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("accounts-changes") == 1


def test_guessing_from_one_address_is_slowed_and_others_are_not(cast: Cast, monkeypatch: Any) -> None:
    monkeypatch.setattr(throttling, "FAILURES_PER_MINUTE", 3)
    codes = [refusal(bearer(unknown_key()), address="10.0.0.1").code for _ in range(5)]
    assert codes == ["invalid_api_key"] * 3 + ["rate_limit_exceeded"] * 2
    assert refusal(bearer(unknown_key()), address="10.0.0.2").code == "invalid_api_key"
    authenticate_credentials(bearer(cast.alice.text), address="10.0.0.1")


def test_a_rotated_key_is_counted_on_the_first_of_its_chain(cast: Cast) -> None:
    successor, text = issuing.rotate(cast.alice.key, 60)
    principal = authenticate_credentials(bearer(text))
    assert (principal.key_id, principal.quota_key_id) == (successor.pk, cast.alice.key.pk)


class View(APIView):
    authentication_classes = [APIKeyAuthentication]
    permission_classes = [HasScope("operator")]  # type: ignore[list-item]


def test_drf_gets_a_principal_and_a_view_its_scope(cast: Cast) -> None:
    view = View()
    for customer, allowed in ((cast.operator, True), (cast.alice, False)):
        request = view.initialize_request(APIRequestFactory().get("/", headers=customer.headers))
        assert request.user is request.auth and request.user.tenant_name == customer.tenant.name
        if allowed:
            view.check_permissions(request)
        else:
            with pytest.raises(Refusal, match="operator") as caught:
                view.check_permissions(request)
            assert caught.value.code == "forbidden" and not caught.value.retryable
    assert APIKeyAuthentication().authenticate_header(request) == "Bearer"


def test_scopes_are_needed_one_by_one(cast: Cast) -> None:
    alice = authenticate_credentials(bearer(cast.alice.text))
    require_scope(alice, "generate")
    assert IsOperator() is IsOperator and IsOperator.scope == Scope.OPERATOR
    with pytest.raises(Refusal) as caught:
        require_scope(None, "generate")
    assert caught.value.code == "missing_api_key"
    with pytest.raises(ValueError):
        HasScope("root")
