"""The audit finds what is wrong, and nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection
from django.db.models import F

from accounts.ledger import audit as audit_module
from accounts.ledger import quotas
from accounts.ledger.audit import audit
from accounts.limits.precedence import Limits
from accounts.models import LedgerEntry, QuotaPeriod, Reservation
from tests.accounts.quota_cast import charge_order, reserved, settle_order
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@pytest.fixture
def busy(cast: Cast) -> str:
    """A ledger with one of everything; the id of a request that is settled."""
    settled = reserved(cast.alice)
    quotas.settle(settle_order(settled))
    quotas.release(reserved(cast.alice), "cancelled", settle_order("x").now)
    quotas.charge_request(charge_order(cast.alice, tenant_limits=Limits(monthly_requests=5)))
    quotas.adjust(
        request_id="import",
        tenant_id=cast.bob.tenant.pk,
        anchor_day=1,
        tokens=5,
        reason="import",
        now=settle_order("x").now,
    )
    reserved(cast.bob)
    return settled


def codes() -> set[str]:
    return {problem.code for problem in audit().problems}


def test_a_ledger_that_holds_is_proven(busy: str) -> None:
    report = audit()
    assert report.is_clean and report.problems == []
    assert (report.num_entries, report.num_reservations, report.num_open) == (7, 3, 1)
    assert (report.used_tokens, report.used_requests, report.num_periods) == (35, 2, 4)


def test_an_empty_ledger_is_proven() -> None:
    assert audit().is_clean


def wrong_counter(_settled: str) -> None:
    QuotaPeriod.objects.filter(key=None).update(used_tokens=F("used_tokens") + 1)


def forgotten_prompt(_settled: str) -> None:
    QuotaPeriod.objects.filter(prompt_tokens__gt=0).update(prompt_tokens=0)


def limit_passed(settled: str) -> None:
    LedgerEntry.objects.filter(request_id=settled, kind="reserve").update(tenant_limit=49)


def request_limit_passed(_settled: str) -> None:
    LedgerEntry.objects.filter(tenant_request_limit=5).update(tenant_request_limit=0)


def other_balance(settled: str) -> None:
    LedgerEntry.objects.filter(request_id=settled, kind="reserve").update(key_committed_after=49)


def lost_reserve(settled: str) -> None:
    LedgerEntry.objects.filter(request_id=settled, kind="reserve").delete()


def lost_settlement(settled: str) -> None:
    LedgerEntry.objects.filter(request_id=settled, kind="settle").delete()


def charged_too_much(settled: str) -> None:
    LedgerEntry.objects.filter(request_id=settled, kind="settle").update(used_tokens=51)


def freed_too_little(settled: str) -> None:
    LedgerEntry.objects.filter(request_id=settled, kind="settle").update(reserved_tokens=-49)


def ended_elsewhere(settled: str) -> None:
    entry = LedgerEntry.objects.get(request_id=settled, kind="settle")
    other = QuotaPeriod.objects.exclude(pk=entry.tenant_period_id).filter(key=None).get()
    LedgerEntry.objects.filter(pk=entry.pk).update(tenant_period=other)


def reopened(settled: str) -> None:
    Reservation.objects.filter(pk=settled).update(state="open")


def other_amount(_settled: str) -> None:
    Reservation.objects.filter(state="open").update(tokens=1)


def lost_reservation(_settled: str) -> None:
    Reservation.objects.filter(state="open").delete()


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (wrong_counter, "period_differs_from_ledger"),
        (forgotten_prompt, "period_differs_from_ledger"),
        (limit_passed, "limit_passed"),
        (request_limit_passed, "limit_passed"),
        (other_balance, "replay_differs"),
        (lost_reserve, "ended_twice"),
        (lost_settlement, "state_differs"),
        (charged_too_much, "overcharged"),
        (freed_too_little, "release_differs"),
        (ended_elsewhere, "period_differs"),
        (reopened, "state_differs"),
        (other_amount, "state_differs"),
        (lost_reservation, "state_differs"),
    ],
)
def test_damage_is_found(busy: str, damage: Callable[[str], None], code: str) -> None:
    damage(busy)
    assert code in codes()


def test_problems_are_bounded(busy: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(audit_module, "MAX_PROBLEMS", 1)
    wrong_counter(busy)
    forgotten_prompt(busy)
    assert len(audit().problems) == 1


@pytest.mark.django_db(transaction=True)
def test_the_audit_reads_one_moment_and_leaves_no_transaction(busy: str) -> None:
    assert audit().is_clean
    assert not connection.in_atomic_block
    quotas.settle(settle_order("nobody"))
    assert audit().is_clean
