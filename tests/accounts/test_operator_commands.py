"""What an operator does over a terminal to tenants, plans, people and keys, and what is read there of refusals and
changes. Each action is seen in what the rows are afterwards, and in the audit log."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError
from django.test import Client
from django.utils import timezone

from accounts.identity import issuing, known_keys, roles
from accounts.identity.authentication import authenticate_credentials
from accounts.models import APIKey, AuditEntry, Membership, Plan, Price, RefusedRequest, Tenant
from accounts.trail.refusals import Refusal
from tests.accounts.test_commands import answer, failure, said
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def noted(command: str, **values: Any) -> list[AuditEntry]:
    found = AuditEntry.objects.filter(actor_kind="command", **values)
    return [each for each in found if each.actor.endswith(f": {command}")]


# Tenants and plans


def test_a_tenant_is_suspended_and_its_key_refused_until_it_is_activated(cast: Cast) -> None:
    told = answer("tenant", "suspend", "Alice's", "Bob's")
    assert told["changed"] == ["Alice's", "Bob's"]
    with pytest.raises(Refusal) as refused:
        authenticate_credentials(cast.alice.headers)
    assert refused.value.code == "invalid_api_key"
    assert authenticate_credentials(cast.charlie.headers).tenant_name == "Charlie's"
    assert answer("tenant", "suspend", "Alice's")["changed"] == [], "twice is once"
    assert "Alice's *" in said("tenant", "activate", "Alice's")
    known_keys.CACHE.forget()  # as every process does once the change is committed
    assert authenticate_credentials(cast.alice.headers).tenant_name == "Alice's"
    assert len(noted("tenant", model="accounts.tenant", row=str(cast.alice.tenant.pk))) == 2


def test_of_several_tenants_one_that_is_unknown_leaves_all_as_they_are(cast: Cast) -> None:
    assert failure("tenant", "suspend", "Alice's", "Nobody's")[0] == "tenant_not_found"
    assert failure("tenant", "suspend")[0] == "tenant_missing"
    assert not Tenant.objects.filter(status="suspended").exists()


def test_a_tenant_changes_its_plan_name_and_what_it_may_use(cast: Cast) -> None:
    Plan.objects.create(name="team", monthly_tokens=5)
    words = ("--plan", "team", "--new-name", "Dora's", "--allowed-models", "small, large", "--quota-anchor-day", 15)
    told = answer("tenant", "change", "Alice's", *words)["tenants"][0]
    assert (told["name"], told["plan"], told["monthly_tokens"], told["quota_anchor_day"]) == ("Dora's", "team", 5, 15)
    assert told["allowed_models"] == ["small", "large"] and told["allowed_adapters"] is None
    answer("tenant", "change", "Dora's", "--allowed-models", "all")
    assert Tenant.objects.get(pk=cast.alice.tenant.pk).allowed_models is None
    assert failure("tenant", "change", "Dora's")[0] == "nothing_to_change"
    assert failure("tenant", "change", "Dora's", "Bob's", "--plan", "team")[0] == "tenant_ambiguous"
    assert failure("tenant", "change", "Dora's", "--new-name", "Bob's")[0] == "tenant_invalid"
    assert failure("tenant", "change", "Dora's", "--plan", "no")[0] == "plan_not_found"


def test_the_list_of_tenants_counts_keys_that_can_be_used(cast: Cast) -> None:
    issuing.issue(cast.alice.tenant, "second")
    gone, _ = issuing.issue(cast.alice.tenant, "third")
    issuing.revoke(gone)
    rows = {row["name"]: row for row in answer("tenant")["tenants"]}
    assert rows["Alice's"]["active_keys"] == 2 and rows["Bob's"]["active_keys"] == 1
    assert "unlimited" not in said("tenant", "list", "Alice's")


def test_a_plan_is_made_changed_and_removed(cast: Cast) -> None:
    made = answer("plan", "make", "team", "--monthly-tokens", 900, "--weight", 200, "--max-slots", 3)["plans"][0]
    assert (made["limits"]["monthly_tokens"], made["weight"], made["max_slots"]) == (900, 200, 3)
    words = ("--monthly-tokens", "unlimited", "--max-slots", "unlimited", "--redis-outage-policy", "open")
    answer("plan", "change", "team", *words, "--new-name", "crew")
    row = Plan.objects.get(name="crew")
    assert (row.monthly_tokens, row.max_slots, row.redis_outage_policy, row.weight) == (None, None, "open", 200)
    assert "crew" in said("plan") and "cast" in said("plan")
    assert failure("plan", "make", "crew")[0] == "plan_invalid"
    assert failure("plan", "change", "crew", "--weight", 0)[0] == "plan_invalid"
    assert failure("plan", "change", "crew", "--max-slots", "many")[0] == "plan_invalid"
    assert failure("plan", "change", "crew", "--monthly-tokens", "inherit")[0] == "limits_invalid"
    assert failure("plan", "change", "crew")[0] == "nothing_to_change"
    assert failure("plan", "remove", "cast")[0] == "plan_in_use"
    assert answer("plan", "remove", "crew")["removed"]["name"] == "crew"
    assert [row.name for row in Plan.objects.all()] == ["cast"]
    assert [entry.action for entry in noted("plan", model="accounts.plan")] == ["delete", "change", "create"]


def test_a_plan_above_the_threshold_takes_two_people_here_too(cast: Cast, settings: Any) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"quota_approval_tokens": 1000})
    assert failure("plan", "make", "large", "--monthly-tokens", 5000)[0] == "plan_invalid"
    assert not Plan.objects.filter(name="large").exists()


# People


def test_a_person_is_added_made_owner_and_let_go(cast: Cast) -> None:
    assert "changepassword" in said("person", "add", "dora", "--email", "dora@example.org")
    answer("member", "add", "dora", "--tenant", "Alice's", "--role", "owner")
    dora = User.objects.get(username="dora")
    assert not dora.has_usable_password()
    assert roles.roles_of(dora).tenants == {cast.alice.tenant.pk: "owner"}
    answer("member", "change", "dora", "--tenant", "Alice's", "--role", "viewer")
    assert answer("member", "list", "--tenant", "Alice's")["members"][0]["role"] == "viewer"
    assert answer("member", "list", "--tenant", "Bob's")["members"] == []
    assert failure("member", "add", "dora", "--tenant", "Alice's")[0] == "member_invalid"
    assert failure("member", "change", "dora", "--tenant", "Alice's")[0] == "role_missing"
    assert failure("member", "change", "dora", "--tenant", "Bob's", "--role", "owner")[0] == "member_not_found"
    assert failure("member", "add", "nobody", "--tenant", "Bob's")[0] == "person_not_found"
    assert failure("member", "add", "dora")[0] == "member_missing"
    assert "no more" in said("member", "remove", "dora", "--tenant", "Alice's")
    assert not Membership.objects.exists()


def test_a_locked_account_loses_its_session(cast: Cast, client: Client) -> None:
    olga = User.objects.create_user("olga", password="a long password for tests")
    answer("person", "role", "olga", "operator")
    client.force_login(olga)
    assert client.get("/admin/").status_code == 200
    assert answer("person", "lock", "olga")["people"][0]["is_active"] is False
    assert client.get("/admin/").status_code == 302
    answer("person", "unlock", "olga")
    told = answer("person", "role", "olga", "auditor")["people"][0]
    assert (told["role"], told["is_active"]) == ("auditor", True)
    assert answer("person", "role", "olga", "none")["people"][0]["role"] == "none"
    assert answer("person", "role", "olga", "none")["people"][0]["role"] == "none", "twice is once"
    assert failure("person", "role", "olga")[0] == "role_missing"
    assert failure("person", "add", "olga")[0] == "person_invalid"
    assert failure("person", "lock")[0] == "person_missing"
    assert {entry.model for entry in noted("person")} == {"auth.user", "accounts.staffrole"}


# Keys


def test_a_key_is_renamed_narrowed_and_ended(cast: Cast) -> None:
    public_id = cast.alice.key.public_id
    words = ("--name", "laptop", "--scope", "usage", "--allowed-models", "small", "--expires-at", "2099-01-31")
    told = answer("key", "change", public_id, *words)["keys"][0]
    assert (told["name"], told["scopes"], told["allowed_models"]) == ("laptop", ["usage"], ["small"])
    principal = authenticate_credentials(cast.alice.headers)
    assert principal.key_name == "laptop" and principal.scopes == frozenset({"usage"})
    answer("key", "change", public_id, "--never-expires")
    assert APIKey.objects.get(pk=cast.alice.key.pk).expires_at is None
    assert failure("key", "change", public_id)[0] == "nothing_to_change"
    assert failure("key", "change")[0] == "key_missing"
    assert failure("key", "change", "nothing", "--name", "x")[0] == "key_not_found"
    assert failure("key", "change", public_id, "--name", "x" * 101)[0] == "key_invalid"


def test_keys_are_listed_without_their_secrets(cast: Cast) -> None:
    issuing.revoke(cast.bob.key)
    shown = said("key", "list") + said("key", "list", "--json")
    for customer in (cast.alice, cast.bob):
        assert customer.key.public_id in shown
        assert customer.text not in shown and customer.key.secret_hash not in shown
    assert [row["tenant"] for row in answer("key", "list", "--tenant", "Alice's")["keys"]] == ["Alice's"]
    assert cast.bob.key.public_id not in said("key", "list", "--active")


# What is read


def test_refusals_are_listed_by_tenant_code_and_time(cast: Cast) -> None:
    now = timezone.now()
    common = {"route": "/v1/generate", "created_at": now}
    RefusedRequest.objects.create(
        request_id="one", tenant=cast.alice.tenant, code="quota_exhausted", limit="monthly_tokens", value=5, **common
    )
    RefusedRequest.objects.create(request_id="two", tenant=cast.bob.tenant, code="queue_full", **common)
    RefusedRequest.objects.create(
        request_id="old", tenant=cast.bob.tenant, code="queue_full", created_at=now - timedelta(days=2)
    )
    assert [row["request_id"] for row in answer("refusals")["refusals"]] == ["old", "two", "one"]
    assert [row["request_id"] for row in answer("refusals", "--tenant", "Alice's")["refusals"]] == ["one"]
    assert [row["request_id"] for row in answer("refusals", "--code", "queue_full", "--within", "1d")["refusals"]] == [
        "two"
    ]
    assert [row["request_id"] for row in answer("refusals", "--most", 1)["refusals"]] == ["old"]
    assert "quota_exhausted" in said("refusals") and said("refusals", "--code", "none") == "Nothing was refused.\n"
    with pytest.raises(CommandError):
        said("refusals", "--most", 0)


def test_the_audit_log_is_read_and_has_no_secret(cast: Cast) -> None:
    answer("tenant", "suspend", "Alice's")
    entry = answer("audit_log", "--model", "accounts.tenant", "--name", "Alice's", "--most", 1)["entries"][0]
    assert entry["diff"] == {"status": ["active", "suspended"]} and entry["actor"].endswith(": tenant")
    assert answer("audit_log", "--actor", entry["actor"])["entries"] == [entry]
    assert "status: active → suspended" in said("audit_log", "--action", "change", "--within", "1h")
    assert said("audit_log", "--action", "locked") == "There is no such entry.\n"
    everything = json.dumps(answer("audit_log", "--most", 1000))
    assert cast.alice.key.secret_hash not in everything and cast.alice.text not in everything


def test_a_price_is_removed(cast: Cast) -> None:
    made = answer("set_price", "--model", "small", "--input", 1, "--output", 2)["prices"][0]
    assert f"{made['id']}: small" in said("set_price")
    assert answer("set_price", "--remove", made["id"])["removed"]["model"] == "small"
    assert failure("set_price", "--remove", made["id"])[0] == "price_not_found"
    assert not Price.objects.exists()
