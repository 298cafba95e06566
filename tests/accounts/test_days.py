"""The days' sums are the ledger's, whatever happens: races, midnight, clocks that jump. Statements, and the purge."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.db.models import F, ProtectedError

from accounts.identity.key_rows import principal_of
from accounts.ledger import quotas, retention, statements
from accounts.ledger.audit import audit
from accounts.ledger.usage import grouped, usage
from accounts.limits.precedence import Limits
from accounts.models import DayUsage, LedgerEntry, QuotaPeriod, Reservation, Statement
from tests.accounts.quota_cast import NOW, assert_proven, charge_order, reserve_order, reserved, settle_order
from tests.conftest import Cast, Customer

MIDNIGHT = datetime(2026, 12, 1, tzinfo=UTC)
NOVEMBER = date(2026, 11, 1)


def served(who: Customer, now: datetime = NOW, **more: Any) -> str:
    request_id = reserved(who, now=now, tenant_limits=Limits())
    assert quotas.settle(settle_order(request_id, now=now, **more))
    return request_id


@pytest.mark.integration
@pytest.mark.django_db
class TestDays:
    def test_one_row_a_day_key_model_and_adapters(self, cast: Cast) -> None:
        served(cast.alice)
        served(cast.alice)
        served(cast.alice, adapters="formal+verse")
        served(cast.alice, model="large")
        served(cast.alice, NOW + timedelta(days=1))
        served(cast.bob)
        quotas.charge_request(charge_order(cast.alice, model="small", reason="cached"))
        rows = DayUsage.objects.filter(tenant=cast.alice.tenant).order_by("day", "model", "adapters")
        found = [(str(row.day), row.model, row.adapters, row.requests, row.used_tokens) for row in rows]
        assert found == [
            ("2026-11-21", "large", "", 1, 30),
            ("2026-11-21", "small", "", 3, 60),
            ("2026-11-21", "small", "formal+verse", 1, 30),
            ("2026-11-22", "small", "", 1, 30),
        ]
        assert {row.key_id for row in rows} == {cast.alice.key.pk}
        assert_proven()

    def test_a_correction_is_on_its_day_of_the_tenant_or_of_the_key(self, cast: Cast) -> None:
        tenant, key = cast.alice.tenant, cast.alice.key
        served(cast.alice)
        for key_id, cost in ((None, -5), (key.pk, 7)):
            quotas.adjust(
                request_id=f"fix-{key_id}",
                tenant_id=tenant.pk,
                key_id=key_id,
                anchor_day=1,
                tokens=-10,
                cost_nanos=cost,
                reason="an outage",
                now=NOW,
            )
            assert_proven()
        rows, _ = grouped(tenant.pk, NOW.date(), NOW.date(), ("key",))
        assert [(row["key"], row["used_tokens"]) for row in rows if row["key"]] == [(key.public_id, 20)]
        assert sum(row["used_tokens"] for row in rows) == 10

    def test_a_correction_needs_a_reason_and_cannot_take_back_more_than_was_used(self, cast: Cast) -> None:
        values = {"tenant_id": cast.alice.tenant.pk, "anchor_day": 1, "now": NOW, "request_id": "fix"}
        with pytest.raises(ValueError, match="Say why"):
            quotas.adjust(**values, tokens=1, reason="  ")
        with pytest.raises(ValueError, match="more than was used"):
            quotas.adjust(**values, tokens=-1, reason="too much")
        assert not DayUsage.objects.exists()
        assert_proven()

    @pytest.mark.parametrize(
        "damage",
        [
            lambda rows: rows.update(used_tokens=F("used_tokens") + 1),
            lambda rows: rows.update(cost_nanos=1),
            lambda rows: rows.update(model="other"),
            lambda rows: rows.delete(),
        ],
    )
    def test_the_audit_finds_a_day_that_is_not_its_entries(self, cast: Cast, damage: Callable[[Any], object]) -> None:
        served(cast.alice)
        damage(DayUsage.objects.all())
        assert {problem.code for problem in audit().problems} == {"day_differs_from_ledger"}


@pytest.mark.integration
@pytest.mark.django_db(transaction=True)
class TestMidnight:
    def test_the_month_rolls_over_under_load(self, cast: Cast) -> None:
        """Sixteen threads reserve and settle while their clocks pass midnight, each at its own moment."""
        limits = Limits(monthly_tokens=2000)
        barrier = threading.Barrier(8)

        def live(number: int) -> int:
            barrier.wait()
            charged = 0
            try:
                for step in range(12):
                    now = MIDNIGHT + timedelta(seconds=step - 6, milliseconds=number)
                    order = reserve_order(cast.alice, 10, 40, now=now, tenant_limits=limits, all_or_nothing=True)
                    if isinstance(quotas.reserve_many([order])[0], quotas.Held):
                        later = now + timedelta(seconds=2)  # some end in the month after the one that they began in
                        assert quotas.settle(settle_order(order.request_id, 10, 40, now=later))
                        charged += 50
                return charged
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as threads:
            charged = sum(threads.map(live, range(8)))
        periods = {row.starts_at.month: row for row in QuotaPeriod.objects.filter(key=None)}
        assert set(periods) == {11, 12}
        assert sum(row.used_tokens for row in periods.values()) == charged == 8 * 12 * 50 - 50 * _refused(periods)
        assert all(row.used_tokens <= 2000 and row.reserved_tokens == 0 for row in periods.values())
        days = {str(row.day): row for row in DayUsage.objects.all()}
        assert {day[:7] for day in days} == {"2026-11", "2026-12"}
        assert_proven()

    def test_a_clock_that_jumps_back_and_forth_opens_no_period_twice(self, cast: Cast) -> None:
        jumps = [timedelta(0), timedelta(days=-40), timedelta(days=70), timedelta(seconds=-1)]
        moments = [MIDNIGHT + jump for jump in jumps]
        for moment in (*moments, *reversed(moments)):
            served(cast.alice, moment)
        rows = list(QuotaPeriod.objects.filter(key=None).order_by("starts_at"))
        assert [f"{row.starts_at:%m-%d}" for row in rows] == ["10-01", "11-01", "12-01", "02-01"]
        assert all(first.ends_at <= second.starts_at for first, second in itertools.pairwise(rows))
        assert_proven()


def _refused(periods: dict[int, QuotaPeriod]) -> int:
    attempts = 8 * 12
    return attempts - sum(row.used_requests for row in periods.values())


@pytest.mark.integration
@pytest.mark.django_db
class TestStatements:
    def test_a_month_by_model_key_and_adapters(self, cast: Cast, settings: Any) -> None:
        served(cast.alice)
        served(cast.alice, adapters="verse")
        served(cast.alice, MIDNIGHT)
        facts = statements.statement(cast.alice.tenant, NOVEMBER, NOW)
        assert (facts["status"], facts["requests"], facts["tokens"], facts["cost"]) == ("open", 2, 60, "0.00")
        assert [(line["adapters"], line["requests"]) for line in facts["lines"]] == [("", 1), ("verse", 1)]
        table = statements.as_csv(facts).splitlines()
        assert table[0] == ",".join(statements.COLUMNS) and len(table) == 3
        assert f"small,{cast.alice.key.public_id},verse,completions,1,30,10,0,20,0.00,USD" in table

    def test_charlies_statement_holds_nothing_of_alice(self, cast: Cast) -> None:
        served(cast.alice)
        assert statements.statement(cast.charlie.tenant, NOVEMBER, NOW)["lines"] == []

    def test_a_name_that_a_spreadsheet_would_run_is_text_there(self, cast: Cast) -> None:
        text = statements.table(["model", "used"], [{"model": '=HYPERLINK("x")', "used": -5}])
        assert text.splitlines()[1] == '"\'=HYPERLINK(""x"")",-5'

    def test_it_is_kept_once_nothing_of_the_month_can_change(self, cast: Cast) -> None:
        served(cast.alice)
        running = reserved(cast.alice, now=MIDNIGHT - timedelta(seconds=5), tenant_limits=Limits())
        tenant = cast.alice.tenant
        assert statements.close(tenant, NOVEMBER, MIDNIGHT - timedelta(seconds=1)) is None, "the month is not over"
        later = MIDNIGHT + timedelta(hours=1)
        assert statements.close(tenant, NOVEMBER, later) is None, "a request of it still runs"
        assert statements.close_due(later) == 0
        quotas.settle(settle_order(running, now=MIDNIGHT - timedelta(seconds=1)))
        assert statements.close_due(later) == 1
        kept = statements.close(tenant, NOVEMBER, later + timedelta(days=3))
        assert kept is not None and (kept.requests, kept.created_at) == (2, later)
        assert statements.statement(tenant, NOVEMBER, later)["status"] == "closed"
        assert statements.close_due(later) == 0
        assert_proven()

    def test_the_audit_finds_a_statement_that_says_something_else(self, cast: Cast) -> None:
        served(cast.alice)
        statements.close(cast.alice.tenant, NOVEMBER, MIDNIGHT + timedelta(hours=1))
        Statement.objects.update(cost_nanos=1)
        assert {problem.code for problem in audit().problems} == {"statement_differs"}

    @pytest.mark.parametrize("text", ["2026-13", "2026-1", "26-11", "2026-11-01", "", "abcdefg", "²026-11"])
    def test_what_is_no_month_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError):
            statements.month_of(text)


@pytest.mark.integration
@pytest.mark.django_db
class TestPurge:
    LATER = MIDNIGHT + timedelta(days=400)

    def test_entries_go_and_every_sum_stays_proven(self, cast: Cast) -> None:
        old = served(cast.alice)
        quotas.release(reserved(cast.alice), "cancelled", NOW)
        recent = served(cast.alice, self.LATER - timedelta(days=1))
        before = usage(principal_of(cast.alice.key), self.LATER)
        assert retention.purge_ledger(MIDNIGHT + timedelta(days=1), self.LATER) == 4
        assert list(LedgerEntry.objects.values_list("request_id", flat=True).distinct()) == [recent]
        assert not Reservation.objects.filter(pk=old).exists()
        assert Statement.objects.get().requests == 1
        assert_proven()
        after = usage(principal_of(cast.alice.key), self.LATER)
        assert after["total_tokens"] == before["total_tokens"] == 60
        assert after["first_request_at"] == "2026-11-21T00:00:00Z"
        assert after["last_request_at"] == before["last_request_at"]
        assert retention.purge_ledger(MIDNIGHT + timedelta(days=1), self.LATER) == 0

    def test_an_interrupted_purge_is_proven_and_goes_on(self, cast: Cast) -> None:
        for _ in range(3):
            served(cast.alice)
        assert retention.purge_ledger(MIDNIGHT + timedelta(days=1), self.LATER, most=2) == 2
        assert_proven()
        assert retention.purge_ledger(MIDNIGHT + timedelta(days=1), self.LATER) == 4
        assert_proven()

    def test_a_period_with_an_open_reservation_is_kept(self, cast: Cast) -> None:
        reserved(cast.alice)
        served(cast.alice)
        assert retention.purge_ledger(MIDNIGHT + timedelta(days=1), self.LATER) == 0
        assert LedgerEntry.objects.count() == 3

    def test_a_period_whose_sums_differ_is_kept(self, cast: Cast) -> None:
        served(cast.alice)
        DayUsage.objects.update(used_tokens=1)
        assert retention.purge_ledger(MIDNIGHT + timedelta(days=1), self.LATER) == 0
        assert LedgerEntry.objects.count() == 2

    def test_this_period_is_never_purged(self, cast: Cast) -> None:
        served(cast.alice)
        assert retention.purge_ledger(NOW + timedelta(days=1), NOW + timedelta(days=1)) == 0


@pytest.mark.integration
@pytest.mark.django_db
def test_what_has_a_ledger_cannot_be_deleted_from_under_a_request(cast: Cast) -> None:
    running = reserved(cast.alice, tenant_limits=Limits())
    for row in (cast.alice.key, cast.alice.tenant):
        with pytest.raises(ProtectedError):
            row.delete()
    assert quotas.settle(settle_order(running))
    for row in (cast.alice.key, cast.alice.tenant):
        with pytest.raises(ProtectedError):
            row.delete()
    assert_proven()
