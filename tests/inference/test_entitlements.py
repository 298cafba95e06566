"""What a tenant loses in the middle of an answer ends it at that token, whoever took it away and in whatever way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.db.models import ProtectedError
from django.test.utils import CaptureQueriesContext

from accounts.identity import issuing
from accounts.ledger import quotas
from accounts.ledger.audit import audit
from accounts.models import APIKey, QuotaPeriod, Tenant
from inference.catalog import adapter_rows, granting, model_rows, registry
from inference.models import Adapter, Receipt, ServedModel
from inference.transport import doorbell
from inference.transport.queue import TicketQueue, ticket_queue
from inference.upkeep import entitlements
from inference.upkeep.entitlements import Entitlements, judge
from inference.upkeep.reaper import Reaper
from tests.inference.flow import admitted, events, fake_load, finish, principal_of, register, text_of, wait_for, worker
from tests.timing import Stopwatch

pytestmark = [pytest.mark.integration, pytest.mark.django_db(transaction=True)]

PROMPT_TOKENS = 10


@pytest.fixture(autouse=True)
def bell(monkeypatch: pytest.MonkeyPatch, valkey: Any) -> None:
    monkeypatch.setattr(doorbell, "ring", lambda pool: True)


@contextmanager
def streaming(cast: Any, valkey: Any, **changes: Any) -> Iterator[str]:
    """A long answer to Alice is being generated; Bob has one, too, which nothing may end."""
    values: dict[str, Any] = {"max_tokens": 240, "stream": True, **changes}
    load = fake_load(0.05, supports_adapters=True)
    with worker(valkey, threads=3, load=load):
        sent = admitted(principal_of(cast.alice), **values).ticket.request_id
        other = admitted(principal_of(cast.bob), **{**values, "adapters": None}).ticket.request_id
        wait_for(lambda: text_of(events(valkey, sent)) and text_of(events(valkey, other)))
        yield sent
        assert not any(event["t"] == "finished" for event in events(valkey, other))


def ended(valkey: Any, request_id: str, since: Stopwatch) -> dict[str, Any]:
    """Its last event, which came within a second, and what it cost."""
    last = finish(valkey, request_id)
    assert since.seconds() < 1.0
    receipt = wait_for(lambda: Receipt.objects.filter(request_id=request_id).first())
    assert receipt.error_code == (last["error"] or "")
    assert (receipt.status, receipt.finish_reason) == ("cancelled", "cancelled")
    generated = last["receipt"]["completion_tokens"]
    assert 0 < generated < 240
    assert receipt.charged_tokens == PROMPT_TOKENS + generated
    assert sum(event.get("n", 0) for event in events(valkey, request_id)) == generated
    return last


def save_revoked(cast: Any) -> None:
    key = APIKey.objects.get(pk=cast.alice.key.pk)
    key.revoked_at = datetime.now(UTC)
    key.save()


def suspend(cast: Any) -> None:
    tenant = Tenant.objects.get(pk=cast.alice.tenant.pk)
    tenant.status = Tenant.Status.SUSPENDED
    tenant.save()


def expire(cast: Any) -> None:
    key = APIKey.objects.get(pk=cast.alice.key.pk)
    key.expires_at = datetime.now(UTC) - timedelta(seconds=1)
    key.save()


WAYS: dict[str, tuple[Callable[[Any], object], str]] = {
    "issuing": (lambda cast: issuing.revoke(cast.alice.key), "key_revoked"),
    "command": (lambda cast: call_command("revoke_key", cast.alice.key.public_id, stdout=StringIO()), "key_revoked"),
    "save": (save_revoked, "key_revoked"),
    "rotation": (lambda cast: issuing.rotate(cast.alice.key), "key_revoked"),
    "suspension": (suspend, "tenant_suspended"),
    "expiry": (expire, "key_expired"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_key_that_ends_takes_its_streams_with_it(cast: Any, valkey: Any, way: str) -> None:
    register()
    act, why = WAYS[way]
    with streaming(cast, valkey) as sent:
        since = Stopwatch()
        act(cast)
        assert ended(valkey, sent, since)["error"] == why
    assert audit().problems == []


def test_a_key_that_expires_in_the_middle_of_an_answer_ends_it_then(cast: Any, valkey: Any) -> None:
    register()
    with streaming(cast, valkey) as sent:
        key = APIKey.objects.get(pk=cast.alice.key.pk)
        key.expires_at = datetime.now(UTC) + timedelta(seconds=0.7)
        key.save()
        time.sleep(0.4)
        ends = any(event["t"] == "finished" for event in events(valkey, sent))
        assert not ends or datetime.now(UTC) >= key.expires_at
        assert ended(valkey, sent, Stopwatch())["error"] == "key_expired"


def test_sql_that_announces_nothing_is_found_a_little_later(
    cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entitlements, "EVERY_SECONDS", 0.3)
    register()
    with streaming(cast, valkey) as sent:
        since = Stopwatch()
        APIKey.objects.filter(pk=cast.alice.key.pk).update(revoked_at=datetime.now(UTC))
        assert ended(valkey, sent, since)["error"] == "key_revoked"


def test_what_waits_ends_too_without_a_worker_and_free_of_charge(cast: Any, valkey: Any) -> None:
    register()
    sent = admitted(principal_of(cast.alice)).ticket.request_id
    other = admitted(principal_of(cast.bob)).ticket.request_id
    reaper = Reaper(ticket_queue())
    reaper.check_entitlements()
    issuing.revoke(cast.alice.key)
    reaper.check_entitlements()
    last = finish(valkey, sent)
    assert (last["reason"], last["error"]) == ("error", "key_revoked")
    assert QuotaPeriod.objects.get(tenant=cast.alice.tenant, key=None).reserved_tokens == 0
    assert ticket_queue().live_requests(tenant_id=cast.bob.tenant.pk) == [other]


def test_a_model_that_is_withdrawn_ends_its_streams(cast: Any, valkey: Any) -> None:
    row = register(visibility="granted")
    row.granted_tenants.set([cast.alice.tenant, cast.bob.tenant])
    registry.forget()
    with streaming(cast, valkey) as sent:
        since = Stopwatch()
        row.granted_tenants.remove(cast.alice.tenant)
        row.save()
        assert ended(valkey, sent, since)["error"] == "model_withdrawn"


@pytest.fixture
def poet(cast: Any, tmp_path: Path) -> Adapter:
    (tmp_path / "poet.gguf").write_text("poet")
    row = Adapter.objects.create(
        name="poet",
        base_model=register(),
        path=str(tmp_path / "poet.gguf"),
        digest="p" * 64,
        size_bytes=4,
        rank=8,
    )
    for customer in (cast.alice, cast.bob):
        granting.grant(row, customer.tenant)
    adapter_rows.changed()
    return row


@pytest.mark.parametrize("way", ["function", "row"])
def test_an_adapter_that_is_withdrawn_ends_the_streams_that_use_it(
    cast: Any, valkey: Any, poet: Adapter, way: str
) -> None:
    with streaming(cast, valkey, adapters=(("poet", 1.0),)) as sent:
        since = Stopwatch()
        if way == "function":
            granting.revoke(poet, cast.alice.tenant)
        else:
            poet.grants.get(tenant=cast.alice.tenant).delete()
        assert ended(valkey, sent, since)["error"] == "adapter_withdrawn"


def test_an_adapter_that_is_switched_off_serves_what_it_has(cast: Any, valkey: Any, poet: Adapter) -> None:
    with streaming(cast, valkey, adapters=(("poet", 1.0),)):
        adapter_rows.set_enabled([poet.pk], False)
        assert Entitlements(ticket_queue(), lambda *_: pytest.fail("nobody lost a grant")).check() == 0


def test_a_model_that_is_removed_serves_what_it_has(cast: Any, valkey: Any) -> None:
    row = register()
    with streaming(cast, valkey):
        model_rows.remove([row.pk])
        assert Entitlements(ticket_queue(), lambda *_: pytest.fail("nobody lost a grant")).check() == 0


# Quotas


def test_a_quota_that_is_lowered_ends_what_it_does_not_cover_any_more(cast: Any, valkey: Any) -> None:
    """The youngest first: what was admitted before goes on where the new limit covers it."""
    register()
    with streaming(cast, valkey) as older:
        younger = admitted(principal_of(cast.alice), max_tokens=240, stream=True).ticket.request_id
        wait_for(lambda: text_of(events(valkey, younger)))
        since = Stopwatch()
        call_command("set_quota", "--tenant", cast.alice.tenant.name, "--monthly-tokens", "400", stdout=StringIO())
        assert ended(valkey, younger, since)["error"] == "quota_exhausted"
        assert not any(event["t"] == "finished" for event in events(valkey, older))


def test_usage_that_is_booked_by_hand_ends_what_it_leaves_no_room_for(cast: Any, valkey: Any) -> None:
    register()
    tenant = Tenant.objects.get(pk=cast.alice.tenant.pk)
    tenant.limit_overrides = {"monthly_tokens": 1000}
    tenant.save()
    cast = replace(cast, alice=replace(cast.alice, tenant=tenant))
    with streaming(cast, valkey) as sent:
        since = Stopwatch()
        quotas.adjust(
            request_id="by-hand",
            tenant_id=tenant.pk,
            anchor_day=1,
            tokens=900,
            reason="a bill",
            now=datetime.now(UTC),
        )
        assert ended(valkey, sent, since)["error"] == "quota_exhausted"


def test_a_raise_ends_nothing(cast: Any, valkey: Any) -> None:
    register()
    with streaming(cast, valkey):
        call_command("set_quota", "--tenant", cast.alice.tenant.name, "--monthly-tokens", "1000", stdout=StringIO())
        assert Entitlements(ticket_queue(), lambda *_: pytest.fail("the limit covers it")).check() == 0


# Deleting


def test_a_key_or_tenant_with_a_running_request_cannot_be_deleted(cast: Any, valkey: Any) -> None:
    """Its ledger needs the row: it is revoked or suspended instead. Nothing ends, nothing is lost."""
    register()
    with streaming(cast, valkey) as sent:
        with pytest.raises(ProtectedError):
            APIKey.objects.get(pk=cast.alice.key.pk).delete()
        with pytest.raises(ProtectedError):
            Tenant.objects.get(pk=cast.alice.tenant.pk).delete()
        assert Entitlements(ticket_queue(), lambda *_: pytest.fail("all is as it was")).check() == 0
        assert not any(event["t"] == "finished" for event in events(valkey, sent))


def test_a_row_that_vanished_all_the_same_counts_as_revoked(cast: Any, valkey: Any) -> None:
    register()
    sent = admitted(principal_of(cast.alice)).ticket
    orphan = replace(sent, key_id=10**6)
    assert judge([orphan], datetime.now(UTC)).ended == {sent.request_id: "key_revoked"}


# What it costs


def test_looking_takes_a_fixed_number_of_queries(cast: Any, valkey: Any, poet: Adapter) -> None:
    def num_queries(number: int) -> int:
        for _ in range(number):
            admitted(principal_of(cast.alice), adapters=(("poet", 1.0),))
        tickets = TicketQueue(valkey).live_tickets()
        with CaptureQueriesContext(
            connection,
        ) as queries:
            judge(tickets, datetime.now(UTC))
        return len(queries)

    assert judge([], datetime.now(UTC)).ended == {}
    assert num_queries(1) == num_queries(20) <= 6


def test_nothing_is_looked_at_while_nothing_changes(cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Entitlements(ticket_queue(), lambda *_: None)
    calls: list[int] = []
    monkeypatch.setattr(Entitlements, "check", lambda self: calls.append(1) or 0)
    for _ in range(3):
        found.poll()
    assert len(calls) == 1
    issuing.issue(cast.alice.tenant, "another")
    found.poll()
    assert len(calls) == 2


def test_an_outage_is_survived_and_looked_at_again(cast: Any, valkey: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import OperationalError

    register()
    sent = admitted(principal_of(cast.alice)).ticket.request_id
    found = Entitlements(ticket_queue(), lambda request_id, why: gone.append((request_id, why)))
    gone: list[tuple[str, str]] = []
    issuing.revoke(cast.alice.key)

    def fail(*_: Any) -> None:
        raise OperationalError("the database is away")

    with monkeypatch.context() as away:
        away.setattr(entitlements, "judge", fail)
        assert found.poll() == 0
    assert found.poll() == 1
    assert gone == [(sent, "key_revoked")]


def test_models_of_all_kinds_announce_their_changes(cast: Any, valkey: Any, poet: Adapter) -> None:
    from accounts.identity.known_keys import VERSION_KEY

    def version() -> int:
        return int(valkey.get(VERSION_KEY) or 0)

    for row in (
        cast.alice.tenant.plan,
        cast.alice.tenant,
        cast.alice.key,
        poet,
        poet.grants.first(),
        ServedModel.objects.get(),
    ):
        before = version()
        row.save()
        assert version() > before, type(row).__name__
