"""A tenant leaves: its export has every row of it and no secret, and once erased nothing says who it was."""

from __future__ import annotations

import base64
import io
import json
import threading
import zlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth.models import User
from django.contrib.contenttypes.models import ContentType
from django.core.management import CommandError, call_command
from django.utils import timezone

from accounts.identity.authentication import authenticate_credentials
from accounts.ledger import adjusting, audit
from accounts.models import (
    APIKey,
    AuditEntry,
    LedgerEntry,
    LimitRule,
    Membership,
    QuotaAlert,
    QuotaPeriod,
    QuotaRaise,
    RefusedRequest,
    Statement,
    Tenant,
)
from accounts.trail.refusals import Refusal
from inference.batches import files
from inference.catalog import granting
from inference.departure import erasure, export
from inference.models import Adapter, AdapterAlias, DefaultVector, Receipt, ServedModel, StoredResponse
from inference.slots import holdings
from inference.transport import queue
from inference.transport.completion_cache import Completion, CompletionCache
from inference.worker import hosted
from tests.accounts.test_commands import answer, failure, said
from tests.conftest import Cast, Customer
from tests.in_process import InProcessSite, wait_until
from tests.inference.flow import POOL, ticket
from tests.inference.test_batch_operators import SECRET, make_batch, make_file
from tests.test_slots import FRANCE, act, computed

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process is there that would have to hear of it."""
    monkeypatch.setattr(erasure, "HEARD_SECONDS", 0.0)


def word_of(who: Customer) -> str:
    """What it says, in each place that keeps something."""
    return f"said by {who.tenant.name}"


def fill(who: Customer, cast: Cast) -> None:
    """One of everything that a tenant may have beside what requests make."""
    tenant, now = who.tenant, timezone.now()
    small, _ = ServedModel.objects.get_or_create(
        name="small", defaults={"path": "/s.gguf", "digest": "a" * 64, "n_ctx": 64, "n_slots": 1}
    )
    small.granted_tenants.add(tenant)
    own = Adapter.objects.create(
        base_model=small, name=f"own-{tenant.pk}", path="/own.gguf", digest=f"{tenant.pk:064x}", rank=4, alpha=4.0,
        owner=tenant,
    )  # fmt: skip
    granting.grant(own, tenant)
    AdapterAlias.objects.create(base_model=small, name=f"alias-{tenant.pk}", target=own)
    DefaultVector.objects.create(tenant=tenant, base_model=small, scales=[[own.pk, 1.0]])
    person = User.objects.create_user(f"person of {tenant.name}", email="p@example.org")
    Membership.objects.create(tenant=tenant, user=person, role="owner")
    LimitRule.objects.create(tenant=tenant, limit="monthly_tokens", value=9, starts_at=now, reason=tenant.name)
    QuotaRaise.objects.create(tenant=tenant, monthly_tokens=5, reason=tenant.name, asked_by=f"person {tenant.name}")
    adjusting.adjust(tenant, who.key, tokens=7, reason=f"for {tenant.name}", now=now)
    period = QuotaPeriod.objects.get(tenant=tenant, key=None)
    QuotaAlert.objects.create(period=period, counts="tokens", percent=50, used=5, quota=9, created_at=now)
    Statement.objects.create(
        tenant=tenant, month=(now - timedelta(days=70)).date().replace(day=1), currency="EUR", requests=0,
        used_tokens=0, cost_nanos=0, lines=[], created_at=now,
    )  # fmt: skip
    RefusedRequest.objects.create(request_id="refused", tenant=tenant, key=who.key, code="x", created_at=now)
    content = zlib.compress(json.dumps({"items": [word_of(who)], "response": {}}).encode())
    StoredResponse.objects.create(
        id=f"resp_{tenant.pk}", tenant=tenant, content=content, num_bytes=len(content), created_at=now
    )
    Receipt.objects.create(
        request_id=f"receipt-{tenant.pk}", tenant=tenant, key=who.key, model="small", status="completed",
        created_at=now, finished_at=now,
    )  # fmt: skip
    make_batch(who, make_file(who, filename=f"{word_of(who)}.jsonl"), status="completed", metadata={"a": word_of(who)})
    LogEntry.objects.create(
        user=person,
        content_type=ContentType.objects.get_for_model(Tenant),
        object_id=str(tenant.pk),
        object_repr=tenant.name,
        action_flag=CHANGE,
    )


def rows_with(word: str) -> dict[str, Any]:
    """Every row of every table that has this word."""
    return {
        f"{model._meta.label} {row}": row
        for model in apps.get_models()
        for row in model._default_manager.values()
        if word in str(row)
    }


# The lists of what there is


def test_every_model_is_a_tenants_or_says_that_it_is_not() -> None:
    known = {
        model._meta.label for name in ("accounts", "inference") for model in apps.get_app_config(name).get_models()
    }
    assert known == {*export.WHOSE, *export.NOT_OF_TENANTS}
    assert not export.WHOSE.keys() & set(export.NOT_OF_TENANTS)


# Export


def test_an_export_has_every_row_and_content_and_no_secret_and_nothing_of_others(cast: Cast, tmp_path: Path) -> None:
    for who in (cast.alice, cast.bob):
        fill(who, cast)
    place = tmp_path / "alice.jsonl"
    told = answer("export_tenant", "Alice's", "--to", place)
    assert place.stat().st_mode & 0o777 == 0o600 and place.stat().st_size == told["bytes"]
    found = [json.loads(line) for line in place.read_text().splitlines()]
    assert len(found) == told["lines"]
    assert found[0]["kind"] == "export" and found[0]["row"]["tenant"] == "Alice's"
    counts = found[-1]["row"]
    assert {*counts} >= {*export.WHOSE} - {"accounts.DayUsage", "accounts.Reservation"}
    assert counts["accounts.APIKey"] == counts["auth.User"] == 1
    by_kind = {each["kind"]: each["row"] for each in found}
    assert by_kind["inference.StoredResponse"]["content"]["items"] == [word_of(cast.alice)]
    assert base64.b64decode(by_kind["content"]["base64"]).decode() == SECRET
    text = place.read_text()
    assert cast.alice.key.secret_hash not in text and "password" not in text and "Bob" not in text
    assert all(f'"tenant_id":{cast.bob.tenant.pk}' not in line for line in text.splitlines())


def test_an_export_overwrites_nothing_unless_it_is_told_to(cast: Cast, tmp_path: Path) -> None:
    place = tmp_path / "alice.jsonl"
    place.write_text("mine")
    assert failure("export_tenant", "Alice's", "--to", place)[0] == "file_exists"
    assert place.read_text() == "mine"
    assert "Wrote" in said("export_tenant", "Alice's", "--to", place, "--replace")
    assert failure("export_tenant", "Alice's", "--to", tmp_path / "none" / "x")[0] == "file_unwritable"
    assert failure("export_tenant", "Nobody's", "--to", tmp_path / "x")[0] == "tenant_not_found"


def test_an_export_that_breaks_off_leaves_nothing(cast: Cast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(*_: Any) -> Iterator[bytes]:
        yield SECRET.encode()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "lines", lines)
    assert failure("export_tenant", "Alice's", "--to", tmp_path / "alice.jsonl")[0] == "interrupted"
    assert not list(tmp_path.iterdir())


def test_a_large_file_is_exported_in_pieces(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "CHUNK_BYTES", 4)
    make_file(cast.alice)
    found = [json.loads(line) for line in export.lines(cast.alice.tenant, timezone.now())]
    pieces = [each["row"] for each in found if each["kind"] == "content"]
    assert b"".join(base64.b64decode(each["base64"]) for each in pieces).decode() == SECRET
    assert [each["offset"] for each in pieces] == list(range(0, len(SECRET), 4))


# Erase


def test_an_erased_tenant_has_no_name_content_or_key_and_its_ledger_is_proven(cast: Cast) -> None:
    for who in (cast.alice, cast.bob):
        fill(who, cast)
    pk = cast.alice.tenant.pk
    said("tenant", "change", "Alice's", "--quota-anchor-day", 3)
    cache = CompletionCache(queue.ticket_queue().client, 60)
    made = Completion(
        output=word_of(cast.alice), finish_reason="stop", stop_word=None, prompt_tokens=1, completion_tokens=1
    )
    cache.put(f"{pk}:key", made)
    cache.put(f"{cast.bob.tenant.pk}:key", made)
    sums = QuotaPeriod.objects.filter(tenant=pk).order_by("pk").values_list("used_tokens", "cost_nanos")
    before, entries = list(sums), LedgerEntry.objects.count()
    told = answer("erase_tenant", "Alice's", "--yes")
    assert (told["name"], told["problems"], told["files_kept"]) == (f"erased-{pk}", [], ["/own.gguf"])
    assert told["counts"]["inference.batch"] == told["counts"]["inference.storedresponse"] == 1
    with pytest.raises(Refusal):
        authenticate_credentials(cast.alice.headers)
    assert rows_with("Alice's") == {} and rows_with(cast.alice.key.secret_hash) == {}
    for model in (Receipt, StoredResponse, RefusedRequest, DefaultVector, Membership, QuotaRaise):
        assert [row.tenant_id for row in model._default_manager.all()] == [cast.bob.tenant.pk], model
    assert not files.path_of(pk, "").exists() and files.path_of(cast.bob.tenant.pk, "").exists()
    assert cache.get(f"{pk}:key", model_id="x") is None and cache.get(f"{cast.bob.tenant.pk}:key", model_id="x")
    assert list(sums) == before and LedgerEntry.objects.count() == entries and audit.audit().is_clean
    assert Statement.objects.filter(tenant=pk).exists()
    assert authenticate_credentials(cast.bob.headers).tenant_name == "Bob's"
    assert not User.objects.filter(username__contains="Alice").exists()
    assert User.objects.filter(username="person of Bob's").exists()
    last = AuditEntry.objects.filter(diff__has_key="erased").get()
    assert (last.model, last.row, last.name) == ("accounts.tenant", str(pk), f"erased-{pk}")
    noted = AuditEntry.objects.filter(model="accounts.tenant", row=str(pk), action="change")
    changes = noted.filter(diff__has_key="quota_anchor_day")
    assert [entry.diff for entry in changes] == [{"quota_anchor_day": ["(erased)", "(erased)"]}], (
        "that it changed stays"
    )


def test_what_was_removed_before_is_not_named_in_the_trails_either(cast: Cast) -> None:
    tenant, friend, now = cast.alice.tenant, User.objects.create_user("friend"), timezone.now()
    small = ServedModel.objects.create(name="small", path="/s.gguf", digest="a" * 64, n_ctx=64, n_slots=1)
    own, shared = (
        Adapter.objects.create(
            base_model=small, name=name, path=f"/{name}", digest=name * 64, rank=4, alpha=4.0, owner=owner
        )
        for name, owner in (("a", tenant), ("b", None))
    )
    rules = [
        LimitRule.objects.create(limit="monthly_tokens", value=9, starts_at=now, reason="Alice's", **owner)
        for owner in ({"tenant": tenant}, {"key": cast.alice.key})
    ]
    rows = [*rules, Membership.objects.create(tenant=tenant, user=friend), granting.grant(shared, tenant), own]
    for row in rows:
        LogEntry.objects.create(
            user=friend, content_type=ContentType.objects.get_for_model(row), object_id=str(row.pk),
            object_repr="of Alice's", action_flag=CHANGE,
        )  # fmt: skip
        row.delete()
    assert len(rows_with("Alice's")) > len(rows)
    kept = AuditEntry.objects.count()
    said("erase_tenant", "Alice's", "--yes")
    assert rows_with("Alice's") == {}
    assert AuditEntry.objects.count() > kept, "that something was done stays"
    assert (
        AuditEntry.objects.filter(model="accounts.limitrule", action="delete", name__endswith="(erased)").count() == 2
    )
    assert User.objects.filter(username="friend").exists()


def test_what_was_given_to_another_tenant_before_keeps_its_trail_from_then_on(cast: Cast) -> None:
    """It is theirs now: what was noted of it later is no word about who is erased."""
    rule = LimitRule.objects.create(limit="max_output", value=9, starts_at=timezone.now(), tenant=cast.alice.tenant)
    history = LogEntry.objects.filter(object_id=str(rule.pk))

    def note_in_history() -> None:
        LogEntry.objects.create(
            user=User.objects.get_or_create(username="friend")[0], object_id=str(rule.pk), object_repr=str(rule),
            content_type=ContentType.objects.get_for_model(rule), action_flag=CHANGE,
        )  # fmt: skip

    note_in_history()
    rule.tenant = cast.bob.tenant
    rule.save()
    note_in_history()
    rule.value = 10
    rule.save()
    said("erase_tenant", "Alice's", "--yes")
    trail = AuditEntry.objects.filter(model="accounts.limitrule", row=str(rule.pk)).order_by("pk")
    assert [entry.name.endswith("(erased)") for entry in trail] == [True, True, False]
    assert (trail[2].diff, trail[2].name) == ({"value": [9, 10]}, "max_output of Bob's")
    assert [entry.object_repr for entry in history.order_by("pk")] == ["(erased)", "max_output of Bob's"]


def test_grants_and_aliases_of_its_adapters_that_were_removed_before_are_not_named(cast: Cast) -> None:
    tenant = cast.alice.tenant
    small = ServedModel.objects.create(name="small", path="/s.gguf", digest="a" * 64, n_ctx=64, n_slots=1)
    own = Adapter.objects.create(
        base_model=small, name="of-alice", path="/a", digest="a" * 64, rank=4, alpha=4.0, owner=tenant
    )
    granting.grant(own, cast.bob.tenant)
    alias = AdapterAlias.objects.create(base_model=small, name="alias-of-alice", target=own)
    alias.delete()
    own.delete()
    assert AuditEntry.objects.filter(name__contains="of-alice").exists()
    said("erase_tenant", "Alice's", "--yes")
    assert not AuditEntry.objects.filter(name__contains="of-alice").exists()


def test_what_a_process_lets_in_that_has_not_heard_of_it_yet_leaves_nothing(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a second a web process may still have its keys in memory."""
    monkeypatch.setattr(erasure, "HEARD_SECONDS", 1.0)
    tickets, tenant_id, key_id = queue.ticket_queue(), cast.alice.tenant.pk, cast.alice.key.pk
    tickets.beat("worker-1", POOL, 1, {"models": []})
    late = ticket(tenant_id=tenant_id, key_id=key_id, quota_key_id=key_id)
    other = threading.Timer(0.3, tickets.put, [late])
    other.start()
    said("erase_tenant", "Alice's", "--yes")
    other.join()
    assert tickets.state(late.request_id) is None and tickets.live_requests(tenant_id=tenant_id) == []
    assert not Receipt.objects.filter(tenant_id=tenant_id).exists()


