"""A quota above the threshold needs two people, whichever way it is raised."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from accounts.identity import issuing, key_rows
from accounts.ledger import adjusting
from accounts.limits import limit_rules, raises
from accounts.models import LimitRule, Plan, QuotaPeriod, QuotaRaise, StaffRole, Tenant
from accounts.trail import audit_log
from tests.accounts.test_admin import tenant_form
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]

MUCH = 50_000_000


@pytest.fixture
def threshold(settings: Any) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"quota_approval_tokens": 20_000_000})


def person(name: str) -> Client:
    client = Client()
    user = User.objects.create_user(name, password="not a real password")
    StaffRole.objects.create(user=user, role="operator")
    client.force_login(user)
    return client


def quota(tenant: Tenant) -> int | None:
    return Tenant.objects.select_related("plan").get(pk=tenant.pk).limits.monthly_tokens


def as_actor(name: str) -> Any:
    return audit_log.acting(lambda: audit_log.Actor("person", name))


def test_it_is_off_unless_the_operator_wants_it(cast: Cast) -> None:
    call_command("set_quota", tenant="Alice's", monthly_tokens=MUCH)
    assert quota(cast.alice.tenant) == MUCH


def test_no_way_leads_above_the_threshold_alone(cast: Cast, threshold: None, client: Client) -> None:
    tenant, plan = cast.alice.tenant, Plan.objects.get()
    console = person("one")
    page = console.post(
        reverse("admin:accounts_tenant_change", args=[tenant.pk]), tenant_form(tenant, monthly_tokens=str(MUCH))
    )
    assert page.status_code == 200 and "second operator" in page.content.decode()
    page = console.post(
        reverse("admin:accounts_tenant_change", args=[tenant.pk]), tenant_form(tenant, monthly_tokens="unlimited")
    )
    assert page.status_code == 200
    with pytest.raises(CommandError, match="second operator"):
        call_command("set_quota", tenant="Alice's", monthly_tokens=MUCH)
    headers = {"X-API-Key": cast.operator.text}
    for address, body in (
        (f"/v1/admin/tenants/{tenant.pk}", {"limit_overrides": {"monthly_tokens": None}}),
        (f"/v1/admin/plans/{plan.pk}", {"monthly_tokens": MUCH}),
    ):
        answer = client.patch(address, json.dumps(body), content_type="application/json", headers=headers)
        assert answer.status_code == 422, answer.content
        assert "second operator" in answer.content.decode()
    with pytest.raises(ValidationError, match="second operator"):
        limit_rules.save(LimitRule(tenant=tenant, limit="monthly_tokens", value=MUCH))
    with pytest.raises(ValidationError, match="second operator"):
        Plan.objects.create(name="large")
    assert quota(tenant) == 10_000_000


def test_what_is_below_or_no_raise_needs_one_person(cast: Cast, threshold: None) -> None:
    call_command("set_quota", tenant="Alice's", monthly_tokens=20_000_000)
    call_command("set_quota", tenant="Alice's", monthly_tokens=5)
    Tenant.objects.filter(pk=cast.bob.tenant.pk).update(limit_overrides={"monthly_tokens": MUCH})
    bob = Tenant.objects.get(pk=cast.bob.tenant.pk)
    bob.status = "suspended"
    bob.save()
    limit_rules.save(LimitRule(tenant=bob, limit="tokens_per_minute", value=MUCH))
    assert (quota(cast.alice.tenant), quota(bob)) == (5, MUCH)


def test_one_asks_another_approves_and_it_is_in_force(cast: Cast, threshold: None) -> None:
    one, two, tenant = person("one"), person("two"), cast.alice.tenant
    one.post(
        reverse("admin:accounts_quotaraise_add"), {"tenant": tenant.pk, "monthly_tokens": MUCH, "reason": "contract"}
    )
    row = QuotaRaise.objects.get()
    assert (row.asked_by, row.state) == ("person one", "asked")
    listing = reverse("admin:accounts_quotaraise_changelist")
    chosen = {"action": "approve", "_selected_action": [row.pk]}
    assert "another operator" in one.post(listing, chosen, follow=True).content.decode()
    assert quota(tenant) == 10_000_000
    two.post(listing, chosen)
    row.refresh_from_db()
    assert (row.state, row.decided_by, quota(tenant)) == ("approved", "person two", MUCH)
    entry = audit_log.AuditEntry.objects.filter(model="accounts.tenant").first()
    assert entry is not None and entry.actor == "two"


def test_keys_of_the_api_are_two_people(cast: Cast, threshold: None, client: Client) -> None:
    _, other = issuing.issue(cast.operator.tenant, "other", ["operator"])
    mine, theirs = {"X-API-Key": cast.operator.text}, {"X-API-Key": other}
    body = json.dumps({"tenant": "Alice's", "monthly_tokens": None, "reason": "contract"})
    asked = client.post("/v1/admin/quota-raises", body, content_type="application/json", headers=mine)
    assert asked.status_code == 201, asked.content
    address = f"/v1/admin/quota-raises/{asked.json()['id']}/approve"
    assert client.post(address, headers=mine).status_code == 409
    assert client.post(address, headers=theirs).status_code == 200
    assert client.post(address, headers=theirs).status_code == 409
    assert quota(cast.alice.tenant) is None


def test_the_command_asks_lists_and_refuses(cast: Cast, threshold: None, capsys: Any) -> None:
    call_command("quota_raise", tenant="Alice's", monthly_tokens=MUCH, reason="contract")
    pk = QuotaRaise.objects.get().pk
    with pytest.raises(CommandError, match="another operator"):
        call_command("quota_raise", approve=pk)
    call_command("quota_raise", refuse=pk)
    with pytest.raises(CommandError, match="decided before"):
        call_command("quota_raise", refuse=pk)
    with pytest.raises(CommandError, match="no raise"):
        call_command("quota_raise", approve=999)
    call_command("quota_raise")
    assert "refused by" in capsys.readouterr().out
    assert quota(cast.alice.tenant) == 10_000_000


def test_the_database_refuses_one_person_twice(cast: Cast) -> None:
    with as_actor("one"):
        row = raises.ask(cast.alice.tenant, MUCH, "contract")
    with pytest.raises(IntegrityError), transaction.atomic():
        QuotaRaise.objects.filter(pk=row.pk).update(state="approved", decided_by=row.asked_by)


def test_an_approved_raise_ends_by_itself_where_it_has_an_end(cast: Cast, threshold: None) -> None:
    tenant, now = cast.alice.tenant, timezone.now()
    until = now + timedelta(days=3)
    call_command("quota_raise", tenant="Alice's", monthly_tokens=MUCH, until=until, reason="by command")
    assert QuotaRaise.objects.get().ends_at == until
    with as_actor("one"):
        with pytest.raises(ValidationError, match="before it begins"):
            raises.ask(tenant, MUCH, "too late", now - timedelta(days=1))
        row = raises.ask(tenant, MUCH, "launch", until)
        with pytest.raises(raises.RaiseError, match="another operator"):
            raises.decide(row.pk, approve=True)
    with as_actor("two"):
        raises.decide(row.pk, approve=True)
    before = quota(tenant)
    fresh = Tenant.objects.select_related("plan").get(pk=tenant.pk)
    assert key_rows.limits_of(fresh, now + timedelta(days=2)).monthly_tokens == MUCH
    assert key_rows.limits_of(fresh, now + timedelta(days=4)).monthly_tokens == before == 10_000_000
    rule = LimitRule.objects.get()
    with as_actor("one"), pytest.raises(ValidationError, match="second operator"):
        rule.value = MUCH + 1
        limit_rules.save(rule)


def test_a_raise_whose_time_is_over_cannot_be_approved(cast: Cast, threshold: None) -> None:
    now = timezone.now()
    with as_actor("one"):
        row = raises.ask(cast.alice.tenant, MUCH, "launch", now + timedelta(hours=1), now=now)
    with as_actor("two"), pytest.raises(raises.RaiseError, match="over"):
        raises.decide(row.pk, approve=True, now=now + timedelta(hours=2))
    assert not LimitRule.objects.exists()


def test_what_one_operator_gives_back_is_bounded_like_a_raise(cast: Cast, threshold: None) -> None:
    tenant, now = cast.alice.tenant, timezone.now()
    adjusting.adjust(tenant, None, tokens=60_000_000, reason="import", now=now)
    adjusting.adjust(tenant, None, tokens=-15_000_000, reason="goodwill", now=now)
    with pytest.raises(ValueError, match="second operator"):
        adjusting.adjust(tenant, None, tokens=-5_000_001, reason="more of it", now=now)
    adjusting.adjust(tenant, None, tokens=-5_000_000, reason="the rest", now=now)
    with pytest.raises(ValueError, match="second operator"):
        adjusting.adjust(tenant, cast.alice.key, tokens=-1, reason="by a key", now=now)
    adjusting.adjust(tenant, None, tokens=5, reason="a charge", now=now)
    assert QuotaPeriod.objects.get(key=None).used_tokens == 40_000_005


def test_what_was_approved_for_a_time_is_not_made_longer_or_given_away_by_one(cast: Cast, threshold: None) -> None:
    now = timezone.now()
    with as_actor("one"):
        asked = raises.ask(cast.alice.tenant, MUCH, "launch", now + timedelta(days=3), now=now)
    with as_actor("two"):
        raises.decide(asked.pk, approve=True, now=now)
    rule = LimitRule.objects.get()
    for change in (
        {"ends_at": None},
        {"ends_at": now + timedelta(days=4)},
        {"starts_at": now - timedelta(days=4)},
        {"tenant": cast.bob.tenant},
        {"tenant": None, "plan": cast.bob.tenant.plan},
        {"recurrence": "month_end", "last_days": 28},
    ):
        wider = LimitRule.objects.get()
        for name, value in change.items():
            setattr(wider, name, value)
        with pytest.raises(ValidationError, match="second operator"):
            limit_rules.save(wider)
    rule.starts_at = rule.starts_at.replace(microsecond=0)  # as the console's form has it
    rule.value, rule.ends_at, rule.reason = MUCH - 1, now + timedelta(days=2), "less, and shorter"
    limit_rules.save(rule)
    assert LimitRule.objects.get().reason == "less, and shorter"
