"""The commands: JSON for machines, sentences for people, one clear error and a status."""

from __future__ import annotations

import csv
import io
import json
from datetime import timedelta
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command, load_command_class
from django.db import OperationalError
from django.utils import timezone

from accounts.identity import keys
from accounts.identity.authentication import authenticate_credentials
from accounts.ledger import quotas
from accounts.models import APIKey, LedgerEntry, Plan, Tenant
from accounts.trail.refusals import Refusal
from tests.accounts.quota_cast import reserved, settle_order
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

COMMANDS = ("create_tenant", "create_key", "rotate_key", "revoke_key", "set_quota", "usage", "audit_ledger")


def said(*words: Any) -> str:
    out = io.StringIO()
    call_command(*[str(word) for word in words], stdout=out)
    return out.getvalue()


def answer(*words: Any) -> Any:
    return json.loads(said(*words, "--json"))


def failure(*words: Any) -> tuple[str, str]:
    """(code in the JSON, message on the error stream)"""
    out = io.StringIO()
    with pytest.raises(CommandError) as caught:
        call_command(*[str(word) for word in words], "--json", stdout=out)
    return json.loads(out.getvalue())["error"]["code"], str(caught.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name: str) -> None:
    text = load_command_class("accounts", name).create_parser("manage.py", name).format_help()
    assert f"python manage.py {name}" in text and "--json" in text


def test_a_tenant_is_made_on_a_plan_of_a_role(cast: Cast) -> None:
    facts = answer(
        "create_tenant", "Dora's", "--plan", "free", "--monthly-tokens", "500", "--tokens-per-minute", "unlimited"
    )
    tenant = Tenant.objects.get(pk=facts["id"])
    assert tenant.plan.role == "free" and tenant.plan.requests_per_minute == 30 and facts["plan_created"]
    assert tenant.limit_overrides == {"monthly_tokens": 500, "tokens_per_minute": None}
    assert "on the plan free" in said("create_tenant", "Emil's", "--plan", "free")
    assert "usual limits" in said("create_tenant", "Fred's", "--plan", "standard")
    assert Plan.objects.get(name="standard").requests_per_minute == 120


def test_a_wrong_tenant_is_not_made(cast: Cast) -> None:
    assert failure("create_tenant", "Dora's", "--plan", "fre")[0] == "plan_not_found"
    assert failure("create_tenant", "Alice's", "--plan", "cast")[0] == "tenant_invalid"
    assert failure("create_tenant", "Dora's", "--plan", "cast", "--quota-anchor-day", 31)[0] == "tenant_invalid"
    with pytest.raises(CommandError, match="whole number"):
        said("create_tenant", "Dora's", "--monthly-tokens", "many")
    assert not Tenant.objects.filter(name="Dora's").exists()


def test_a_key_is_shown_once_and_works(cast: Cast) -> None:
    facts = answer("create_key", "Alice's", "--name", "laptop", "--concurrent-requests", 2)
    principal = authenticate_credentials({"X-API-Key": facts["key"]})
    assert (principal.tenant_name, principal.key_name, principal.limit("concurrent_requests")) == (
        "Alice's",
        "laptop",
        2,
    )
    narrow = answer("create_key", "Alice's", "--model", "small", "--adapter", "formal", "--adapter", "small:verse")
    assert (narrow["allowed_models"], narrow["allowed_adapters"]) == (["small"], ["formal", "small:verse"])
    assert facts["allowed_models"] is None
    text = said("create_key", "Bob's", "--scope", "operator", "--expires-at", "2099-01-31T00:00:00").split()[-1]
    assert authenticate_credentials({"X-API-Key": text}).scopes == {"operator"}


