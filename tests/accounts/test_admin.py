"""The operator's pages: keys shown once, limits without JSON, ledgers that nobody can write."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import redis
from django.contrib import admin
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.checks import run_checks
from django.core.exceptions import ValidationError
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from accounts.identity import keys, known_keys
from accounts.identity.authentication import authenticate_credentials
from accounts.ledger import quotas
from accounts.limits import throttling
from accounts.models import APIKey, LedgerEntry, Plan, QuotaPeriod, Reservation, Tenant
from accounts.pages import bulk_preview
from accounts.pages.admin_forms import LIMIT_FIELDS, AllowedField
from accounts.pages.long_lists import UncountedPaginator
from tests.accounts.quota_cast import reserved, settle_order
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

KEY = re.compile(r"llms_[0-9A-Za-z]{12}_[0-9A-Za-z]{38}")


@pytest.fixture
def console(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("root", password="not a real password"))
    return client


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any) -> list[str]:
    """The public ids that were announced."""
    ids: list[str] = []
    monkeypatch.setattr(known_keys, "_announce", ids.extend)
    return ids


def url(page: str, *args: Any) -> str:
    return reverse(f"admin:accounts_{page}", args=args)


def limits(**chosen: str) -> dict[str, str]:
    """Form values of the limit fields: `inherit`, `unlimited` or digits."""
    values = {}
    for field in LIMIT_FIELDS:
        value = chosen.get(field.removeprefix("limit_"), "inherit")
        values[f"{field}_0"] = "number" if value.isdecimal() else value
        values[f"{field}_1"] = value if value.isdecimal() else ""
    return values


NO_MEMBERS = {"memberships-TOTAL_FORMS": "0", "memberships-INITIAL_FORMS": "0"}


def tenant_form(tenant: Tenant, **chosen: str) -> dict[str, Any]:
    row = {"name": tenant.name, "status": tenant.status, "plan": tenant.plan_id, "quota_anchor_day": "1"}
    return {**row, **NO_MEMBERS, **limits(**chosen)}


def test_the_checks_of_django_have_nothing_to_say() -> None:
    assert [each for each in run_checks() if each.level >= 30 and "accounts" in str(each.obj)] == []


@pytest.mark.parametrize("page", ["plan", "tenant", "apikey", "quotaperiod", "reservation", "ledgerentry"])
def test_every_list_opens_with_a_fixed_number_of_queries(console: Client, cast: Cast, page: str) -> None:
    from django.db import connection

    counts = []
    for _ in range(2):
        for who in (cast.alice, cast.bob):
            quotas.settle(settle_order(reserved(who)))
        with CaptureQueriesContext(connection) as queries:
            assert console.get(url(f"{page}_changelist")).status_code == 200
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 12


def test_a_list_of_a_ledger_is_never_counted_whole(
    monkeypatch: pytest.MonkeyPatch, console: Client, cast: Cast
) -> None:
    from django.db import connection

    reserved(cast.alice)
    with CaptureQueriesContext(connection) as queries:
        console.get(url("ledgerentry_changelist"))
    counted = [query["sql"] for query in queries if "COUNT(" in query["sql"] and "ledgerentry" in query["sql"]]
    assert counted and all("LIMIT 10000" in sql for sql in counted)
    assert UncountedPaginator([1, 2, 3], 2).num_pages == 2


@pytest.mark.parametrize("model", [QuotaPeriod, Reservation, LedgerEntry])
def test_what_quotas_write_is_read_only(console: Client, cast: Cast, model: Any) -> None:
    reserved(cast.alice)
    name, row = model._meta.model_name, model.objects.first()
    assert console.get(url(f"{name}_add")).status_code == 403
    assert console.get(url(f"{name}_change", row.pk)).status_code == 200
    assert console.post(url(f"{name}_change", row.pk), {"tokens": "0"}).status_code == 403
    assert console.post(url(f"{name}_delete", row.pk), {"post": "yes"}).status_code == 403


@pytest.mark.parametrize("model", [Tenant, APIKey])
def test_what_has_a_ledger_is_never_deleted(console: Client, cast: Cast, model: Any) -> None:
    row = model.objects.first()
    assert console.post(url(f"{model._meta.model_name}_delete", row.pk), {"post": "yes"}).status_code == 403
    assert "delete_selected" not in admin.site.get_model_admin(model).get_actions(_request(console))


def _request(console: Client) -> Any:
    return console.get(url("tenant_changelist")).wsgi_request


def test_a_key_is_issued_and_shown_exactly_once(console: Client, cast: Cast) -> None:
    assert console.get(url("apikey_add")).status_code == 200
    answer = console.post(
        url("apikey_add"),
        {"tenant": cast.alice.tenant.pk, "name": "from the console", "scopes": ["generate"], **limits(max_output="64")},
    )
    assert answer.status_code == 200 and "no-store" in answer["Cache-Control"]
    (text,) = set(KEY.findall(answer.content.decode()))
    principal = authenticate_credentials({"X-API-Key": text})
    assert principal.tenant_name == "Alice's" and principal.limit("max_output") == 64
    key = APIKey.objects.get(name="from the console")
    secret = keys.parse(text)
    assert secret is not None
    for page in (url("apikey_changelist"), url("apikey_change", key.pk), url("apikey_history", key.pk)):
        again = console.get(page)
        assert again.status_code == 200 and secret.secret not in again.content.decode()
    stored = repr([session.get_decoded() for session in Session.objects.all()]) + repr(LogEntry.objects.values())
    assert secret.secret not in stored


def test_a_key_with_wrong_values_is_not_issued(console: Client, cast: Cast) -> None:
    number = APIKey.objects.count()
    form = {"tenant": cast.alice.tenant.pk, "name": "k", "scopes": ["generate"], **limits()}
    for wrong in (
        {"scopes": []},
        {"scopes": ["root"]},
        {"name": ""},
        {"limit_max_output_0": "number"},
        {"limit_max_output_1": "5"},
        {"limit_max_output_0": "number", "limit_max_output_1": "-1"},
    ):
        answer = console.post(url("apikey_add"), {**form, **wrong})
        assert answer.status_code == 200 and not KEY.search(answer.content.decode())
    assert APIKey.objects.count() == number


def test_changing_a_key_is_announced(
    console: Client, cast: Cast, published: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    key = cast.alice.key
    with django_capture_on_commit_callbacks(execute=True):
        answer = console.post(
            url("apikey_change", key.pk),
            {"name": "renamed", "scopes": ["usage"], "tenant": cast.bob.tenant.pk, **limits(monthly_tokens="0")},
        )
    assert answer.status_code == 302
    key.refresh_from_db()
    assert (key.name, key.scopes, key.limit_overrides) == ("renamed", ["usage"], {"monthly_tokens": 0})
    assert key.tenant == cast.alice.tenant, "a key stays with its tenant"
    assert published == [key.public_id]


def action(console: Client, name: str, *rows: Any, page: str = "apikey") -> Any:
    return console.post(
        url(f"{page}_changelist"), {"action": name, "_selected_action": [row.pk for row in rows], "previewed": "yes"}
    )


def test_keys_are_revoked_from_the_list(
    console: Client, cast: Cast, published: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        action(console, "revoke", cast.alice.key, cast.bob.key)
    assert APIKey.objects.filter(revoked_at=None).count() == 2
    assert set(published) == {cast.alice.key.public_id, cast.bob.key.public_id}
    assert console.get(url("apikey_changelist"), {"state": "revoked"}).content.decode().split().count("revoked") >= 2
    assert console.get(url("apikey_changelist"), {"state": "usable"}).status_code == 200


@pytest.mark.parametrize(("name", "is_over"), [("rotate_now", True), ("rotate_with_overlap", False)])
def test_a_key_is_rotated_from_the_list(console: Client, cast: Cast, name: str, is_over: bool) -> None:
    answer = action(console, name, cast.alice.key)
    (text,) = set(KEY.findall(answer.content.decode()))
    assert authenticate_credentials({"X-API-Key": text}).quota_key_id == cast.alice.key.pk
    cast.alice.key.refresh_from_db()
    assert (cast.alice.key.revoked_at is not None) == is_over
    assert "no-store" in answer["Cache-Control"]


def test_only_one_active_key_is_rotated_at_a_time(console: Client, cast: Cast) -> None:
    assert "exactly one key" in _follow(console, action(console, "rotate_now", cast.alice.key, cast.bob.key))
    action(console, "revoke", cast.alice.key)
    assert "Only an active key" in _follow(console, action(console, "rotate_now", cast.alice.key))
    assert APIKey.objects.count() == 4


def _follow(console: Client, answer: Any) -> str:
    assert answer.status_code == 302
    return console.get(answer["Location"]).content.decode().replace("&#x27;", "'")


def test_limits_of_a_tenant_are_choices_and_numbers(
    console: Client, cast: Cast, published: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    tenant = cast.alice.tenant
    page = console.get(url("tenant_change", tenant.pk)).content.decode()
    assert "In the plan: 10,000,000." in page and "limit_overrides" not in page
    with django_capture_on_commit_callbacks(execute=True):
        form = tenant_form(tenant, monthly_tokens="5", max_output="unlimited")
        assert console.post(url("tenant_change", tenant.pk), form).status_code == 302
    tenant.refresh_from_db()
    assert tenant.limit_overrides == {"monthly_tokens": 5, "max_output": None}
    assert published == [cast.alice.key.public_id]
    page = console.get(url("tenant_change", tenant.pk)).content.decode()
    assert re.search(r'name="limit_monthly_tokens_1"[^>]*value="5"|value="5"[^>]*name="limit_monthly_tokens_1"', page)
    console.post(url("tenant_change", tenant.pk), tenant_form(tenant))
    tenant.refresh_from_db()
    assert tenant.limit_overrides == {}


def test_a_tenant_is_added_with_a_member(console: Client, plan: Plan) -> None:
    assert console.get(url("tenant_add")).status_code == 200
    user = User.objects.create_user("dora")
    form = {
        "name": "Dora's",
        "status": "active",
        "plan": plan.pk,
        "quota_anchor_day": "15",
        **limits(concurrent_requests="3"),
        "memberships-TOTAL_FORMS": "1",
        "memberships-INITIAL_FORMS": "0",
        "memberships-0-user": user.pk,
        "memberships-0-role": "owner",
    }
    assert console.post(url("tenant_add"), form).status_code == 302
    tenant = Tenant.objects.get(name="Dora's")
    assert tenant.limit_overrides == {"concurrent_requests": 3}
    assert [str(member) for member in tenant.memberships.all()] == ["dora in Dora's"]


def test_a_suspended_tenant_is_announced_and_refused(
    console: Client, cast: Cast, published: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        action(console, "suspend", cast.alice.tenant, page="tenant")
    assert Tenant.objects.get(pk=cast.alice.tenant.pk).status == "suspended"
    assert published == [cast.alice.key.public_id]
    action(console, "activate", cast.alice.tenant, page="tenant")
    assert Tenant.objects.get(pk=cast.alice.tenant.pk).status == "active"


def test_a_changed_plan_is_announced_to_everybody(
    console: Client, plan: Plan, published: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    with django_capture_on_commit_callbacks(execute=True):
        form = {"name": "cast", "role": "free", "monthly_tokens": "7", "weight": "150"}
        assert console.post(url("plan_change", plan.pk), form).status_code == 302
    plan.refresh_from_db()
    assert plan.monthly_tokens == 7 and plan.weight == 150 and plan.role == "free" and plan.max_output is None
    assert published == [known_keys.EVERYTHING]


def test_staff_without_permission_see_nothing(client: Client, cast: Cast) -> None:
    client.force_login(User.objects.create_user("charlie", password="not a real password", is_staff=True))
    for page in ("plan", "tenant", "apikey", "quotaperiod", "reservation", "ledgerentry"):
        assert client.get(url(f"{page}_changelist")).status_code == 403
    assert action(client, "revoke", cast.alice.key).status_code == 403
    assert APIKey.objects.get(pk=cast.alice.key.pk).revoked_at is None


def test_users_can_be_looked_up_for_membership(console: Client, cast: Cast) -> None:
    User.objects.create_user("dora")
    found = console.get(
        reverse("admin:autocomplete"),
        {"term": "dor", "app_label": "accounts", "model_name": "membership", "field_name": "user"},
    )
    assert [each["text"] for each in found.json()["results"]] == ["dora"]
    assert console.get(reverse("admin:auth_user_changelist")).status_code == 200
    assert console.get(reverse("admin:auth_group_changelist")).status_code == 200


def button(console: Client, name: str, key: APIKey) -> Any:
    form = {"name": key.name, "scopes": key.scopes, **limits(), f"accounts_apikey_{name}": "1"}
    return console.post(url("apikey_change", key.pk), form)


def test_a_key_is_revoked_on_its_page(
    console: Client, cast: Cast, published: list[str], django_capture_on_commit_callbacks: Any
) -> None:
    assert "revoke_this" in console.get(url("apikey_change", cast.alice.key.pk)).content.decode()
    with django_capture_on_commit_callbacks(execute=True):
        assert "is revoked" in _follow(console, button(console, "revoke_this", cast.alice.key))
    cast.alice.key.refresh_from_db()
    assert cast.alice.key.revoked_at is not None and cast.alice.key.public_id in published
    assert "revoke_this" not in console.get(url("apikey_change", cast.alice.key.pk)).content.decode()


def test_a_key_is_rotated_on_its_page(console: Client, cast: Cast) -> None:
    answer = button(console, "rotate_this", cast.alice.key)
    (text,) = set(KEY.findall(answer.content.decode()))
    assert authenticate_credentials({"X-API-Key": text}).quota_key_id == cast.alice.key.pk
    cast.alice.key.refresh_from_db()
    assert cast.alice.key.revoked_at is not None and "no-store" in answer["Cache-Control"]
    assert button(console, "rotate_this", cast.alice.key).status_code == 302, "nothing is left to rotate"
    assert APIKey.objects.count() == 5


def test_tenants_lead_to_keys_periods_receipts_refusals_and_the_playground(console: Client, cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice)))
    page = console.get(url("tenant_change", cast.alice.tenant.pk)).content.decode()
    found = set(re.findall(r'class="console-link" href="([^"]+)"', page))
    raised = next(link for link in found if "limitrule/add" in link)
    assert f'value="{cast.alice.tenant.pk}" selected' in console.get(raised.replace("&amp;", "&")).content.decode()
    assert len(found) == 6
    for link in found - {raised}:
        listed = console.get(link)
        assert listed.status_code == 200 and "Bob" not in listed.content.decode().split("<table")[-1]
    assert console.get(url("quotaperiod_changelist"), {"whose": "tenants"}).status_code == 200


@pytest.mark.parametrize(
    ("written", "kept"), [("", None), ("small, large,", ["small", "large"]), ('["small"]', ["small"])]
)
def test_allowed_names_are_written_with_commas(written: str, kept: list[str] | None) -> None:
    field = AllowedField(required=False)
    assert field.clean(written) == kept
    assert field.clean(field.prepare_value(kept)) == kept
    assert not field.has_changed(kept, field.prepare_value(kept))
    with pytest.raises(ValidationError, match="commas between them"):
        field.clean("[small")


# What several rows would become is shown first


def test_an_action_on_several_rows_shows_them_before_it_changes_any(console: Client, cast: Cast) -> None:
    rows = [cast.alice.key, cast.bob.key]
    chosen = {"action": "revoke", "_selected_action": [row.pk for row in rows]}
    page = console.post(url("apikey_changelist") + "?state=usable", chosen).content.decode()
    assert "Do it for 2 API keys" in page and all(str(row.pk) in page for row in rows)
    assert "Charlie" not in page and 'name="previewed"' in page
    assert not APIKey.objects.exclude(revoked_at=None).exists()


def test_the_page_says_whose_each_row_is_and_what_runs_there(
    console: Client, cast: Cast, valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = time.time() + 60
    valkey.zadd(f"{throttling.PREFIX}:places:key:{cast.alice.key.pk}", {"one": soon, "two": soon, "past": soon - 120})
    valkey.zadd(f"{throttling.PREFIX}:places:tenant:{cast.bob.tenant.pk}", {"one": soon})
    of_keys = {"action": "revoke", "_selected_action": [cast.alice.key.pk, cast.bob.key.pk]}
    of_tenants = {"action": "suspend", "_selected_action": [cast.alice.tenant.pk, cast.bob.tenant.pk]}

    def said(page: str, data: Any) -> list[str]:
        text = console.post(url(f"{page}_changelist"), data).content.decode().split('id="bulk-preview"')[1]
        rows = re.findall(r"<li>(.*?)</li>", text, re.DOTALL)
        return sorted(" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in rows)

    first, second = said("apikey", of_keys)
    assert {first.partition(" of ")[2], second.partition(" of ")[2]} == {
        "Alice&#x27;s 2 requests run or wait",
        "Bob&#x27;s nothing runs",
    }
    assert said("tenant", of_tenants) == ["Alice&#x27;s nothing runs", "Bob&#x27;s 1 requests run or wait"]

    def away(*_args: Any) -> Any:
        raise redis.ConnectionError

    monkeypatch.setattr(throttling, "running_of", away)
    assert all(row.endswith("Redis does not answer") for row in said("tenant", of_tenants))
    assert not Tenant.objects.filter(status="suspended").exists()


def test_of_very_many_rows_some_are_named_and_all_are_changed(
    console: Client, cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_preview, "MOST_SHOWN", 2)
    ours = Tenant.objects.filter(pk__in=[cast.alice.tenant.pk, cast.bob.tenant.pk])
    chosen = {"action": "suspend", "_selected_action": [row.pk for row in ours], "select_across": "1"}
    page = console.post(url("tenant_changelist"), chosen).content.decode()
    number = Tenant.objects.count()
    assert f"Do it for {number} tenants" in page and f"and {number - 2} more" in page
    assert not Tenant.objects.filter(status="suspended").exists()
    console.post(url("tenant_changelist"), {**chosen, "previewed": "yes"})
    assert Tenant.objects.filter(status="suspended").count() == number
