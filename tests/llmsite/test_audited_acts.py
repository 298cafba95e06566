"""What operators do that changes no watched row is in the audit log all the same, whichever way it is done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.models import AuditEntry, Membership, Tenant
from inference import stored_responses
from inference.catalog import registry
from inference.imports import desk
from inference.imports.models import ModelImport
from inference.models import ServedModel, StoredResponse
from inference.transport import model_orders, queue
from tests.accounts.test_commands import said
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
Act = Callable[[Client, Cast, ServedModel, str], Any]


@pytest.fixture
def console(client: Client, db: None) -> Client:
    client.force_login(User.objects.create_superuser("olga", password="a long password for tests"))
    return client


def acts() -> list[tuple[str, str, dict[str, Any]]]:
    """(actor's kind, actor, diff), oldest first."""
    found = AuditEntry.objects.filter(action="change").exclude(model="auth.user").order_by("pk")
    return [(entry.actor_kind, entry.actor.rpartition(": ")[2], entry.diff) for entry in found]


# Models


@pytest.fixture
def model(db: None) -> Iterator[ServedModel]:
    row = ServedModel.objects.create(name="small", path="/s.gguf", digest="a" * 64, n_ctx=64, n_slots=1)
    registry.forget()
    yield row
    registry.forget()


def listed(console: Client, cast: Cast, model: ServedModel, action: str) -> Any:
    data = {"action": f"{action}_now", "_selected_action": [model.pk], "previewed": "yes"}
    return console.post(reverse("admin:inference_servedmodel_changelist"), data)


def on_its_page(console: Client, cast: Cast, model: ServedModel, action: str) -> Any:
    return console.post(reverse("console-model-order", args=[model.pk]), {"action": action})


def by_api(console: Client, cast: Cast, model: ServedModel, action: str) -> Any:
    data, headers = {"model_id": "small"}, cast.operator.headers
    return Client().post(f"/v1/admin/models/{action}", data, content_type="application/json", headers=headers)


def by_command(console: Client, cast: Cast, model: ServedModel, action: str) -> Any:
    with contextlib.suppress(CommandError):  # where no worker listens
        return said(f"{action}_model", "small", *(("--no-wait",) if action == "load" else ()))


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize(
    ("act", "who"),
    [
        (listed, ("person", "olga")),
        (on_its_page, ("person", "olga")),
        (by_api, ("key", "")),
        (by_command, ("command", "")),
    ],
)
def test_loads_and_unloads_are_noted_wherever_they_come_from(
    console: Client, cast: Cast, model: ServedModel, valkey: Any, act: Act, who: tuple[str, str], action: str
) -> None:
    tickets = queue.ticket_queue()
    report = {
        "id": model.pk,
        "state": "ready" if action == "unload" else "unloaded",
        "error": "",
        "slots": 1,
        "busy": 0,
    }
    tickets.beat("worker-1", model.pool, 1, {"models": [report]})
    before = acts()
    act(console, cast, model, action)
    assert acts() == before, "no worker listens: nothing was ordered"
    listener = valkey.pubsub()
    listener.subscribe(model_orders.channel_of("worker-1"))
    assert listener.get_message(timeout=5)["type"] == "subscribe"
    act(console, cast, model, action)
    ((kind, actor, diff),) = acts()[len(before) :]
    assert (kind, diff) == (who[0], {"ordered": [None, action]}) and who[1] in actor
    entry = AuditEntry.objects.latest("pk")
    assert (entry.model, entry.row, entry.name) == ("inference.servedmodel", str(model.pk), "small")
    listener.close()


# The playground


def played(console: Client, key: Any) -> int:
    address = f"{reverse('console-playground-run')}?key={key.pk}"
    return console.post(address, "{}", content_type="application/json").status_code


def test_an_operator_who_plays_with_a_tenants_key_is_noted_once_a_session(console: Client, cast: Cast) -> None:
    for key in (cast.alice.key, cast.alice.key, cast.bob.key):
        assert played(console, key) == 200
    noted = AuditEntry.objects.filter(diff__has_key="used in the playground").order_by("pk")
    assert [(entry.actor, entry.row) for entry in noted] == [
        ("olga", str(cast.alice.key.pk)),
        ("olga", str(cast.bob.key.pk)),
    ]
    console.logout()
    console.force_login(User.objects.get(username="olga"))
    assert played(console, cast.alice.key) == 200
    assert noted.all().count() == 3, "another session"


def test_who_plays_with_a_key_of_their_own_tenant_is_not_noted(client: Client, cast: Cast) -> None:
    alice = User.objects.create_user("alice")
    Membership.objects.create(tenant=cast.alice.tenant, user=alice, role="member")
    client.force_login(alice)
    assert played(client, cast.alice.key) == 200
    assert played(client, cast.bob.key) == 404
    assert not AuditEntry.objects.filter(diff__has_key="used in the playground").exists()


# Imports


def test_imports_are_noted_when_they_are_asked_for_and_cancelled(console: Client, cast: Cast) -> None:
    form = {"kind": "model", "name": "by-page"}
    assert console.post(reverse("admin:inference_modelimport_add"), form).status_code == 302
    headers = cast.operator.headers
    asked = Client().post(
        "/v1/admin/imports", {"kind": "model", "name": "by-api"}, content_type="application/json", headers=headers
    )
    assert asked.status_code == 201, asked.content
    page, api = ModelImport.objects.order_by("pk")
    for row in (page, api):
        wanted = {"kind": "model", "name": row.name, "from": "an upload"}
        kind, _, diff = acts()[-2 if row is page else -1]
        assert (kind, diff) == ("person" if row is page else "key", {"asked for": [None, wanted]})
    data = {"action": "cancel", "_selected_action": [page.pk], "previewed": "yes"}
    console.post(reverse("admin:inference_modelimport_changelist"), data)
    assert acts()[-1] == ("person", "olga", {"state": ["receiving", "cancelled"]})
    assert Client().delete(f"/v1/admin/imports/{api.pk}", headers=headers).status_code == 200
    assert acts()[-1][0] == "key" and acts()[-1][2] == {"state": ["receiving", "cancelled"]}
    number = len(acts())
    said("imports", "cancel", page.pk)
    assert len(acts()) == number, "it had ended"


def test_an_address_is_noted_without_what_may_be_secret(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "url_of", lambda text: text)
    desk.ask(desk.Asked(kind="model", name="small", url="https://example.org/small.gguf?token=secret"))
    entry = AuditEntry.objects.latest("pk")
    assert entry.diff["asked for"][1]["from"] == "https://example.org/small.gguf"
    assert "secret" not in str(entry.diff)


# Stored responses


def test_stored_responses_that_are_erased_are_noted(cast: Cast) -> None:
    tenant: Tenant = cast.alice.tenant
    common = {"content": b"x", "num_bytes": 1, "created_at": timezone.now()}
    for number in range(3):
        StoredResponse.objects.create(id=f"resp_{number}", tenant=tenant, **common)
    said("stored_responses", "--tenant", "Alice's", "--erase")
    assert acts()[-1] == ("command", "stored_responses", {"stored responses": [3, 0]})
    number = len(acts())
    assert stored_responses.erase(tenant) == 0 and len(acts()) == number, "there was nothing"
