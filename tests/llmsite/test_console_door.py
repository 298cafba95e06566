"""What every page of the console carries; sessions that end; scripts in names that do nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import time_machine
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.test import Client
from django.urls import reverse

from llmsite.console import door as console_door
from tests.accounts.test_roles import HOSTILE, House, house, page, registered  # noqa: F401  a fixture
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

PASSWORD = "a long password for tests"


class Scripts(HTMLParser):
    """Everything in a page that a browser would run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "script" and not named.get("src") and named.get("type") not in ("application/json",):
            self.found.append(f"<script> at {self.getpos()}")
        if tag in ("iframe", "object", "embed", "base"):
            self.found.append(tag)
        self.found += [f"{name}={value}" for name, value in attrs if name.startswith("on")]
        self.found += [f"{name}={value}" for name, value in attrs if (value or "").strip().startswith("javascript:")]


def directives(policy: str) -> dict[str, list[str]]:
    return {words[0]: words[1:] for words in (part.split() for part in policy.split(";"))}


def check_headers(answer: Any) -> None:
    policy = directives(answer["Content-Security-Policy"])
    assert policy["default-src"] == ["'none'"] and policy["frame-ancestors"] == ["'none'"]
    assert policy["base-uri"] == ["'none'"] and policy["form-action"] == ["'self'"]
    assert not {"'unsafe-inline'", "*", "https:", "data:"} & set(policy["script-src"])
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert answer["Referrer-Policy"] == "same-origin" and answer["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "camera=()" in answer["Permissions-Policy"]


def test_every_page_has_its_headers_and_none_has_a_script_whatever_names_say(house: House) -> None:  # noqa: F811
    """Lists, rows, histories, forms with errors, confirmations of actions, the dashboard: of every registered model."""
    client = house.client("superuser")
    addresses = [
        reverse("admin:index"),
        reverse("admin:password_change"),
        reverse("admin:search") + "?s=script&extended=1",
    ]
    seen = 0
    for label in registered():
        addresses += [
            page(label, "changelist"),
            page(label, "changelist") + "?q=%3Cscript%3Ealert(1)%3C/script%3E",
            page(label, "add"),
        ]
        for rows in (house.alices, house.common):
            if (row := rows.get(label)) is not None:
                addresses += [page(label, name, row.pk) for name in ("change", "history", "delete")]
    for address in addresses:
        answer = client.get(address)
        assert answer.status_code in (200, 403), address
        text = answer.content.decode()
        check_headers(answer)
        assert "no-store" in answer["Cache-Control"], address
        assert not Scripts(text).found, f"{address}: {Scripts(text).found}"
        assert HOSTILE not in text, address
        seen += "&lt;script&gt;" in text
    assert seen > 20, "the names were on the pages"


def test_the_page_of_a_new_key_has_no_script_either(house: House) -> None:  # noqa: F811
    key = house.cast.alice.key
    chosen = {"action": "rotate_now", "_selected_action": [key.pk]}
    answer = house.client("superuser").post(page("accounts.apikey", "changelist"), chosen)
    text = answer.content.decode()
    assert re.search(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}", text) and not Scripts(text).found
    check_headers(answer)


@pytest.mark.parametrize(
    "address", ["/docs/", "/admin/login/", "/openapi.json", "/nothing-is-here", "/admin/nothing-is-here"]
)
def test_public_pages_have_them_too(client: Client, address: str) -> None:
    answer = client.get(address, follow=True)
    check_headers(answer)
    assert not Scripts(answer.content.decode()).found or "json" in answer["Content-Type"]


def test_answers_that_repeat_hostile_words_are_json(house: House, client: Client) -> None:  # noqa: F811
    for address in ("/v1/admin/tenants", "/v1/admin/keys", "/v1/admin/batches", "/v1/admin/refusals", "/v1/admin/logs"):
        answer = client.get(address, headers={"X-API-Key": house.cast.operator.text})
        assert answer.status_code == 200 and answer["Content-Type"].startswith("application/json")
        assert answer["X-Content-Type-Options"] == "nosniff"


# Sessions


@pytest.fixture
def signed_in(db: None, client: Client) -> Client:
    User.objects.create_superuser("root", password=PASSWORD)
    client.post(reverse("admin:login"), {"username": "root", "password": PASSWORD})
    return client


def is_in(client: Client) -> bool:
    return client.get(reverse("admin:index")).status_code == 200


def test_the_session_has_a_new_key_after_the_sign_in_and_hardened_cookies(db: None, client: Client) -> None:
    User.objects.create_superuser("root", password=PASSWORD)
    client.get(reverse("admin:login"))
    session = client.session
    session["planted"] = True
    session.save()
    client.cookies["sessionid"] = str(session.session_key)
    answer = client.post(reverse("admin:login"), {"username": "root", "password": PASSWORD})
    cookie = answer.cookies["sessionid"]
    assert cookie.value != session.session_key and not Session.objects.filter(pk=session.session_key).exists()
    assert cookie["httponly"] and cookie["samesite"] == "Lax" and is_in(client)
    before = client.session.session_key
    new = {"old_password": PASSWORD, "new_password1": "quite another one 77", "new_password2": "quite another one 77"}
    client.post(reverse("admin:password_change"), new)
    assert client.session.session_key != before and is_in(client)


def test_an_idle_session_ends_and_one_in_use_does_not(signed_in: Client) -> None:
    import time

    now = time.time()
    for minutes in (50, 100, 150):
        with time_machine.travel(now + minutes * 60, tick=False):
            assert is_in(signed_in), "somebody was there less than an hour ago"
    with time_machine.travel(now + (150 + 61) * 60, tick=False):
        assert not is_in(signed_in)
    assert not is_in(signed_in), "it does not come back"


def test_a_page_that_shows_itself_anew_keeps_no_session_open(signed_in: Client) -> None:
    """A dashboard that was left on a screen asks again every ten seconds; nobody need be there."""
    import time

    now = time.time()
    for minutes in (50, 59):
        with time_machine.travel(now + minutes * 60, tick=False):
            answer = signed_in.get(reverse("console-board"), headers={"X-Requested-With": "fetch"})
            assert answer.status_code == 200
    with time_machine.travel(now + 61 * 60, tick=False):
        assert not is_in(signed_in)


def test_what_pages_send_of_themselves_is_what_the_door_knows() -> None:
    (name,) = console_door.BY_ITSELF
    for script in ("dashboard.js", "background.js"):
        text = (REPOSITORY / "llmsite/static/llmsite" / script).read_text()
        assert f'"{name}": "{console_door.BY_ITSELF[name]}"' in text


def test_a_session_in_use_ends_after_twelve_hours(signed_in: Client) -> None:
    import time

    now = time.time()
    for minutes in range(50, 12 * 60, 50):
        with time_machine.travel(now + minutes * 60, tick=False):
            assert is_in(signed_in)
    with time_machine.travel(now + 12 * 3600 + 60, tick=False):
        assert not is_in(signed_in)


def test_a_page_does_not_write_the_session_each_time(signed_in: Client, django_assert_num_queries: Any) -> None:
    is_in(signed_in)
    before = Session.objects.get().session_data
    is_in(signed_in)
    assert Session.objects.get().session_data == before
    assert console_door.SEEN_EVERY_SECONDS == 60


def test_who_leaves_a_tenant_is_out_at_once(house: House) -> None:  # noqa: F811
    client = house.client("viewer")
    assert is_in(client)
    house.people["viewer"].memberships.all().delete()
    assert not is_in(client)


def test_people_of_tenants_sign_in_with_their_password(house: House, client: Client) -> None:  # noqa: F811
    for name, enters in (("viewer", True), ("operator", True), ("nobody", False)):
        client.logout()
        client.post(reverse("admin:login"), {"username": name, "password": PASSWORD})
        assert is_in(client) == enters


@pytest.mark.parametrize(
    "address", ["requests/%00/", "inference/receipt/?finish_reason=%00", "accounts/tenant/?q=a%00b"]
)
def test_a_nul_in_an_address_is_a_bad_request(house: House, address: str) -> None:  # noqa: F811
    answer = house.client("superuser").get(f"/admin/{address}")
    assert answer.status_code == 400
    assert "NUL" in answer.content.decode()
