"""The playground: whose keys a person may use, and the API's own answer for them, on the console's door."""

from __future__ import annotations

import json

import pytest
from django.contrib.auth.models import User
from django.test import AsyncClient, Client
from django.urls import reverse

from accounts.identity import issuing
from accounts.models import LimitRule, Membership, StaffRole, Tenant  # noqa: F401
from inference.models import ServedModel
from tests.conftest import Cast, Customer

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
PAGE = reverse("console-playground")


@pytest.fixture
def model(db: None) -> ServedModel:
    return ServedModel.objects.create(name="tiny", path="/models/tiny.gguf", digest="0" * 64, is_default=True)


@pytest.fixture
def operator(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("operator", password="a long password for tests"))
    return client


def member(who: Customer, role: str = "member") -> User:
    person = User.objects.create_user(f"{role} of {who.tenant}", is_staff=True)
    Membership.objects.create(tenant=who.tenant, user=person, role=role)
    return person


def run_url(who: Customer) -> str:
    return f"{reverse('console-playground-run')}?key={who.key.pk}"


def test_an_operator_may_choose_any_tenants_key(operator: Client, cast: Cast, model: ServedModel) -> None:
    page = operator.get(PAGE, {"key": cast.bob.key.pk}).content.decode()
    assert "Alice&#x27;s: main" in page and f'<option value="{cast.bob.key.pk}" selected>' in page
    assert '"name": "tiny"' in page
    assert "Operator: main" not in page  # its key cannot generate
    assert cast.bob.text not in page and cast.bob.key.secret_hash not in page


def test_a_member_has_the_keys_of_their_tenant_and_charlies_are_not_there(
    client: Client, cast: Cast, model: ServedModel
) -> None:
    client.force_login(member(cast.alice))
    page = client.get(PAGE).content.decode()
    assert "Alice&#x27;s: main" in page and "Charlie" not in page and "Bob" not in page
    assert client.get(PAGE, {"key": cast.charlie.key.pk}).status_code == 404
    assert client.post(run_url(cast.charlie), "{}", content_type="application/json").status_code == 404


def test_an_auditor_who_belongs_to_a_tenant_has_its_keys_alone(client: Client, cast: Cast, model: ServedModel) -> None:
    person = member(cast.alice, "owner")
    StaffRole.objects.create(user=person, role=StaffRole.Role.AUDITOR)
    client.force_login(person)
    page = client.get(PAGE).content.decode()
    assert "Alice&#x27;s: main" in page and "Bob" not in page
    assert client.post(run_url(cast.bob), "{}", content_type="application/json").status_code == 404


def test_to_look_at_the_page_is_no_use_of_a_key(operator: Client, cast: Cast, model: ServedModel) -> None:
    operator.get(PAGE, {"key": cast.bob.key.pk})
    cast.bob.key.refresh_from_db()
    assert cast.bob.key.last_used_at is None


def test_a_viewer_and_a_stranger_have_no_key(client: Client, cast: Cast) -> None:
    client.force_login(member(cast.alice, "viewer"))
    assert "A key is needed" in client.get(PAGE).content.decode()
    assert client.post(run_url(cast.alice), "{}", content_type="application/json").status_code == 404
    client.logout()
    assert client.get(PAGE).status_code == 302
    assert client.post(run_url(cast.alice), "{}", content_type="application/json").status_code == 302


def test_the_form_of_another_site_asks_nothing(cast: Cast, operator: Client) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.cookies = operator.cookies
    assert strict.post(run_url(cast.alice), "{}", content_type="application/json").status_code == 403


def test_a_key_that_has_ended_is_refused(operator: Client, cast: Cast) -> None:
    issuing.revoke(cast.alice.key)
    assert operator.post(run_url(cast.alice), "{}", content_type="application/json").status_code == 403
    Tenant.objects.filter(pk=cast.bob.tenant.pk).update(status="suspended")
    assert operator.post(run_url(cast.bob), "{}", content_type="application/json").status_code == 403


def test_names_are_text_on_the_page(operator: Client, cast: Cast, model: ServedModel) -> None:
    Tenant.objects.filter(pk=cast.alice.tenant.pk).update(name="<script>alert(1)</script>")
    assert "<script>alert" not in operator.get(PAGE).content.decode()


@pytest.mark.django_db(transaction=True)
async def test_the_apis_own_refusal_is_told(async_client: AsyncClient, cast: Cast) -> None:
    user = await User.objects.acreate(username="operator", is_staff=True, is_superuser=True)
    await async_client.aforce_login(user)
    answer = await async_client.post(run_url(cast.alice), {"prompt": "Hello"}, content_type="application/json")
    assert answer.status_code == 200
    said = b"".join([part async for part in answer]).decode()
    blocks = [block.split("\n") for block in said.split("\n\n") if block]
    assert [lines[0] for lines in blocks] == ["event: answer", "event: reply"]
    told, reply = (json.loads(lines[1].removeprefix("data: ")) for lines in blocks)
    assert told["status"] == 503 and reply["code"] == "no_model"
    assert told["request_id"] == reply["request_id"]


def test_a_tenants_row_leads_to_the_playground_with_its_keys(operator: Client, cast: Cast, model: ServedModel) -> None:
    address = f"{PAGE}?tenant={cast.bob.tenant.pk}"
    assert f'href="{address}"' in operator.get(reverse("admin:accounts_tenant_changelist")).content.decode()
    page = operator.get(address).content.decode()
    assert "Bob&#x27;s: main" in page and "Alice&#x27;s: main" not in page
