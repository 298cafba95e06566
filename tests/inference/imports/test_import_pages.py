"""The console's pages of imports: begin one, see how far it is, cancel it; who may, and what no page shows."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from accounts.models import Membership, StaffRole
from inference.imports import desk, importer, quarantine
from inference.imports.admin import shown
from inference.imports.models import ModelImport
from inference.models import ServedModel
from inference.vetting.inspection import RegistrationError
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db, pytest.mark.usefixtures("own_state")]
ADD = "/admin/inference/modelimport/add/"
LIST = "/admin/inference/modelimport/"


@pytest.fixture
def console(client: Client) -> Client:
    user = User.objects.create_user("operator", password="not a real password")
    StaffRole.objects.create(user=user, role=StaffRole.Role.OPERATOR)
    client.force_login(user)
    return client


def added(console: Client, **fields: Any) -> Any:
    return console.post(ADD, {"kind": "model", "name": "new", "visibility": "", **fields}, follow=True)


def test_an_upload_is_begun_and_its_page_takes_the_file(console: Client) -> None:
    page = added(console, visibility="granted", sha256="a" * 64)
    row = ModelImport.objects.get()
    assert page.redirect_chain[-1][0] == reverse("admin:inference_modelimport_change", args=[row.pk])
    text = page.content.decode()
    assert f'data-upload="/v1/admin/imports/{row.pk}/content"' in text and "llmsite/background.js" in text
    assert "data-open" in text and "<script>" not in text and "onclick" not in text
    assert (row.name, row.visibility, row.sha256, row.asked_by) == ("new", "granted", "a" * 64, "operator")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "no blanks"}, "Use 1 to 100 letters"),
        ({"kind": "adapter"}, "Choose the model that the adapter is for."),
        ({"sha256": "12"}, "64 digits"),
        ({"url": "https://example.org/a.gguf"}, "FETCH_HOSTS does not name it"),
        ({"url": "gopher://x"}, "Only http:// and https://"),
        ({"name": "tiny"}, "already"),
    ],
)
def test_mistakes_are_told_at_their_field(
    console: Client, tiny: ServedModel, fields: dict[str, str], words: str
) -> None:
    page = added(console, **fields)
    assert page.status_code == 200 and words in page.content.decode() and not ModelImport.objects.exists()


def test_the_state_shows_itself_anew(console: Client, server: str) -> None:
    added(console, url=f"{server}/tiny.gguf")
    row = ModelImport.objects.get()
    state = reverse("admin:inference_modelimport_state", args=[row.pk])
    assert console.get(state).content.decode() == shown(row)
    desk.note(row, total_bytes=4_000_000, received_bytes=1_000_000, bytes_per_second=500_000.0)
    words = console.get(state).content.decode().replace("\u00a0", " ")
    assert "Receiving: 1.0 MB of 4.0 MB, 500 kB/s, 6.00 s left" in words and "data-open" in words
    hostile = "<script>alert(1)</script>"
    with quarantine.held(row.pk):
        desk.refuse(row, RegistrationError("gguf_malformed", hostile))
    words = console.get(state).content.decode()
    assert "Refused: &lt;script&gt;" in words and "data-open" not in words and hostile not in words
    assert hostile not in console.get(LIST).content.decode()


def test_imports_are_cancelled_and_never_changed(console: Client) -> None:
    added(console)
    row = ModelImport.objects.get()
    page = reverse("admin:inference_modelimport_change", args=[row.pk])
    assert console.post(page, {"name": "other"}).status_code == 403
    console.post(LIST, {"action": "cancel", "_selected_action": [row.pk]})
    row.refresh_from_db()
    assert (row.state, row.name) == ("cancelled", "new")
    assert "data-upload" not in console.get(page).content.decode()


def test_auditors_look_and_do_nothing_and_people_of_tenants_see_nothing(
    console: Client, client: Client, cast: Cast
) -> None:
    added(console)
    row = ModelImport.objects.get()
    pages = (LIST, reverse("admin:inference_modelimport_change", args=[row.pk]))
    state = reverse("admin:inference_modelimport_state", args=[row.pk])
    auditor, owner = User.objects.create_user("auditor"), User.objects.create_user("owner")
    StaffRole.objects.create(user=auditor, role=StaffRole.Role.AUDITOR)
    Membership.objects.create(user=owner, tenant=cast.charlie.tenant, role="owner")
    client.force_login(auditor)
    assert all(client.get(page).status_code == 200 for page in (*pages, state))
    assert "data-upload" not in client.get(pages[1]).content.decode()
    assert client.get(ADD).status_code == 403 and added(client, name="b").status_code == 403
    client.post(LIST, {"action": "cancel", "_selected_action": [row.pk]})
    row.refresh_from_db()
    assert row.is_open
    client.force_login(owner)
    assert all(client.get(page).status_code in (403, 404) for page in (*pages, state, ADD))
    client.logout()
    assert client.get(state).status_code == 302


def test_an_import_is_cancelled_from_its_page_while_it_is_open(console: Client) -> None:
    added(console)
    row = ModelImport.objects.get()
    page, button = (reverse(f"admin:inference_modelimport_{name}", args=[row.pk]) for name in ("change", "cancel_this"))
    assert f'formaction="{button}"' in console.get(page).content.decode()
    assert console.get(button).status_code == 405
    assert "It is cancelled" in console.post(button, follow=True).content.decode()
    row.refresh_from_db()
    assert row.state == "cancelled"
    told = console.post(button, follow=True).content.decode()
    assert "had ended already" in told and "formaction" not in told
    auditor = User.objects.create_user("auditor")
    StaffRole.objects.create(user=auditor, role=StaffRole.Role.AUDITOR)
    console.force_login(auditor)
    assert console.post(button).status_code == 403


def test_a_signed_address_is_shown_without_its_signature(console: Client, server: str) -> None:
    added(console, url=f"{server}/none.gguf?X-Signature=s3cret")
    row = ModelImport.objects.get()
    importer.work(row, threading.Event())
    row.refresh_from_db()
    assert row.state == "refused" and "/none.gguf?… answered 404" in row.problem
    auditor = User.objects.create_user("auditor")
    StaffRole.objects.create(user=auditor, role=StaffRole.Role.AUDITOR)
    console.force_login(auditor)
    text = console.get(reverse("admin:inference_modelimport_change", args=[row.pk])).content.decode()
    assert "/none.gguf?…" in text and "s3cret" not in text + console.get(LIST).content.decode()
