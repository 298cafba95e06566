"""Who changed what: by console, API and command, with a diff and without a secret; nobody writes it by hand."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.identity import issuing
from accounts.ledger.retention import purge_audit
from accounts.models import APIKey, AuditEntry, Plan, StaffRole, Tenant
from accounts.trail import audit_log
from inference.models import ServedModel
from tests.accounts.test_admin import tenant_form
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def newest() -> AuditEntry:
    found = AuditEntry.objects.first()
    assert found is not None
    return found


def test_a_change_in_the_console_names_the_person_and_the_difference(cast: Cast, client: Client) -> None:
    client.force_login(User.objects.create_superuser("root", password="not a real password"))
    tenant = cast.alice.tenant
    client.post(
        reverse("admin:accounts_tenant_change", args=[tenant.pk]),
        tenant_form(tenant, max_output="64") | {"status": "suspended"},
    )
    entry = newest()
    assert (entry.actor_kind, entry.actor, entry.action, entry.model) == ("person", "root", "change", "accounts.tenant")
    assert entry.diff == {"status": ["active", "suspended"], "limit_overrides": [{}, {"max_output": 64}]}


def test_a_change_by_the_api_names_the_key(cast: Cast, client: Client) -> None:
    headers = {"X-API-Key": cast.operator.text}
    address = f"/v1/admin/tenants/{cast.alice.tenant.pk}"
    answer = client.patch(
        address, json.dumps({"status": "suspended"}), content_type="application/json", headers=headers
    )
    if answer.status_code in (301, 404):
        answer = client.patch(
            f"{address}/", json.dumps({"status": "suspended"}), content_type="application/json", headers=headers
        )
    assert answer.status_code == 200
    assert newest().actor_kind == "key" and cast.operator.key.public_id in newest().actor
    client.get("/v1/admin/tenants", headers=headers)
    assert audit_log.actor() == audit_log.SYSTEM, "a request leaves nobody behind"


def test_a_change_by_a_command_names_the_command(cast: Cast, capsys: Any) -> None:
    call_command("revoke_key", cast.alice.key.public_id)
    entry = newest()
    assert entry.actor_kind == "command" and entry.actor.endswith(": revoke_key")
    assert entry.diff["revoked_at"][0] is None and entry.diff["revoked_at"][1]


def test_a_conditional_update_is_seen_and_one_that_changes_nothing_is_not(cast: Cast) -> None:
    assert issuing.revoke(cast.alice.key)
    number = AuditEntry.objects.count()
    assert not issuing.revoke(cast.alice.key)
    assert AuditEntry.objects.count() == number
    APIKey.objects.update(last_used_at=timezone.now())
    assert AuditEntry.objects.count() == number, "what programs keep is not what people change"
    assert Plan.objects.update(max_output=5) == 1
    assert newest().diff == {"max_output": [None, 5]}


def test_no_secret_is_in_any_entry(cast: Cast) -> None:
    key, text = issuing.issue(cast.alice.tenant, "new")
    user = User.objects.create_user("alice", password="a long password for tests")
    before = user.password
    user.set_password("another long password for tests")
    user.save()
    assert newest().diff == {"password": [audit_log.MASK, audit_log.MASK]}
    successor, successor_text = issuing.rotate(key)
    everything = json.dumps(list(AuditEntry.objects.values("diff", "name")))
    for secret in (text, successor_text, key.secret_hash, successor.secret_hash, before, user.password):
        assert secret not in everything


def test_links_and_deletions_have_entries_too(cast: Cast) -> None:
    model = ServedModel.objects.create(name="small", path="/models/small.gguf", digest="m" * 64, size_bytes=1)
    model.granted_tenants.add(cast.alice.tenant)
    assert list(newest().diff.values()) == [[None, [str(cast.alice.tenant.pk)]]]
    plan = Plan.objects.create(name="short-lived")
    plan.delete()
    assert (newest().action, newest().name) == ("delete", "short-lived")
    Tenant.objects.filter(pk=cast.bob.tenant.pk).update(name="Bob's new name")
    assert newest().diff == {"name": ["Bob's", "Bob's new name"]}


def test_a_change_that_is_rolled_back_leaves_no_entry(cast: Cast) -> None:
    from django.db import transaction

    number = AuditEntry.objects.count()
    with pytest.raises(RuntimeError), transaction.atomic():
        Plan.objects.update(max_output=5)
        raise RuntimeError
    assert AuditEntry.objects.count() == number


def test_the_auditor_reads_it_and_not_even_a_superuser_writes_it(cast: Cast, client: Client) -> None:
    auditor = User.objects.create_user("auditor", password="not a real password")
    StaffRole.objects.create(user=auditor, role="auditor")
    for user in (auditor, User.objects.create_superuser("root", password="not a real password")):
        client.force_login(user)
        page = reverse("admin:accounts_auditentry_change", args=[newest().pk])
        assert client.get(page).status_code == 200
        assert client.get(reverse("admin:accounts_auditentry_changelist")).status_code == 200
        assert client.post(page, {"actor": "somebody else"}).status_code == 403
        assert client.get(reverse("admin:accounts_auditentry_add")).status_code == 403
        assert client.post(reverse("admin:accounts_auditentry_delete", args=[newest().pk])).status_code == 403


def test_old_entries_go(cast: Cast) -> None:
    now = timezone.now()
    number = AuditEntry.objects.count()
    assert purge_audit(now - timedelta(days=1)) == 0
    assert purge_audit(now + timedelta(days=1)) == number > 0