def test_a_wrong_key_is_not_issued(cast: Cast) -> None:
    assert failure("create_key", "Nobody's")[0] == "tenant_not_found"
    assert failure("create_key", "Alice's", "--expires-at", "2020-01-31")[0] == "key_invalid"
    assert failure("create_key", "Alice's", "--name", "")[0] == "key_invalid"
    for wrong in (["--scope", "root"], ["--expires-at", "tomorrow"]):
        with pytest.raises(CommandError):
            said("create_key", "Alice's", *wrong)


def test_a_key_is_rotated(cast: Cast) -> None:
    facts = answer("rotate_key", cast.alice.key.public_id, "--overlap", "7d")
    assert facts["replaces"]["key"] == cast.alice.key.display
    for text in (facts["key"], cast.alice.text):
        assert authenticate_credentials({"X-API-Key": text}).quota_key_id == cast.alice.key.pk
    cast.alice.key.refresh_from_db()
    end = cast.alice.key.expires_at
    assert end is not None and abs(end - timezone.now() - timedelta(days=7)) < timedelta(minutes=1)
    assert "ends at" in said("rotate_key", cast.bob.key.public_id, "--overlap", "90s")
    assert "is revoked" in said("rotate_key", cast.charlie.key.pk)
    assert failure("rotate_key", cast.charlie.key.pk)[0] == "key_not_rotated"
    with pytest.raises(CommandError, match="duration"):
        said("rotate_key", cast.alice.key.public_id, "--overlap", "long")


def test_a_key_is_revoked(cast: Cast) -> None:
    assert answer("revoke_key", cast.alice.key.public_id)["changed"]
    assert "was revoked before" in said("revoke_key", cast.alice.text)
    assert "is revoked" in said("revoke_key", cast.bob.key.display)
    code, message = failure("revoke_key", keys.generate().text)
    assert code == "key_not_found" and "llms_<public id>" in message
    with pytest.raises(Refusal):
        authenticate_credentials({"X-API-Key": cast.alice.text})


def test_limits_of_a_tenant_are_set_and_inherited(cast: Cast) -> None:
    Plan.objects.create(name="wide", monthly_tokens=99)
    facts = answer("set_quota", "--tenant", "Alice's", "--monthly-tokens", 5, "--max-output", "unlimited")
    assert facts["overrides"] == {"monthly_tokens": 5, "max_output": None} and facts["limits"]["monthly_tokens"] == 5
    facts = answer("set_quota", "--tenant", "Alice's", "--plan", "wide", "--monthly-tokens", "inherit")
    assert facts["limits"]["monthly_tokens"] == 99 and facts["plan"] == "wide"
    assert "monthly_tokens: 99 (inherited)" in said("set_quota", "--tenant", "Alice's")
    assert Tenant.objects.get(name="Charlie's").limit_overrides == {}


def test_limits_of_a_key_are_set(cast: Cast) -> None:
    facts = answer("set_quota", "--key", cast.alice.key.public_id, "--monthly-requests", 0)
    assert facts["overrides"] == {"monthly_requests": 0}
    assert APIKey.objects.get(pk=cast.alice.key.pk).limits.monthly_requests == 0
    assert "monthly_requests: 0 (set here)" in said("set_quota", "--key", cast.alice.key.public_id)


def test_wrong_limits_are_not_set(cast: Cast) -> None:
    assert failure("set_quota", "--tenant", "Nobody's")[0] == "tenant_not_found"
    assert failure("set_quota", "--tenant", "Alice's", "--plan", "none")[0] == "plan_not_found"
    assert failure("set_quota", "--key", cast.alice.key.public_id, "--plan", "cast")[0] == "plan_of_a_key"
    Tenant.objects.filter(name="Bob's").update(quota_anchor_day=28, name="")
    assert failure("set_quota", "--tenant", "", "--max-output", 1)[0] == "limits_invalid"
    with pytest.raises(CommandError, match="required"):
        said("set_quota", "--max-output", 1)