def test_erasing_twice_is_harmless(cast: Cast) -> None:
    fill(cast.alice, cast)
    name = answer("erase_tenant", "Alice's", "--yes")["name"]
    assert not any(answer("erase_tenant", name, "--yes")["counts"].values())
    assert audit.audit().is_clean


def test_people_with_another_tenant_or_a_role_keep_their_account(cast: Cast) -> None:
    both, operator = User.objects.create_user("both"), User.objects.create_user("olga", is_staff=True)
    for person in (both, operator):
        Membership.objects.create(tenant=cast.alice.tenant, user=person)
    Membership.objects.create(tenant=cast.bob.tenant, user=both)
    said("erase_tenant", "Alice's", "--yes")
    assert {user.username for user in User.objects.all()} == {"both", "olga"}
    assert [row.tenant_id for row in Membership.objects.all()] == [cast.bob.tenant.pk]


def test_the_name_is_asked_for_again(
    cast: Cast, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("Bob's\n", "\n", ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(words))
        with pytest.raises(CommandError, match="was not repeated: nothing was erased"):
            said("erase_tenant", "Alice's")
    assert Tenant.objects.filter(name="Alice's", status="active").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("Bob's\n"))
    capsys.readouterr()
    with pytest.raises(CommandError):
        call_command("erase_tenant", "Alice's", "--json")
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["code"] == "not_confirmed" and "Its name again: " in told.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Alice's\n"))
    assert "is erased" in said("erase_tenant", "Alice's")
    assert not Tenant.objects.filter(name="Alice's").exists()


