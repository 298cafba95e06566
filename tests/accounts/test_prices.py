"""What tokens cost: by model and moment, exact in every database."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction

from accounts.ledger import prices, quotas, statements
from accounts.ledger.prices import Rates, money, nanos
from accounts.models import LedgerEntry, Price, QuotaPeriod
from tests.accounts.quota_cast import (
    NOW,
    assert_proven,
    charge_order,
    key_period,
    reserved,
    settle_order,
    tenant_period,
)
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


def priced(
    model: str = "small", input_price: str = "2", cached: str | None = None, output: str = "8", **more: Any
) -> Price:
    row = Price(
        model=model,
        valid_from=more.pop("valid_from", NOW - timedelta(days=1)),
        input_per_million=Decimal(input_price),
        cached_input_per_million=None if cached is None else Decimal(cached),
        output_per_million=Decimal(output),
    )
    row.full_clean()
    row.save()
    prices._table = None  # the test's transaction never commits
    return row


def cost_of(request_id: str) -> int:
    return LedgerEntry.objects.get(request_id=request_id, kind="settle").cost_nanos


def test_a_settled_request_has_the_cost_of_its_tokens(cast: Cast) -> None:
    priced(input_price="2", cached="0.5", output="8")
    request_id = reserved(cast.alice, prompt=100, output=50)
    quotas.settle(settle_order(request_id, prompt=100, output=20, cached_tokens=40))
    assert cost_of(request_id) == 60 * 2000 + 40 * 500 + 20 * 8000
    assert tenant_period(cast.alice).cost_nanos == key_period(cast.alice).cost_nanos == cost_of(request_id)
    assert_proven()


def test_what_is_given_back_takes_tokens_request_and_cost_back_whatever_the_month(cast: Cast) -> None:
    """Reserved before midnight, settled after it, given back when that month has its statement."""
    midnight = datetime(2026, 12, 1, tzinfo=UTC)
    priced(input_price="2", output="8")
    request_id = reserved(cast.alice, prompt=100, output=50, now=midnight - timedelta(minutes=1))
    quotas.settle(settle_order(request_id, prompt=100, output=20, now=midnight + timedelta(minutes=1)))
    later = datetime(2027, 1, 3, tzinfo=UTC)
    told = statements.close(cast.alice.tenant, date(2026, 12, 1), later)
    assert told is not None and told.cost_nanos == cost_of(request_id) > 0
    charged = LedgerEntry.objects.get(request_id=request_id, kind="settle")
    quotas.give_back(charged, request_id="refund-1", reason="its answer was lost", now=later)
    for period in (tenant_period(cast.alice, NOW), key_period(cast.alice, NOW)):
        assert (period.used_tokens, period.used_requests, period.cost_nanos, period.prompt_tokens) == (0, 0, 0, 0)
    assert statements.totals(cast.alice.tenant.pk, date(2027, 1, 1)) == (-1, -120, -cost_of(request_id))
    assert QuotaPeriod.objects.filter(key=None).count() == 1
    assert_proven()
    with pytest.raises(ValueError, match="given back"), transaction.atomic():
        quotas.give_back(charged, request_id="refund-2", reason="again", now=later)


def test_a_price_holds_from_its_moment_on_and_what_was_settled_keeps_its_cost(cast: Cast) -> None:
    priced(input_price="1", output="1")
    before = reserved(cast.alice)
    quotas.settle(settle_order(before, now=NOW))
    priced(input_price="3", output="3", valid_from=NOW + timedelta(hours=1))
    same, after = reserved(cast.alice), reserved(cast.alice)
    quotas.settle(settle_order(same, now=NOW + timedelta(minutes=59)))
    quotas.settle(settle_order(after, now=NOW + timedelta(hours=1)))
    assert [cost_of(each) for each in (before, same, after)] == [30_000, 30_000, 90_000]
    assert_proven()


def test_a_model_without_a_price_has_that_of_every_model_or_is_free(cast: Cast) -> None:
    free = reserved(cast.alice)
    quotas.settle(settle_order(free, model="other"))
    priced(model="", input_price="1", output="1")
    paid = reserved(cast.alice)
    quotas.settle(settle_order(paid, model="other"))
    assert (cost_of(free), cost_of(paid)) == (0, 30_000)


def test_what_charges_no_tokens_costs_nothing(cast: Cast) -> None:
    priced()
    quotas.charge_request(charge_order(cast.alice, model="small"))
    quotas.release(reserved(cast.alice), "worker_lost", NOW)
    assert sum(LedgerEntry.objects.values_list("cost_nanos", flat=True)) == 0


@pytest.mark.parametrize("name", ["input_per_million", "cached_input_per_million", "output_per_million"])
def test_a_negative_price_is_refused_by_form_and_database(db: None, name: str) -> None:
    values = {"input_per_million": Decimal(1), "cached_input_per_million": None, "output_per_million": Decimal(1)}
    row = Price(model="small", **{**values, name: Decimal("-0.000001")})
    with pytest.raises(ValidationError):
        row.full_clean()
    with pytest.raises(IntegrityError), transaction.atomic():
        row.save()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "100001", "0.0000001"])
def test_a_price_that_is_no_price_is_refused(db: None, text: str) -> None:
    row = Price(model="small", input_per_million=Decimal(text), output_per_million=Decimal(1))
    with pytest.raises(ValidationError):
        row.full_clean()


def test_a_cost_is_rounded_once_and_half_to_even() -> None:
    rates = Rates(Decimal("0.0005"), Decimal("0.0005"), Decimal(0))
    assert [rates.cost_nanos(prompt_tokens=n, cached_tokens=0, completion_tokens=0) for n in (1, 2, 3)] == [0, 1, 2]
    assert rates.cost_nanos(prompt_tokens=2, cached_tokens=9, completion_tokens=0) == 1


def test_money_is_written_with_the_places_that_it_needs() -> None:
    told = {0: "0.00", 1: "0.000000001", 12_500_000_000: "12.50", -350_000_000: "-0.35"}
    assert {number: money(number) for number in told} == told
    assert nanos(Decimal("-0.35")) == -350_000_000
    with pytest.raises(ValueError, match="nine places"):
        nanos(Decimal("0.0000000001"))