def test_usage_of_all_of_one_and_of_a_key(cast: Cast) -> None:
    now = timezone.now()
    quotas.settle(settle_order(reserved(cast.alice, now=now), now=now))
    everybody = {row["tenant"]: row["quota_used"] for row in answer("usage")["usage"]}
    assert everybody == {"Alice's": 30, "Bob's": 0, "Charlie's": 0, "Operator": 0}
    assert [row["tenant"] for row in answer("usage", "--tenant", "Bob's")["usage"]] == ["Bob's"]
    assert answer("usage", "--key", cast.alice.key.public_id)["usage"][0]["total_completion_tokens"] == 20
    table = said("usage")
    assert "Alice's" in table and "10,000,000" in table
    assert cast.alice.key.public_id in said("usage", "--key", cast.alice.key.public_id)


def test_the_audit_proves_or_fails(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice)))
    assert answer("audit_ledger")["clean"]
    assert "The ledger holds: 2 entries" in said("audit_ledger")
    LedgerEntry.objects.filter(kind="settle").update(used_tokens=999)
    code, message = failure("audit_ledger")
    assert code == "ledger_differs" and "problems" in message
    out = io.StringIO()
    with pytest.raises(CommandError):
        call_command("audit_ledger", stdout=out)
    assert "overcharged" in out.getvalue()


# What keeps any command from its work


def refuse_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("accounts.management.commands.tenant.Command.run", fail)


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (OperationalError("connection refused\nmore"), "database_unavailable", 1),
        (redis.ConnectionError("refused"), "redis_unreachable", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_what_keeps_any_command_from_its_work_is_a_sentence_and_json(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: str, status: int
) -> None:
    refuse_with(monkeypatch, error)
    assert failure("tenant") == (code, plain_words(code))
    with pytest.raises(CommandError) as caught:
        said("tenant")
    assert caught.value.returncode == status


def plain_words(code: str) -> str:
    return {
        "database_unavailable": "The database fails (connection refused): `manage.py doctor` says more.",
        "redis_unreachable": "Redis does not answer (ConnectionError): `manage.py doctor` says more.",
        "interrupted": "Interrupted.",
    }[code]


def test_a_plan_that_was_made_for_a_refused_tenant_is_not_left(cast: Cast) -> None:
    assert failure("create_tenant", "Dora's", "--plan", "free", "--quota-anchor-day", 99)[0] == "tenant_invalid"
    assert not Plan.objects.filter(name="free").exists()


def test_a_statement_on_standard_output_is_a_table_and_nothing_else(cast: Cast) -> None:
    settle_order(reserved(cast.alice))
    text = said("statement", "--tenant", "Alice's", "--csv", "-")
    names = text.splitlines()[0].split(",")
    assert all(len(row) == len(names) for row in csv.reader(io.StringIO(text)))
    assert failure("statement", "--tenant", "Alice's", "--csv", "-")[0] == "output_ambiguous"


def test_times_that_no_calendar_has_are_not_understood(cast: Cast) -> None:
    for words in (
        ("audit_log", "--within", "999999d"),
        ("refusals", "--within", "٣h"),
        ("limit_rule", "--tenant", "Alice's", "--limit", "max_output", "--value", 1, "--daily", "22:00Z-06:00Z"),
    ):
        with pytest.raises(CommandError, match="is not a"):
            said(*words)


def test_keys_that_have_ended_take_no_place_of_those_that_are_asked_for(
    cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accounts.management.commands.key.MOST", 1)
    said("create_key", "Alice's", "--name", "newer")
    newest = answer("create_key", "Alice's", "--name", "newest")
    said("revoke_key", newest["public_id"])
    assert [row["name"] for row in answer("key", "list", "--tenant", "Alice's", "--active")["keys"]] == ["newer"]


def test_a_list_of_one_that_is_not_there_has_failed(cast: Cast) -> None:
    assert failure("plan", "list", "none")[0] == "plan_not_found"
    assert failure("person", "list", "nobody")[0] == "person_not_found"
