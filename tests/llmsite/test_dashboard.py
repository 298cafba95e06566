"""The console's landing page: how things stand, for whoever may see it, in a fixed number of queries."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.db.models import F
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from accounts import redis_client
from accounts.ledger import day_totals, quotas
from accounts.limits.precedence import Limits
from accounts.models import DayTotal, DayUsage, Membership, QuotaAlert, QuotaPeriod
from accounts.pages import console
from inference.models import Receipt, ServedModel
from inference.transport import queue
from llmsite.console import board_fleet, board_usage, charts, dashboard, navigation
from tests.accounts.quota_cast import reserved, settle_order
from tests.conftest import Cast, Customer
from tests.inference.flow import ticket

pytestmark = [pytest.mark.integration, pytest.mark.django_db]
INDEX = reverse("admin:index")


@pytest.fixture
def operator(db: None, client: Client) -> Client:
    client.force_login(User.objects.create_superuser("operator", password="a long password for tests"))
    return client


@pytest.fixture
def model(db: None) -> ServedModel:
    return ServedModel.objects.create(name="tiny", path="/models/tiny.gguf", digest="0" * 64, is_default=True)


def page_of(client: Client) -> str:
    answer = client.get(INDEX)
    assert answer.status_code == 200
    return answer.content.decode().replace("&#x27;", "'")


def receipt(who: Customer, age: timedelta = timedelta(0), **values: Any) -> Receipt:
    now = timezone.now()
    given = {"status": "completed", "finish_reason": "eos", "queue_seconds": 0.1, "prefill_seconds": 0.15, **values}
    return Receipt.objects.create(
        request_id=str(uuid.uuid4()),
        tenant=who.tenant,
        key=who.key,
        model="tiny",
        model_digest="0" * 64,
        route="/v1/generate",
        created_at=now - age,
        finished_at=now,
        **given,
    )


def used_now(who: Customer) -> None:
    """An answer of this moment: the page shows this period, and these days."""
    now = timezone.now()
    assert quotas.settle(settle_order(reserved(who, now=now), now=now))


def beat(model: ServedModel, **values: Any) -> None:
    report = {"id": model.pk, "name": model.name, "state": "ready", "error": "", "slots": 8, "busy": 3, **values}
    queue.ticket_queue().beat("worker-1", model.pool, 8, {"models": [report]})


def tile(name: str) -> dashboard.Tile:
    found = dashboard.board(User(is_superuser=True), timezone.now())
    return next(each for each in found.tiles if each.title == name)


def test_a_site_that_serves_says_so(operator: Client, model: ServedModel) -> None:
    beat(model)
    page = page_of(operator)
    assert "All models are served." in page and "3 of 8" in page and "No request was served yet." in page


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"state": "failed", "error": "out of memory"}, "tiny: out of memory"),
        ({"id": -1}, "No worker of pool default holds tiny."),
    ],
)
def test_a_model_in_trouble_is_named(operator: Client, model: ServedModel, values: dict[str, Any], said: str) -> None:
    beat(model, **values)
    assert said in page_of(operator)


def test_no_worker_and_no_model_are_told_apart(operator: Client) -> None:
    assert "No model is registered" in page_of(operator)
    model = ServedModel.objects.create(name="tiny", path="/models/tiny.gguf", digest="0" * 64)
    assert "No worker is alive" in page_of(operator)
    beat(model, id=-1)
    ServedModel.objects.update(load_mode="off")
    assert "All models are served." in page_of(operator)


def test_the_page_opens_while_redis_is_away(
    operator: Client, cast: Cast, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(queue, "ticket_queue", away)
    receipt(cast.alice)
    page = page_of(operator)
    assert "Redis does not answer" in page and "Requests, last hour" in page


def test_requests_are_counted_by_hour_and_day(cast: Cast) -> None:
    receipt(cast.alice)
    receipt(cast.bob, status="failed", error_code="worker_lost")
    receipt(cast.alice, timedelta(hours=3))
    receipt(cast.alice, timedelta(days=2))
    hour, day = tile("Requests, last hour"), tile("Requests, 24 hours")
    assert (hour.value, hour.note, hour.is_bad) == ("2", "1 failed", True)
    assert (day.value, day.note) == ("3", "1 failed")


def test_a_busy_day_is_counted_no_further_than_its_bound(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_usage, "MOST_COUNTED", 2)
    for _ in range(3):
        receipt(cast.alice)
    assert tile("Requests, 24 hours").value == "> 2"


def test_the_time_to_the_first_token_leaves_out_cached_and_failed_answers(cast: Cast) -> None:
    assert tile("First token, p50").value == "-"
    for seconds in (0.1, 0.2, 0.3, 4.0):
        receipt(cast.alice, queue_seconds=0.0, prefill_seconds=seconds)
    receipt(cast.alice, cached=True, queue_seconds=90.0)
    receipt(cast.alice, status="failed", queue_seconds=90.0)
    assert (tile("First token, p50").value, tile("First token, p95").value) == ("200\u00a0ms", "4.00\u00a0s")


@pytest.mark.parametrize(("part", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.51, 3.0), (0.95, 4.0), (1.0, 4.0)])
def test_a_quantile_is_a_value_that_really_was(part: float, expected: float) -> None:
    assert dashboard.quantile([1.0, 2.0, 3.0, 4.0], part) == expected


def test_failures_name_their_reason_and_link_their_receipt(operator: Client, cast: Cast) -> None:
    failed = receipt(cast.alice, status="failed", error_code="worker_lost")
    page = page_of(operator)
    assert "worker_lost" in page and console.change_page("inference_receipt", failed.pk) in page


def test_tenants_are_listed_by_tokens_with_their_quota(operator: Client, cast: Cast) -> None:
    used_now(cast.alice)
    page = page_of(operator)
    assert "Alice's" in page and "of 10,000,000" in page and "Charlie's" not in page


def test_the_number_of_queries_is_fixed(operator: Client, cast: Cast, model: ServedModel) -> None:
    counts = []
    for number in (1, 6):
        for who in (cast.alice, cast.bob, cast.charlie)[: number % 5]:
            used_now(who)
        for _ in range(number):
            receipt(cast.alice, status="failed", error_code="worker_lost")
            name = f"model-{uuid.uuid4()}"
            ServedModel.objects.create(name=name, path="/models/other.gguf", digest="1" * 64)
        with CaptureQueriesContext(connection) as queries:
            page_of(operator)
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 16


def test_each_part_needs_its_permission(client: Client, cast: Cast, model: ServedModel) -> None:
    receipt(cast.alice, status="failed", error_code="worker_lost")
    charlie = User.objects.create_user("charlie", password="a long password for tests", is_staff=True)
    client.force_login(charlie)
    page = page_of(client)
    assert "may see nothing here" in page
    assert not [word for word in ("tiny", "worker_lost", "Alice", "Receipts", "Tenants") if word in page]
    charlie.user_permissions.add(Permission.objects.get(codename="view_receipt"))
    page = page_of(client)
    assert "worker_lost" in page and "Receipts" in page and "Served models" not in page


def test_a_person_of_a_tenant_sees_no_other_tenant(client: Client, cast: Cast) -> None:
    for who in (cast.alice, cast.bob):
        used_now(who)
        receipt(who, status="failed", error_code="worker_lost")
    person = User.objects.create_user("anna", is_staff=True)
    codes = ("view_receipt", "view_quotaperiod", "view_dayusage", "view_refusedrequest", "view_quotaalert")
    person.user_permissions.set(Permission.objects.filter(codename__in=codes))
    Membership.objects.create(tenant=cast.alice.tenant, user=person)
    client.force_login(person)
    for address in (INDEX, reverse("console-board")):
        text = client.get(address).content.decode()
        assert "Alice" in text and "Bob" not in text
    assert tile("Requests, 24 hours").value == "2"  # the operator's


def test_usage_is_drawn_by_tenant_model_and_adapter(operator: Client, cast: Cast) -> None:
    used_now(cast.alice)
    for address in ("", "?by=model&show=requests&days=7", "?by=adapter&show=cost&days=90", "?by=nonsense&days=x"):
        page = operator.get(INDEX + address).content.decode()
        assert '<svg viewBox="0 0 720 200"' in page or "Nothing was used in these days" in page
        assert "style=" not in page.split('id="dashboard"')[1].split("shown-at")[0]
    tenant = cast.alice.tenant
    tenant.name = "<script>alert(1)</script>"
    tenant.save()
    assert "<script>alert" not in operator.get(INDEX).content.decode()


@pytest.mark.parametrize("by", board_usage.GROUPS)
@pytest.mark.parametrize("show", board_usage.METRICS)
def test_charts_show_the_same_before_and_after_days_are_kept(
    cast: Cast, monkeypatch: pytest.MonkeyPatch, by: str, show: str
) -> None:
    monkeypatch.setattr(board_usage, "NUM_GROUPS", 2)  # so that there are others
    now = timezone.now()
    for days, who, model in ((0, cast.alice, "a"), (1, cast.bob, "b"), (1, cast.alice, "c"), (9, cast.charlie, "a")):
        moment = now - timedelta(days=days)
        request_id = reserved(who, now=moment, tenant_limits=Limits(), key_limits=Limits())
        quotas.settle(settle_order(request_id, output=days, now=moment, model=model, adapters=f"adapter-{model}"))
    DayUsage.objects.update(cost_nanos=F("used_tokens") * 10**7)
    choice = board_usage.Choice(show=show, by=by, days=30)
    before = [board_usage.usage_chart(choice, now, tenants) for tenants in (None, frozenset({cast.alice.tenant.pk}))]
    while day_totals.close_due(now + timedelta(hours=1)):
        pass
    yesterday = DayTotal.objects.filter(by="day", day=now.date() - timedelta(days=1))
    assert yesterday.values_list("requests", flat=True).get() == 2
    after = [board_usage.usage_chart(choice, now, tenants) for tenants in (None, frozenset({cast.alice.tenant.pk}))]
    assert after == before and "others" in before[0].svg


def test_a_queue_that_is_stuck_and_a_quota_that_ends_are_said(operator: Client, cast: Cast, model: ServedModel) -> None:
    old = time.time() - 120
    queue.ticket_queue().put(ticket(model_id=model.pk, tenant_id=cast.alice.tenant.pk))
    redis_client.client().hset(queue.ticket_key(_waiting()), "created_at", old)
    beat(model)
    used_now(cast.alice)
    period = QuotaPeriod.objects.get(tenant=cast.alice.tenant, key=None)
    QuotaAlert.objects.create(period=period, counts="tokens", percent=80, used=8, quota=10, created_at=timezone.now())
    page = page_of(operator)
    assert "The queue of pool default is stuck" in page
    assert "Alice's has used 80 % of its tokens" in page


def _waiting() -> str:
    return str(redis_client.client().zrange("waiting:default", 0, 0)[0].decode())


def test_a_disk_that_is_full_is_said() -> None:
    worker = queue.WorkerInfo("worker-1", "default", {"host": "here", "disk": {"free": 10, "total": 1000}})
    assert "The disk of here (worker-1) is nearly full" in board_fleet.full_disks(Path("/nowhere"), [worker])[0]


@pytest.mark.parametrize(("highest", "end"), [(0, 1), (0.3, 0.4), (1, 1), (7, 10), (41, 50), (999, 1000)])
def test_an_axis_ends_at_a_round_number(highest: float, end: float) -> None:
    assert charts.ceiling(highest) == pytest.approx(end)


def test_the_sidebar_leads_to_every_registered_list(operator: Client) -> None:
    from django.contrib import admin

    linked = {(application, model) for _, items in navigation.GROUPS for application, model, _, _ in items}
    assert linked == {(each._meta.app_label, each._meta.model_name) for each in admin.site._registry}


@pytest.mark.parametrize(
    ("used", "limit", "expected"), [(5, None, None), (0, 0, 100), (1, 200, 0), (150, 200, 75), (300, 200, 100)]
)
def test_the_part_of_a_quota_that_is_spent(used: int, limit: int | None, expected: int | None) -> None:
    assert console.percent(used, limit) == expected


def test_a_bar_warns_before_the_quota_is_spent() -> None:
    assert "console-bar-nearly" in console.quota_bar(95, 100)
    assert "console-bar-spent" in console.quota_bar(100, 100)
    assert "no limit of its own" in console.quota_bar(7, None, "no limit of its own")
    assert "&lt;b&gt;" in console.link("/", "<b>")


def test_signing_in_leads_to_the_dashboard(client: Client, db: None) -> None:
    User.objects.create_superuser("operator", password="a long password for tests")
    answer = client.post(reverse("admin:login"), {"username": "operator", "password": "a long password for tests"})
    assert answer.status_code == 302 and answer["Location"] == INDEX
