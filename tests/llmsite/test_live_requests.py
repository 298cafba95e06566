"""Requests that wait or run, as the console shows them, and cancels them."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse

from accounts.models import Membership
from inference.transport import queue
from llmsite.console import live_requests
from tests.conftest import Cast
from tests.inference.flow import POOL, ticket

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
PAGE = reverse("console-live-requests")
CANCEL = reverse("console-cancel-request")


def test_what_waits_and_runs_is_shown_and_cancelled(client: Client, cast: Cast) -> None:
    tickets = queue.ticket_queue()
    running, waiting = (
        ticket(tenant_id=who.tenant.pk, key_id=who.key.pk, quota_key_id=who.key.pk) for who in (cast.alice, cast.bob)
    )
    tickets.beat("worker-1", POOL, 1, {"models": []})
    tickets.put(running)
    assert tickets.take(POOL, "worker-1", [1]) is not None
    tickets.put(waiting)
    client.force_login(User.objects.create_superuser("operator", password="a long password for tests"))
    page = client.get(PAGE).content.decode()
    assert page.index(running.request_id) < page.index(waiting.request_id)
    assert "Alice&#x27;s" in page and "worker-1" in page
    said = client.post(CANCEL, {"request_id": waiting.request_id}, follow=True).content.decode()
    assert f"{waiting.request_id} is cancelled" in said
    state = tickets.state(waiting.request_id)
    assert state is None or state.state == "done"
    assert "is not known" in client.post(CANCEL, {"request_id": "nothing"}, follow=True).content.decode()


def test_who_may_only_look_cannot_cancel_and_charlie_sees_nothing(client: Client, cast: Cast) -> None:
    charlie = User.objects.create_user("charlie", is_staff=True)
    client.force_login(charlie)
    assert client.get(PAGE).status_code == 403
    charlie.user_permissions.add(Permission.objects.get(codename="view_receipt"))
    assert "Nothing waits and nothing runs" in client.get(PAGE).content.decode()
    assert client.post(CANCEL, {"request_id": "nothing"}).status_code == 403


def test_a_member_sees_their_own_whatever_runs_for_others(
    client: Client, cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_requests, "MOST_SHOWN", 2)
    tickets, alice = queue.ticket_queue(), {"tenant_id": cast.alice.tenant.pk, "key_id": cast.alice.key.pk}
    tickets.beat("worker-1", POOL, 4, {"models": []})
    for _ in range(3):
        tickets.put(ticket(tenant_id=cast.bob.tenant.pk, key_id=cast.bob.key.pk))
    for _ in range(3):
        assert tickets.take(POOL, "worker-1", [1]) is not None
    own = ticket(**alice)
    tickets.put(own)
    person = User.objects.create_user("alice", is_staff=True)
    Membership.objects.create(tenant=cast.alice.tenant, user=person)
    client.force_login(person)
    page = client.get(PAGE).content.decode()
    assert own.request_id in page and "waiting" in page
    assert "Bob" not in page
    assert tickets.take(POOL, "worker-1", [1]) is not None
    page = client.get(PAGE).content.decode()
    assert own.request_id in page and "running" in page and "worker-1" not in page
