"""Totals of days that are over: kept once nothing can change them, and then what the days of usage add up to."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from django.db.models import Sum

from accounts.ledger import day_totals, quotas
from accounts.ledger.audit import audit
from accounts.limits.precedence import Limits
from accounts.models import DayTotal, DayUsage
from tests.accounts.quota_cast import NOW, assert_proven, reserved, settle_order
from tests.conftest import Cast, Customer

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
NIGHT = datetime(2026, 11, 22, tzinfo=UTC)
LATER = NIGHT + timedelta(hours=1)
TODAY = NOW.date()


def served(who: Customer, now: datetime = NOW, output: int = 20, **more: str) -> None:
    request_id = reserved(who, now=now, tenant_limits=Limits())
    assert quotas.settle(settle_order(request_id, output=output, now=now, **more))


def totals_of(day: date) -> dict[tuple[str, str], tuple[int, int]]:
    rows = DayTotal.objects.filter(day=day).values_list("by", "name", "requests", "used_tokens")
    return {(by, name): (requests, tokens) for by, name, requests, tokens in rows}


def test_a_day_is_kept_by_tenant_model_and_adapters(cast: Cast) -> None:
    served(cast.alice)
    served(cast.alice, adapters="verse")
    served(cast.bob, model="large", output=5)
    assert day_totals.close_due(LATER) == day_totals.CLOSE_AT_ONCE
    assert totals_of(TODAY) == {
        ("day", ""): (3, 75),
        ("tenant", str(cast.alice.tenant.pk)): (2, 60),
        ("tenant", str(cast.bob.tenant.pk)): (1, 15),
        ("model", "small"): (2, 60),
        ("model", "large"): (1, 15),
        ("adapters", ""): (2, 45),
        ("adapters", "verse"): (1, 30),
    }
    assert totals_of(TODAY - timedelta(days=1)) == {("day", ""): (0, 0)}, "nobody looks again at an empty day"
    assert_proven()


def test_a_day_is_kept_once_nothing_of_it_can_change(cast: Cast) -> None:
    served(cast.alice)
    running = reserved(cast.alice, now=NIGHT - timedelta(seconds=5), tenant_limits=Limits())
    day_totals.close_due(NIGHT + timedelta(minutes=9))
    assert totals_of(TODAY) == {}, "another machine's clock may still be in the day"
    day_totals.close_due(LATER)
    assert totals_of(TODAY) == {}, "a request of it still runs"
    assert totals_of(TODAY - timedelta(days=1)) != {}, "the day before it is over"
    quotas.settle(settle_order(running, now=NIGHT - timedelta(seconds=1)))
    day_totals.close_due(LATER)
    assert totals_of(TODAY)["day", ""] == (2, 60)
    assert_proven()


def test_every_day_of_the_longest_chart_is_kept_and_none_before(cast: Cast) -> None:
    old = NOW - timedelta(days=day_totals.KEPT_DAYS)
    served(cast.alice, old)
    rounds = []
    while number := day_totals.close_due(LATER, most=40):
        rounds.append(number)
    assert rounds == [40, 40, 10]
    assert totals_of(old.date()) == {} and totals_of(old.date() + timedelta(days=1)) != {}
    day_totals.close_due(LATER + timedelta(days=1))
    assert DayTotal.objects.filter(by="day").count() == day_totals.KEPT_DAYS
    assert_proven()


def test_two_at_once_keep_a_day_once(cast: Cast) -> None:
    served(cast.alice)
    assert day_totals._close(TODAY) is True
    assert day_totals._close(TODAY) is False
    assert totals_of(TODAY)["day", ""] == (1, 30)


def test_the_audit_finds_a_total_that_says_something_else(cast: Cast) -> None:
    served(cast.alice)
    day_totals.close_due(LATER)
    DayTotal.objects.filter(by="model", name="small").update(cost_nanos=1)
    (problem,) = audit().problems
    assert problem.code == "day_total_differs" and "small" in problem.subject


def test_totals_are_the_sums_of_the_days_of_usage(cast: Cast) -> None:
    for number, who in enumerate((cast.alice, cast.bob, cast.alice)):
        served(who, output=number, model=f"model-{number % 2}", adapters="verse" * (number % 2))
    day_totals.close_due(LATER)
    whole = DayUsage.objects.aggregate(requests=Sum("requests"), tokens=Sum("used_tokens"), cost=Sum("cost_nanos"))
    for by in DayTotal.By:
        kept = DayTotal.objects.filter(by=by, day=TODAY)
        sums = kept.aggregate(requests=Sum("requests"), tokens=Sum("used_tokens"), cost=Sum("cost_nanos"))
        assert sums == whole, by