def test_a_tenant_with_requests_or_batches_is_not_erased_unless_they_are_cancelled(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "PATIENCE_SECONDS", 0.0)
    tickets = queue.ticket_queue()
    waiting = ticket(tenant_id=cast.alice.tenant.pk, key_id=cast.alice.key.pk, quota_key_id=cast.alice.key.pk)
    tickets.beat("worker-1", POOL, 1, {"models": []})
    tickets.put(waiting)
    code, message = failure("erase_tenant", "Alice's", "--yes")
    assert code == "tenant_busy" and "1 requests" in message
    batch = make_batch(cast.alice, make_file(cast.alice))
    assert "1 batches" in failure("erase_tenant", "Alice's", "--yes")[1]
    assert Tenant.objects.filter(name="Alice's", status="active").exists()
    assert APIKey.objects.get(pk=cast.alice.key.pk).revoked_at is None
    said("erase_tenant", "Alice's", "--yes", "--now")
    assert tickets.live_requests(tenant_id=cast.alice.tenant.pk) == []
    assert tickets.state(waiting.request_id) is None, "its ticket is gone"
    assert not type(batch).objects.filter(pk=batch.pk).exists()
    assert not files.path_of(cast.alice.tenant.pk, "").exists()


@pytest.mark.api
def test_workers_forget_a_tenant_in_memory_and_on_disk_and_nobody_else(site: InProcessSite) -> None:
    alice, bob = site.cast.alice, site.cast.bob
    for customer in (alice, bob):
        site.ask(customer, FRANCE, 1)
        assert act(site.client(customer), 1, "save", "diary").status_code == 200
    assert holdings.leave(alice.tenant) == []
    found = answer("slots")
    assert {row["tenant"] for row in (*found["slots"], *found["states"])} == {"Bob's"}
    assert computed(site.ask(alice, FRANCE, 1)) == 20, "its prompt is computed anew"
    assert computed(site.ask(bob, FRANCE, 1)) < 20


@pytest.mark.api
def test_a_running_request_ends_is_charged_and_leaves_nothing(site: InProcessSite) -> None:
    site.speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    alice = site.cast.alice
    request_id = site.ask(alice, FRANCE, 1, wait=False, max_tokens=200)["request_id"]
    wait_until(lambda: site.num_running() == 1)
    assert failure("erase_tenant", "Alice's", "--yes")[0] == "tenant_busy"
    told = answer("erase_tenant", "Alice's", "--yes", "--now")
    assert told["problems"] == []
    used, reserved = site.charged(alice)
    assert used >= len(FRANCE) and reserved == 0, "what was computed is charged"
    assert audit.audit().is_clean
    assert rows_with(request_id).keys() == {key for key in rows_with(request_id) if "Ledger" in key or "Reserv" in key}
    left = [name for name in queue.ticket_queue().client.scan_iter() if request_id.encode() in name]
    assert left == []
    assert not list((Path(hosted.slot_files()._folder)).glob(f"{alice.tenant.pk}/*"))
