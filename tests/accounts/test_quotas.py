"""Reserve before, settle after: what is held, charged, freed, and written in the ledger."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction
from django.test.utils import CaptureQueriesContext

from accounts.identity import issuing
from accounts.ledger import quota_rows, quotas
from accounts.ledger.quotas import Held, ReleaseOrder
from accounts.limits.precedence import Limits
from accounts.models import LedgerEntry, Plan, QuotaPeriod, Reservation, Tenant
from accounts.trail.refusals import Refusal
from tests.accounts.quota_cast import (
    NOW,
    assert_proven,
    charge_order,
    counters,
    key_period,
    kinds,
    reserve_order,
    reserved,
    settle_order,
    tenant_period,
)
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@pytest.fixture(autouse=True)
def _proven_at_the_end(db: None) -> Iterator[None]:
    """Whatever a test does through quotas.py, the ledger holds afterwards."""
    yield
    assert_proven()


def refused(order: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        quotas.charge_request(order) if isinstance(order, quotas.ChargeOrder) else quotas.reserve(order)
    return caught.value


def test_a_reservation_is_held_on_key_and_tenant(cast: Cast) -> None:
    order = reserve_order(cast.alice)
    assert quotas.reserve(order) == Held(order.request_id, 40, False, 50)
    assert counters(tenant_period(cast.alice)) == counters(key_period(cast.alice)) == (0, 50, 0, 1)
    assert not QuotaPeriod.objects.filter(tenant=cast.charlie.tenant).exists()


def test_settling_charges_the_exact_tokens_and_frees_the_rest(cast: Cast) -> None:
    request_id = reserved(cast.alice)
    assert quotas.settle(settle_order(request_id, 10, 7, cached_tokens=4))
    assert counters(tenant_period(cast.alice)) == counters(key_period(cast.alice)) == (17, 0, 1, 0)
    entry = LedgerEntry.objects.get(request_id=request_id, kind="settle")
    assert (entry.used_tokens, entry.reserved_tokens, entry.model) == (17, -50, "small")
    assert (entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens) == (10, 4, 7)
    assert kinds(request_id) == ["reserve", "settle"]


def test_settling_twice_charges_once(cast: Cast) -> None:
    request_id = reserved(cast.alice)
    order = settle_order(request_id)
    assert quotas.settle_many([order, order]) == [True, False]
    assert not quotas.settle(order)
    assert not quotas.release(request_id, "late", NOW)
    assert counters(tenant_period(cast.alice)) == (30, 0, 1, 0)


def test_a_release_charges_nothing(cast: Cast) -> None:
    request_id = reserved(cast.alice)
    assert quotas.release(request_id, "worker_lost", NOW)
    assert not quotas.settle(settle_order(request_id))
    assert counters(tenant_period(cast.alice)) == (0, 0, 0, 0)
    assert LedgerEntry.objects.get(request_id=request_id, kind="release").reason == "worker_lost"


def test_what_is_unknown_is_not_settled(cast: Cast) -> None:
    assert (
        quotas.settle_many([settle_order("nobody"), ReleaseOrder(request_id="nil", reason="", now=NOW)]) == [False] * 2
    )
    assert quotas.settle_many([]) == [] and quotas.reserve_many([]) == []


def test_more_than_was_reserved_is_never_charged(cast: Cast, caplog: Any) -> None:
    request_id = reserved(cast.alice)
    quotas.settle(settle_order(request_id, 10, 45))
    assert counters(tenant_period(cast.alice)) == (50, 0, 1, 0)
    assert "computed 55 tokens and had reserved 50" in caplog.text


def test_the_output_is_clamped_to_what_is_left(cast: Cast) -> None:
    for _ in range(19):
        quotas.settle(settle_order(reserved(cast.alice), 10, 40))
    quotas.settle(settle_order(reserved(cast.alice), 10, 10))
    assert quotas.reserve(reserve_order(cast.alice)).max_tokens == 20
    assert refused(reserve_order(cast.alice)).code == "quota_reserved"


def test_an_exhausted_quota_says_when_it_starts_anew(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice, 100, 900), 100, 900))
    answer = refused(reserve_order(cast.alice))
    assert answer.code == "quota_exhausted" and answer.retry_after is None
    assert answer.extra["reset_at"] == "2026-12-01T00:00:00Z"
    assert answer.extra["reset_in_seconds"] == (datetime(2026, 12, 1, tzinfo=UTC) - NOW).total_seconds()
    quotas.reserve(reserve_order(cast.bob))


def test_a_refusal_writes_nothing(cast: Cast) -> None:
    assert refused(reserve_order(cast.alice, 2000)).code == "quota_exhausted"
    assert counters(tenant_period(cast.alice)) == (0, 0, 0, 0)
    assert not Reservation.objects.exists() and not LedgerEntry.objects.exists()


def test_a_key_has_a_quota_of_its_own(cast: Cast) -> None:
    other, _ = issuing.issue(cast.alice.tenant, "second")
    narrow = Limits(monthly_tokens=60)
    quotas.settle(settle_order(reserved(cast.alice, key_limits=narrow), 10, 40))
    answer = refused(reserve_order(cast.alice, key_limits=narrow))
    assert (answer.code, answer.extra["of"]) == ("quota_exhausted", "key")
    quotas.reserve(reserve_order(cast.alice, key_id=other.pk, key_limits=narrow))


def test_requests_are_a_quota_too(cast: Cast) -> None:
    limits = Limits(monthly_requests=2)
    first = reserved(cast.alice, tenant_limits=limits)
    reserved(cast.alice, tenant_limits=limits)
    assert refused(reserve_order(cast.alice, tenant_limits=limits)).code == "quota_reserved"
    quotas.settle(settle_order(first))
    assert refused(reserve_order(cast.alice, tenant_limits=Limits(monthly_requests=1))).code == "quota_exhausted"
    assert refused(charge_order(cast.alice, tenant_limits=limits)).code == "quota_reserved"


def test_a_cached_completion_costs_a_request_and_no_tokens(cast: Cast) -> None:
    limits = Limits(monthly_requests=1, monthly_tokens=0)
    order = charge_order(cast.alice, tenant_limits=limits, model="small", reason="cached")
    quotas.charge_request(order)
    assert counters(tenant_period(cast.alice)) == counters(key_period(cast.alice)) == (0, 0, 1, 0)
    assert refused(charge_order(cast.alice, tenant_limits=limits)).code == "quota_exhausted"


def test_orders_of_a_group_are_answered_one_by_one(cast: Cast) -> None:
    limits = Limits(monthly_tokens=120)
    orders = [reserve_order(cast.alice, tenant_limits=limits, all_or_nothing=True) for _ in range(4)]
    orders.insert(2, reserve_order(cast.bob))
    answers = quotas.reserve_many(orders)
    assert [isinstance(answer, Held) for answer in answers] == [True, True, True, False, False]
    assert counters(tenant_period(cast.alice)) == (0, 100, 0, 2)
    assert counters(tenant_period(cast.bob)) == (0, 50, 0, 1)


def test_limits_that_change_within_a_group_bind_each_order_by_its_own(cast: Cast) -> None:
    tight, wide = Limits(monthly_tokens=60), Limits(monthly_tokens=200)
    orders = [reserve_order(cast.alice, tenant_limits=each, all_or_nothing=True) for each in (tight, wide, tight, wide)]
    answers = quotas.reserve_many(orders)
    assert [isinstance(answer, Held) for answer in answers] == [True, True, False, True]
    assert isinstance(quotas.reserve_many([reserve_order(cast.alice, tenant_limits=Limits())])[0], Held)


# Periods


def test_the_next_month_starts_with_nothing_used(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice, 100, 900), 100, 900))
    later = datetime(2026, 12, 1, tzinfo=UTC)
    quotas.reserve(reserve_order(cast.alice, now=later))
    assert counters(tenant_period(cast.alice)) == (1000, 0, 1, 0)
    assert counters(tenant_period(cast.alice, later)) == (0, 50, 0, 1)


def test_a_request_is_settled_in_the_month_that_it_was_reserved_in(cast: Cast) -> None:
    request_id = reserved(cast.alice, now=datetime(2026, 11, 30, 23, 59, tzinfo=UTC))
    later = datetime(2026, 12, 1, 0, 1, tzinfo=UTC)
    reserved(cast.alice, now=later)
    quotas.settle(settle_order(request_id, now=later))
    assert counters(tenant_period(cast.alice)) == (30, 0, 1, 0)
    assert counters(tenant_period(cast.alice, later)) == (0, 50, 0, 1)


def test_a_reset_date_in_the_past_rolls_the_month_over(cast: Cast) -> None:
    quotas.settle(settle_order(reserved(cast.alice, 100, 900), 100, 900))
    QuotaPeriod.objects.filter(tenant=cast.alice.tenant).update(ends_at=NOW - timedelta(seconds=1))
    quotas.reserve(reserve_order(cast.alice))
    fresh = tenant_period(cast.alice)
    assert counters(fresh) == (0, 50, 0, 1)
    assert (fresh.starts_at, fresh.ends_at) == (NOW - timedelta(seconds=1), datetime(2026, 12, 1, tzinfo=UTC))


def test_a_moved_anchor_day_lets_the_open_period_stand(cast: Cast) -> None:
    reserved(cast.alice)
    reserved(cast.alice, anchor_day=15)
    assert QuotaPeriod.objects.filter(tenant=cast.alice.tenant, key=None).count() == 1
    later = datetime(2026, 12, 2, tzinfo=UTC)
    reserved(cast.alice, anchor_day=15, now=later)
    period = tenant_period(cast.alice, later)
    assert (period.starts_at.day, period.ends_at) == (1, datetime(2026, 12, 15, tzinfo=UTC))


def test_orders_of_two_months_may_be_in_one_group(cast: Cast) -> None:
    later = datetime(2026, 12, 1, tzinfo=UTC)
    answers = quotas.reserve_many([reserve_order(cast.alice), reserve_order(cast.alice, now=later)])
    assert all(isinstance(answer, Held) for answer in answers)
    assert counters(tenant_period(cast.alice)) == counters(tenant_period(cast.alice, later)) == (0, 50, 0, 1)


# Sweep and corrections


def test_the_sweep_releases_what_outlived_its_time(cast: Cast) -> None:
    lost = [reserved(cast.alice) for _ in range(3)]
    kept = reserved(cast.alice, expires_at=NOW + timedelta(hours=1))
    assert quotas.sweep_expired(NOW) == 0
    assert quotas.sweep_expired(NOW + timedelta(minutes=10)) == 3
    assert counters(tenant_period(cast.alice)) == (0, 50, 0, 1)
    assert Reservation.objects.get(pk=kept).state == "open"
    assert LedgerEntry.objects.get(request_id=lost[0], kind="release").reason == "expired"


def test_the_sweep_goes_on_until_nothing_is_left(cast: Cast, monkeypatch: Any) -> None:
    monkeypatch.setattr(quotas, "SWEEP_SIZE", 2)
    for _ in range(5):
        reserved(cast.alice)
    assert quotas.sweep_expired(NOW + timedelta(days=1)) == 5


def test_a_correction_is_in_the_ledger(cast: Cast) -> None:
    who = {"tenant_id": cast.alice.tenant.pk, "anchor_day": 1, "now": NOW}
    quotas.adjust(request_id="a1", key_id=cast.alice.key.pk, tokens=100, requests=2, reason="import", **who)
    quotas.adjust(request_id="a1", tokens=-40, reason="goodwill", **who)
    assert counters(tenant_period(cast.alice)) == (60, 0, 2, 0)
    assert counters(key_period(cast.alice)) == (100, 0, 2, 0)
    with pytest.raises(ValueError, match="more than was used"):
        quotas.adjust(request_id="a2", tokens=-61, reason="too much", **who)
    assert counters(tenant_period(cast.alice)) == (60, 0, 2, 0)


# Rows of other rooms


def plan_row(name: str) -> Plan:
    return Plan(name=name)


def test_records_are_written_in_the_same_transaction_once(cast: Cast) -> None:
    request_id = reserved(cast.alice)
    order = settle_order(request_id, records=(plan_row("receipt"),))
    quotas.settle(order)
    quotas.settle(settle_order(request_id, records=(plan_row("receipt"),)))
    quotas.charge_request(charge_order(cast.alice, records=(plan_row("hit"),)))
    refused(charge_order(cast.alice, tenant_limits=Limits(monthly_requests=0), records=(plan_row("no"),)))
    assert set(Plan.objects.values_list("name", flat=True)) == {"cast", "receipt", "hit"}


def test_records_that_cannot_be_written_roll_the_settlement_back(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    request_id = reserved(cast.alice)

    def fail(_rows: object) -> None:
        raise RuntimeError("no receipt")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError), transaction.atomic():
        patched.setattr(quotas, "_insert_records", fail)
        quotas.settle(settle_order(request_id))
    assert counters(tenant_period(cast.alice)) == (0, 50, 0, 1)
    assert quotas.settle(settle_order(request_id))


# Cost


@pytest.mark.parametrize("size", [1, 5, 40])
def test_the_number_of_statements_does_not_grow_with_the_group(cast: Cast, size: int) -> None:
    quotas.reserve_many([reserve_order(cast.alice), reserve_order(cast.bob)])  # opens the periods
    free = Limits()
    orders = [reserve_order((cast.alice, cast.bob)[n % 2], tenant_limits=free) for n in range(size)]
    with CaptureQueriesContext(connection) as queries:
        quotas.reserve_many(orders)
    assert len(queries) <= 6  # SELECT, UPDATE, two INSERTs, and the transaction
    with CaptureQueriesContext(connection) as queries:
        quotas.settle_many([settle_order(order.request_id) for order in orders])
    assert len(queries) <= 9  # two of them lock rows in order, on PostgreSQL only; one reads prices, now and then


# Trouble


@pytest.mark.django_db(transaction=True)
def test_a_reservation_whose_reply_was_lost_is_not_made_twice(cast: Cast) -> None:
    order = reserve_order(cast.alice)
    assert quotas.reserve(order) == quotas.reserve(order)
    charge = charge_order(cast.alice)
    quotas.charge_request(charge)
    quotas.charge_request(charge)
    assert counters(tenant_period(cast.alice)) == (0, 50, 1, 1)


@pytest.mark.django_db(transaction=True)
def test_an_id_that_has_ended_or_is_anothers_cannot_be_reserved_again(cast: Cast) -> None:
    order = reserve_order(cast.alice)
    quotas.reserve(order)
    with pytest.raises(IntegrityError):
        quotas.reserve(reserve_order(cast.bob, request_id=order.request_id))
    quotas.release(order.request_id, "over", NOW)
    with pytest.raises(IntegrityError):
        quotas.reserve(order)
    with pytest.raises(IntegrityError):
        quotas.charge_request(charge_order(cast.alice, request_id=order.request_id))


@pytest.mark.django_db(transaction=True)
def test_a_lock_is_waited_for_and_then_given_up(cast: Cast, monkeypatch: Any) -> None:
    monkeypatch.setattr(quotas, "RETRY_SECONDS", (0.0, 0.0))
    real, failures = quota_rows.read_balances, [1]

    def locked(*args: Any) -> Any:
        if failures[0]:
            failures[0] -= 1
            raise OperationalError("database is locked")
        return real(*args)

    monkeypatch.setattr(quota_rows, "read_balances", locked)
    order = reserve_order(cast.alice)
    assert quotas.reserve(order).max_tokens == 40
    failures[0] = 99
    answer = refused(reserve_order(cast.alice))
    assert answer.code == "service_unavailable" and answer.retry_after == 1
    failures[0] = 0
    assert counters(tenant_period(cast.alice)) == (0, 50, 0, 1)


def test_in_a_transaction_of_the_caller_nothing_is_tried_again(cast: Cast, monkeypatch: Any) -> None:
    def locked(*_args: Any) -> Any:
        raise OperationalError("database is locked")

    with monkeypatch.context() as broken:
        broken.setattr(quota_rows, "read_balances", locked)
        with pytest.raises(OperationalError), transaction.atomic():
            quotas.reserve(reserve_order(cast.alice))


def test_rows_of_many_statements_are_written_once_each(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_rows, "ROWS_PER_STATEMENT", 2)
    orders = [reserve_order(cast.alice, 1, 1) for _ in range(5)]
    quotas.reserve_many(orders)
    rows = Reservation.objects.filter(request_id__in=[order.request_id for order in orders])
    assert rows.count() == 5
    assert {row.created_at for row in rows} == {order.now for order in orders}
    quota_rows.insert(Reservation, list(rows), ignore_conflicts=True)
    with pytest.raises(IntegrityError), transaction.atomic():
        quota_rows.insert(Reservation, list(rows))


def test_a_column_that_has_to_be_converted_is_written_as_its_field_would(cast: Cast) -> None:
    plan = cast.alice.tenant.plan
    quota_rows.insert(Tenant, [Tenant(name="Dora's", plan=plan, limit_overrides={"monthly_tokens": None})])
    assert Tenant.objects.get(name="Dora's").limit_overrides == {"monthly_tokens": None}


def test_counters_that_moved_are_found_by_the_update(cast: Cast) -> None:
    reserved(cast.alice)
    period = tenant_period(cast.alice)
    with pytest.raises(quota_rows.CountersMoved), transaction.atomic():
        quota_rows.move({period.pk: quota_rows.Movement(reserved_tokens=1, token_limit=50)})
    with pytest.raises(quota_rows.CountersMoved), transaction.atomic():
        quota_rows.move({period.pk: quota_rows.Movement(used_requests=1, request_limit=1)})
    quota_rows.move({})


def test_these_tests_run_on_the_database_that_was_asked_for() -> None:
    asked = "postgresql" if os.environ.get("LLMSITE_TEST_DATABASE_URL") else "sqlite"
    assert connection.vendor == asked


# Several orders of one request


def test_orders_of_one_request_are_held_together_or_not_at_all(cast: Cast) -> None:
    orders = [reserve_order(cast.alice, 10, 300) for _ in range(3)]
    held = quotas.reserve_together(orders)
    assert [each.reserved_tokens for each in held] == [310] * 3
    with pytest.raises(Refusal) as caught:
        quotas.reserve_together([reserve_order(cast.alice, 30, 30) for _ in range(3)])
    assert caught.value.code == "quota_reserved"
    assert caught.value.extra["needed"] == 93, "their prompts, and a token each"
    assert counters(tenant_period(cast.alice)) == (0, 930, 0, 3)
    assert LedgerEntry.objects.count() == Reservation.objects.count() == 3


def test_what_the_quota_has_left_is_shared_out_among_them(cast: Cast) -> None:
    orders = [reserve_order(cast.alice, 10, 5), *(reserve_order(cast.alice, 0, 800) for _ in range(2))]
    held = quotas.reserve_together(orders)
    assert [(each.max_tokens, each.clamped) for each in held] == [(5, False), (492, True), (493, True)]
    assert counters(tenant_period(cast.alice))[:2] == (0, 1000)


def test_whole_orders_of_one_request_that_do_not_fit_hold_nothing(cast: Cast) -> None:
    orders = [reserve_order(cast.alice, 10, 300, all_or_nothing=True) for _ in range(4)]
    with pytest.raises(Refusal) as caught:
        quotas.reserve_together(orders)
    assert (caught.value.code, caught.value.extra["needed"]) == ("quota_exhausted", 1240)
    assert not LedgerEntry.objects.exists()


def test_the_requests_of_a_month_count_each_of_them_and_what_is_cached(cast: Cast) -> None:
    limits = Limits(monthly_requests=2, monthly_tokens=100)
    orders = [charge_order(cast.alice, tenant_limits=limits), reserve_order(cast.alice, tenant_limits=limits)]
    with pytest.raises(Refusal) as caught:
        quotas.reserve_together([*orders, charge_order(cast.alice, tenant_limits=limits)])
    assert caught.value.extra["limit"] == "monthly_requests"
    assert not LedgerEntry.objects.exists()
    quotas.reserve_together(orders)
    assert counters(tenant_period(cast.alice)) == (0, 50, 1, 1)


def test_cached_answers_cost_no_tokens_where_none_are_left(cast: Cast) -> None:
    limits = Limits(monthly_tokens=0)
    quotas.reserve_together([charge_order(cast.alice, tenant_limits=limits) for _ in range(2)])
    assert counters(tenant_period(cast.alice)) == (0, 0, 2, 0)


def test_orders_that_were_held_by_a_commit_whose_reply_was_lost_are_answered_again(cast: Cast) -> None:
    orders = [reserve_order(cast.alice, 10, 300) for _ in range(2)]
    held = quotas.reserve_together(orders)
    assert [quotas._held_before(order) for order in orders] == held
    assert quotas._repeated(quotas._Work(orders=(*orders, reserve_order(cast.alice)))) is None


def test_a_reservation_that_waits_for_its_turn_is_kept(cast: Cast) -> None:
    request_ids = [reserved(cast.alice), reserved(cast.alice)]
    assert quotas.prolong(request_ids[:1], NOW + timedelta(hours=2)) == 1
    assert quotas.sweep_expired(NOW + timedelta(hours=1)) == 1
    assert quotas.prolong(request_ids, NOW + timedelta(hours=3)) == 1
