"""Sign-ins in the audit log: who came in, who left, who was refused, and no secret among it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import time_machine
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from accounts.limits import throttling
from accounts.models import AuditEntry

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

PASSWORD = "a long password for tests"
ADDRESS = "192.0.2.7"
KINDS = ("sign-in", "sign-out", "refused", "locked")


@pytest.fixture
def root(db: None) -> User:
    return User.objects.create_superuser("root", password=PASSWORD)


@pytest.fixture
def _one_minute() -> Iterator[None]:
    """Passwords are slow to check: on a busy machine a minute would end in between."""
    with time_machine.travel(time.time(), tick=False):
        yield


def post(client: Client, name: str, password: str, address: str = ADDRESS) -> Any:
    body = {"username": name, "password": password}
    return client.post(reverse("admin:login"), body, REMOTE_ADDR=address)


def entries() -> list[AuditEntry]:
    return list(AuditEntry.objects.filter(action__in=KINDS).order_by("pk"))


def test_who_comes_and_goes_is_written_with_the_address(root: User, client: Client) -> None:
    post(client, "root", PASSWORD)
    client.post(reverse("admin:logout"), REMOTE_ADDR=ADDRESS)
    came, left = entries()
    assert (came.action, left.action) == ("sign-in", "sign-out")
    for entry in (came, left):
        assert (entry.actor_kind, entry.actor, entry.model, entry.row) == ("person", "root", "auth.user", str(root.pk))
        assert entry.diff == {"address": [None, ADDRESS]}


def test_a_session_that_was_idle_for_too_long_signs_out(root: User, client: Client) -> None:
    post(client, "root", PASSWORD)
    with time_machine.travel(time.time() + 61 * 60, tick=False):
        client.get(reverse("admin:index"))
    assert [entry.action for entry in entries()] == ["sign-in", "sign-out"]


def test_who_is_refused_is_written_with_the_reason(root: User, client: Client) -> None:
    User.objects.create_user("nobody", password=PASSWORD)
    post(client, "root", "a wrong one")
    post(client, "nobody", PASSWORD)
    wrong, stranger = entries()
    assert {entry.action for entry in (wrong, stranger)} == {"refused"}
    assert (wrong.actor_kind, wrong.actor, wrong.name) == ("unknown", ADDRESS, "root")
    assert wrong.diff == {"address": [None, ADDRESS], "reason": [None, "wrong password"]}
    assert stranger.name == "nobody" and stranger.diff["reason"] == [None, "no access"]


def test_no_password_is_written_in_whichever_field_it_was_typed(root: User, client: Client) -> None:
    post(client, PASSWORD, "root")
    post(client, "root", f"{PASSWORD}!")
    post(client, "", PASSWORD)
    everything = json.dumps(list(AuditEntry.objects.filter(action__in=KINDS).values("diff", "name", "actor", "row")))
    assert PASSWORD not in everything and len(entries()) >= 2
    assert entries()[0].name == "" and entries()[0].model == "auth.user"


@pytest.mark.usefixtures("_one_minute")
def test_an_address_that_is_locked_is_written_once(root: User, client: Client) -> None:
    for _ in range(throttling.LOGINS_PER_MINUTE + 5):
        answer = post(client, "root", "a wrong one")
    assert "Too many wrong passwords" in answer.content.decode()
    actions = [entry.action for entry in entries()]
    assert actions == ["refused"] * throttling.LOGINS_PER_MINUTE + ["locked"]
    locked = entries()[-1]
    assert locked.actor == ADDRESS and 1 <= locked.diff["seconds"][1] <= 60
    assert "Too many" in post(client, "root", PASSWORD).content.decode(), "a right password waits, too"
    assert post(client, "root", PASSWORD, "192.0.2.8").status_code == 302, "from elsewhere it does not"


@pytest.mark.usefixtures("_one_minute")
def test_a_flood_of_wrong_passwords_does_not_fill_the_log(
    root: User, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "NOTED_LOGINS_PER_MINUTE", 5)
    for number in range(12):
        post(client, "root", "a wrong one", f"192.0.2.{number}")
    assert len(entries()) == 5


def test_the_page_of_the_log_shows_them(root: User, client: Client) -> None:
    post(client, "root", "a wrong one", "<script>alert(1)</script>")
    post(client, "root", PASSWORD)
    page = client.get(reverse("admin:accounts_auditentry_changelist") + "?action__exact=refused").content.decode()
    assert "Sign-in refused" in page and "<script>alert(1)" not in page
    entry = AuditEntry.objects.get(action="refused")
    assert len(entry.actor) <= 45
    page = client.get(reverse("admin:accounts_auditentry_change", args=[entry.pk])).content.decode()
    assert "wrong password" in page and "<script>alert(1)" not in page


def test_a_new_password_and_a_lost_role_end_every_other_session(root: User) -> None:
    here, there = Client(), Client()
    for client in (here, there):
        post(client, "root", PASSWORD)
    new = "quite another one 77"
    changed = {"old_password": PASSWORD, "new_password1": new, "new_password2": new}
    here.post(reverse("admin:password_change"), changed)
    assert here.get(reverse("admin:index")).status_code == 200
    assert there.get(reverse("admin:index")).status_code == 302
    User.objects.filter(pk=root.pk).update(is_active=False)
    assert here.get(reverse("admin:index")).status_code == 302
    assert "sign-in" not in [entry.action for entry in entries()[2:]]


def test_cookies_of_an_installation_with_tls_travel_by_tls_alone(root: User, settings: Any) -> None:
    settings.SESSION_COOKIE_SECURE = settings.CSRF_COOKIE_SECURE = True
    client = Client()
    client.get(reverse("admin:login"))
    answer = post(client, "root", PASSWORD)
    for name in ("sessionid", "csrftoken"):
        assert answer.cookies[name]["secure"] and answer.cookies[name]["samesite"] == "Lax"
    assert answer.cookies["sessionid"]["httponly"] and not answer.cookies["sessionid"]["domain"]
