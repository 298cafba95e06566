"""Limits for a time: in force at their moment, in every process, and never negative."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.urls import reverse
from django.utils import timezone

from accounts.identity import issuing, key_rows, known_keys
from accounts.identity.authentication import authenticate_credentials
from accounts.identity.principals import Principal
from accounts.limits import limit_rules
from accounts.limits.precedence import Limits
from accounts.models import APIKey, LimitRule, QuotaPeriod
from inference.inquiry import top
from tests.conftest import Cast, Customer

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
NOON = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) + timedelta(days=1)
"""Ahead of the clock: rules that have ended are not read."""


def rule(value: int | None, limit: str = "tokens_per_minute", **more: Any) -> LimitRule:
    row = LimitRule(limit=limit, value=value, **{"starts_at": NOON - timedelta(days=1), **more})
    limit_rules.save(row)
    known_keys.CACHE.forget()  # the test's transaction never commits
    return row


def at(who: Customer, now: datetime = NOON) -> Principal:
    return authenticate_credentials(who.headers, now=now)


def test_tenant_before_plan_and_key_beside_both(cast: Cast, plan: Any) -> None:
    plan.tokens_per_minute = 100
    plan.save()
    rule(1000, plan=plan)
    assert at(cast.alice).limit("tokens_per_minute") == 1000
    cast.alice.tenant.limit_overrides = {"tokens_per_minute": 200}
    cast.alice.tenant.save()
    rule(1001, plan=plan)
    assert at(cast.alice).limit("tokens_per_minute") == 200, "what is set for the tenant stands before its plan's rules"
    rule(5000, tenant=cast.alice.tenant)
    assert at(cast.alice).limit("tokens_per_minute") == 5000
    rule(50, key=cast.alice.key)
    rule(None, tenant=cast.alice.tenant)
    assert at(cast.alice).limit("tokens_per_minute") == 50
    assert at(cast.bob).limit("tokens_per_minute") == 1001
    assert at(cast.alice).tenant_overrides == {"tokens_per_minute"}


def test_a_key_that_was_rotated_keeps_its_limits_for_a_time(cast: Cast) -> None:
    first = cast.alice.key
    rule(50, key=first)
    second, _ = issuing.rotate(first, 3600)
    third, _ = issuing.rotate(second, 3600)
    rule(7, "concurrent_requests", key=second)
    chain = list(APIKey.objects.filter(pk__in=[first.pk, second.pk, third.pk]).select_related("tenant__plan"))
    many = key_rows.credentials_of([*chain, cast.bob.key], NOON)
    for key in chain:
        one = key_rows.credential_of(key, key_rows.rules_of(key), NOON).principal.key_limits
        assert (one.tokens_per_minute, one.concurrent_requests) == (50, 7)
        assert many[key.pk].principal.key_limits == one
    assert many[cast.bob.key.pk].principal.key_limits == Limits()


def test_a_rule_of_a_key_is_announced_to_all_keys_of_its_rotation(
    cast: Cast, monkeypatch: pytest.MonkeyPatch, django_capture_on_commit_callbacks: Any
) -> None:
    second, _ = issuing.rotate(cast.alice.key, 3600)
    announced: list[str] = []
    monkeypatch.setattr(known_keys.CACHE, "forget", lambda public_id=None: announced.append(public_id))
    with django_capture_on_commit_callbacks(execute=True):
        LimitRule.objects.create(key=second, limit="tokens_per_minute", value=5, starts_at=NOON)
    assert set(announced) >= {cast.alice.key.public_id, second.public_id}


def test_of_overlapping_raises_the_last_made_counts_until_it_ends(cast: Cast) -> None:
    tenant = cast.alice.tenant
    rule(900, tenant=tenant, ends_at=NOON + timedelta(hours=3))
    rule(300, tenant=tenant, ends_at=NOON + timedelta(hours=1))
    limits = [at(cast.alice, NOON + timedelta(hours=hour)).limit("tokens_per_minute") for hour in (0, 1, 3)]
    assert limits == [300, 900, None]


def test_limits_change_at_their_moment_without_another_query(cast: Cast, django_assert_num_queries: Any) -> None:
    rule(7, "concurrent_requests", plan=cast.alice.tenant.plan, recurrence="daily", **_hours(22, 6))
    moments = [NOON + timedelta(hours=hours) for hours in (0, 10, 18, 24, 34)]
    at(cast.alice)
    with django_assert_num_queries(0):
        found = [known_keys.current(key_rows.find(cast.alice.key.public_id), moment).principal for moment in moments]
    assert [each.limit("concurrent_requests") for each in found] == [None, 7, None, None, 7]


def _hours(start: int, end: int) -> dict[str, time]:
    return {"daily_from": time(start), "daily_until": time(end)}


def test_what_has_ended_is_not_read_again(cast: Cast) -> None:
    now = timezone.now()
    rule(5, tenant=cast.alice.tenant, starts_at=now - timedelta(hours=2), ends_at=now - timedelta(hours=1))
    assert key_rows.rules_of(cast.alice.key) == ()


@pytest.mark.parametrize(
    "values",
    [
        {"value": -1},
        {"value": 10**15 + 1},
        {"limit": "requests_per_hour"},
        {"ends_at": NOON - timedelta(days=2)},
        {"recurrence": "daily"},
        {"recurrence": "daily", **_hours(3, 3)},
        {"recurrence": "month_end"},
        {"recurrence": "month_end", "last_days": 29},
        {"recurrence": "yearly"},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(cast: Cast, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        rule(**{"value": 5, "tenant": cast.alice.tenant, **values})


@pytest.mark.parametrize("owners", [(), ("tenant", "key"), ("plan", "tenant", "key")])
def test_a_rule_has_one_owner(cast: Cast, owners: tuple[str, ...]) -> None:
    everybody = {"plan": cast.alice.tenant.plan, "tenant": cast.alice.tenant, "key": cast.alice.key}
    with pytest.raises(ValidationError):
        rule(5, **{name: everybody[name] for name in owners})


def test_the_database_refuses_what_goes_past_the_forms(cast: Cast) -> None:
    for values in ({"value": -5}, {"ends_at": NOON - timedelta(days=9)}, {"plan": cast.alice.tenant.plan}):
        row = LimitRule(**{"limit": "max_output", "value": 5, "tenant": cast.alice.tenant, "starts_at": NOON, **values})
        with pytest.raises(IntegrityError), transaction.atomic():
            row.save()


@pytest.mark.django_db(transaction=True)
def test_a_rule_is_published_like_every_change_of_a_limit(cast: Cast, valkey: Any) -> None:
    channel = valkey.pubsub()
    channel.subscribe(known_keys.CHANNEL)
    channel.get_message(timeout=1)
    before = int(valkey.get(known_keys.VERSION_KEY) or 0)
    row = LimitRule(limit="max_output", value=5, tenant=cast.alice.tenant)
    assert at(cast.alice, timezone.now()).limit("max_output") is None
    limit_rules.save(row)
    assert at(cast.alice, timezone.now()).limit("max_output") == 5
    row.delete()
    assert at(cast.alice, timezone.now()).limit("max_output") is None
    assert int(valkey.get(known_keys.VERSION_KEY)) == before + 2
    named = [channel.get_message(timeout=1)["data"] for _ in range(2)]
    assert named == [cast.alice.key.public_id.encode()] * 2


def test_without_rules_nothing_is_computed(cast: Cast) -> None:
    credential = key_rows.find(cast.alice.key.public_id)
    assert credential is not None and credential.changes_at is None
    assert known_keys.current(credential, NOON) is credential
    assert credential.bounds.limits(NOON)[2] == Limits()


# Which models, which adapters?


def test_lists_of_models_replace_and_narrow(cast: Cast, plan: Any) -> None:
    tenant, key = cast.alice.tenant, cast.alice.key
    plan.allowed_models = ["small", "large"]
    plan.save()
    known_keys.CACHE.forget()
    assert at(cast.alice).allowed_models == {"small", "large"}
    tenant.allowed_models = ["large", "other"]
    tenant.save()
    key.allowed_models = ["small", "other"]
    key.save()
    known_keys.CACHE.forget()
    assert at(cast.alice).allowed_models == {"other"}
    assert at(cast.bob).allowed_models == {"small", "large"}


@pytest.mark.parametrize("names", ["small", [""], [1], ["x" * 201], ["x"] * 201, {"small": 1}])
def test_what_is_no_list_of_names_is_refused(cast: Cast, names: Any) -> None:
    cast.alice.key.allowed_models = names
    with pytest.raises(ValidationError):
        cast.alice.key.full_clean()


def test_limits_in_force_of_many_are_read_together(cast: Cast, django_assert_num_queries: Any) -> None:
    """And the same as of each alone, for tenants and for keys."""
    tenants = [cast.alice.tenant, cast.bob.tenant]
    rule(500, "monthly_tokens", tenant=cast.alice.tenant)
    rule(7, "concurrent_requests", plan=cast.alice.tenant.plan)
    second, _ = issuing.rotate(cast.alice.key, 3600)
    rule(50, "monthly_tokens", key=second)
    owners: list[dict[str, Any]] = [{"tenant": each} for each in tenants]
    owners += [{"tenant": each.tenant, "key": each.key} for each in (cast.alice, cast.bob)]
    for owner in owners:
        QuotaPeriod.objects.create(starts_at=NOON, ends_at=NOON + timedelta(days=1), **owner)
    periods = list(QuotaPeriod.objects.select_related("tenant__plan", "key").order_by("pk"))
    with django_assert_num_queries(2):
        found = key_rows.limits_of_periods(periods, NOON)
    limits = [found[period.pk] for period in periods]
    assert [each.monthly_tokens for each in limits] == [500, 10_000_000, 50, None]
    assert limits[:2] == [key_rows.limits_of(each, NOON) for each in tenants]
    assert limits[0].concurrent_requests == 7
    assert key_rows.limits_of_tenants([], NOON) == {}


def test_bars_of_the_console_show_the_limits_of_this_moment(cast: Cast, admin_client: Any) -> None:
    now = timezone.now()
    tenant, key = cast.alice.tenant, cast.alice.key
    tenant.limit_overrides = {"monthly_tokens": 100}
    tenant.save()
    day = {"starts_at": now - timedelta(days=1), "ends_at": now + timedelta(days=1)}
    period = QuotaPeriod.objects.create(tenant=tenant, used_tokens=130, **day)
    QuotaPeriod.objects.create(tenant=tenant, key=key, used_tokens=130, **day)
    rule(260, "monthly_tokens", tenant=tenant, starts_at=now - timedelta(hours=1))
    rule(520, "monthly_tokens", key=key, starts_at=now - timedelta(hours=1))
    for name, *arguments in (
        ("admin:accounts_tenant_changelist",),
        ("admin:accounts_tenant_change", tenant.pk),
        ("admin:accounts_quotaperiod_changelist",),
        ("admin:accounts_quotaperiod_change", period.pk),
    ):
        page = admin_client.get(reverse(name, args=arguments)).content.decode()
        assert "130 of 260" in page and "130 of 100" not in page, name
    assert "130 of 520" in admin_client.get(reverse("admin:accounts_quotaperiod_changelist")).content.decode()
    (row,) = [row for row in top._tenants(now) if row["tenant"] == tenant.name]
    assert row["monthly_tokens"] == 260
