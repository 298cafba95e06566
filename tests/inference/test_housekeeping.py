"""What is kept too long goes, in small transactions; a round of housekeeping does all that a month needs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.management import call_command
from django.utils import timezone

from accounts.ledger import quotas
from accounts.limits.precedence import Limits
from accounts.models import LedgerEntry, RefusedRequest, Statement
from inference.models import Receipt
from inference.upkeep import housekeeping
from tests.accounts.quota_cast import assert_proven, reserved, settle_order
from tests.conftest import Cast

pytestmark = [pytest.mark.integration, pytest.mark.django_db]


@pytest.fixture
def old(cast: Cast) -> datetime:
    """Two years ago Alice had an answer, and a refusal."""
    moment = timezone.now() - timedelta(days=730)
    request_id = reserved(cast.alice, now=moment, tenant_limits=Limits())
    quotas.settle(settle_order(request_id, now=moment))
    for created_at in (moment, timezone.now()):
        Receipt.objects.create(
            request_id=f"r{created_at.timestamp()}",
            tenant=cast.alice.tenant,
            key=cast.alice.key,
            model="small",
            model_digest="d",
            route="/v1/generate",
            status="completed",
            finish_reason="stop",
            created_at=created_at,
            finished_at=created_at,
        )
        RefusedRequest.objects.create(
            request_id="x", tenant=cast.alice.tenant, code="queue_full", created_at=created_at
        )
    return moment


def test_the_old_goes_and_the_new_stays(old: datetime, capsys: Any) -> None:
    call_command("purge", "--dry-run", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "would_delete": {"ledger_periods": 1, "receipts": 1, "refusals": 1, "audit": 0}
    }
    assert LedgerEntry.objects.count() == 2
    call_command("purge", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "deleted": {"ledger": 2, "receipts": 1, "refusals": 1, "audit": 0},
        "wiped": [],  # in a transaction, with a Redis of its own
    }
    assert (Receipt.objects.count(), RefusedRequest.objects.count(), LedgerEntry.objects.count()) == (1, 1, 0)
    assert Statement.objects.get().month == old.date().replace(day=1)
    assert_proven()


def test_what_is_kept_for_ever_is_kept(old: datetime, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ledger_days", "receipt_days", "refusal_days"):
        monkeypatch.setattr(settings.CONFIG, name, 0)
    assert housekeeping.purge(timezone.now()) == {"ledger": 0, "receipts": 0, "refusals": 0, "audit": 0}


def test_a_round_closes_statements_and_purges(old: datetime, cast: Cast) -> None:
    now = timezone.now()
    month = now.date().replace(day=1)
    last = datetime.combine(month, datetime.min.time(), UTC) - timedelta(hours=5)
    request_id = reserved(cast.bob, now=last, tenant_limits=Limits())
    quotas.settle(settle_order(request_id, now=last))
    done = housekeeping.round_of_work(month_end(month) + timedelta(days=1))
    assert (done["statements"], done["ledger"], done["receipts"]) == (1, 2, 1)
    assert housekeeping.round_of_work(month_end(month) + timedelta(days=1))["statements"] == 0


def month_end(month: Any) -> datetime:
    return datetime.combine(month, datetime.min.time(), UTC)


def test_a_housekeeper_stops_when_it_is_told(valkey: Any) -> None:
    keeper = housekeeping.Housekeeper(valkey, every_seconds=60)
    keeper.start()
    keeper.stop()
    assert not keeper._thread.is_alive()
