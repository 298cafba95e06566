"""GET /v1/me/usage, /v1/me/statements and /v1/organization: what was used, by whom, when, and what it cost."""

from __future__ import annotations

import csv
import io
import smtplib
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from django.core import mail
from django.utils import timezone

from accounts.identity import issuing
from accounts.ledger import alerts, buckets
from accounts.models import DayUsage, LedgerEntry, Membership, Price, QuotaAlert
from tests.in_process import MODEL, InProcessSite

pytestmark = pytest.mark.integration


@pytest.fixture
def used(site: InProcessSite) -> InProcessSite:
    """Alice has had two answers, one of them from the cache, and Bob one; a million tokens cost a million."""
    Price.objects.create(model="", input_per_million=1000, output_per_million=Decimal(2000), valid_from=_epoch())
    for customer, times in ((site.cast.alice, 2), (site.cast.bob, 1)):
        for _ in range(times):
            assert site.client(customer).generate("one two three", max_new_tokens=5).status_code == 200
    site.settle()
    return site


def _epoch() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC)


def test_usage_by_model_key_and_day(used: InProcessSite) -> None:
    client, today = used.client(used.cast.alice), timezone.now().date().isoformat()
    found = client.get("/v1/me/usage", params={"group_by": "model,key,day,adapter"}).json()
    row = {
        "model": MODEL,
        "key": used.cast.alice.key.public_id,
        "day": today,
        "adapter": "",
        "requests": 2,
        "used_tokens": 8,
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": 5,
        "cost": "0.013",
    }
    assert found["window"]["rows"] == [row]
    assert (found["quota_used"], found["currency"], found["periods"]["tenant"]["cost"]) == (8, "USD", "0.013")
    total = client.get("/v1/me/usage", params={"from": "2026-01-01", "to": "2026-01-31"}).json()["window"]
    assert total["rows"][0]["requests"] == 0


def test_usage_as_csv(used: InProcessSite) -> None:
    answer = used.client(used.cast.alice).get("/v1/me/usage", params={"group_by": "model", "format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    assert next(csv.DictReader(io.StringIO(answer.text)))["used_tokens"] == "8"


@pytest.mark.parametrize(
    "query",
    [
        {"group_by": "prompt"},
        {"from": "2026-02-30"},
        {"from": "2026-02-02", "to": "2026-02-01"},
        {"from": "2020-01-01", "to": "2026-02-01"},
        {"format": "xml"},
        {"nonsense": "1"},
    ],
)
def test_a_window_that_makes_no_sense_is_refused(site: InProcessSite, query: dict[str, str]) -> None:
    assert site.client(site.cast.alice).get("/v1/me/usage", params=query).status_code == 422


def test_charlie_sees_nothing_of_alice(used: InProcessSite) -> None:
    charlie = used.client(used.cast.charlie)
    assert charlie.get("/v1/me/usage", params={"group_by": "key"}).json()["window"]["rows"] == []
    assert charlie.get("/v1/me/statements").json()["data"] == []
    params = {"group_by": "model", "key": used.cast.alice.key.public_id}
    assert charlie.get("/v1/me/usage", params=params).json()["window"]["rows"] == []
    for path in ("usage/completions", "usage/embeddings", "costs"):
        refused = charlie.get(f"/v1/organization/{path}", params={"start_time": 0})
        assert refused.status_code == 403


def test_statements(used: InProcessSite) -> None:
    client, month = used.client(used.cast.alice), f"{timezone.now():%Y-%m}"
    listed = client.get("/v1/me/statements").json()["data"]
    assert [(each["month"], each["status"]) for each in listed] == [(month, "open")]
    found = client.get(listed[0]["url"]).json()
    assert (found["requests"], found["tokens"], found["cost"], found["currency"]) == (2, 8, "0.013", "USD")
    assert client.get(listed[0]["url"], params={"format": "csv"}).text.count("\n") == 2
    for month in ("2026-99", "9999-12", "0000-01"):
        assert client.get(f"/v1/me/statements/{month}").status_code == 404, month


# In OpenAI's shape


def of_organization(site: InProcessSite, path: str, **query: Any) -> Any:
    start = int((timezone.now() - timedelta(days=2)).timestamp())
    params = {"start_time": start, **query}
    answer = site.client(site.cast.operator).get(f"/v1/organization/{path}", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_completions_by_day_and_project(used: InProcessSite) -> None:
    found = of_organization(used, "usage/completions", group_by="project_id,model")
    assert (found["object"], len(found["data"]), found["has_more"], found["next_page"]) == ("page", 3, False, None)
    assert [bucket["results"] for bucket in found["data"][:2]] == [[], []]
    results = {each["project_id"]: each for each in found["data"][-1]["results"]}
    alice = results[f"proj_{used.cast.alice.tenant.pk}"]
    assert (alice["input_tokens"], alice["output_tokens"], alice["num_model_requests"]) == (3, 5, 2)
    assert (alice["model"], alice["object"], alice["api_key_id"]) == (
        MODEL,
        "organization.usage.completions.result",
        None,
    )
    assert len(results) == 2


def test_completions_by_hour_come_from_the_ledger(used: InProcessSite) -> None:
    found = of_organization(used, "usage/completions", bucket_width="1h", limit=168, **{"group_by[]": "api_key_id"})
    assert 48 <= len(found["data"]) <= 50
    last = {each["api_key_id"]: each["num_model_requests"] for bucket in found["data"] for each in bucket["results"]}
    assert last == {used.cast.alice.key.public_id: 2, used.cast.bob.key.public_id: 1}


def test_costs_by_line_item(used: InProcessSite) -> None:
    found = of_organization(
        used, "costs", group_by=["line_item", "project_id"], project_ids=f"proj_{used.cast.bob.tenant.pk}"
    )
    (result,) = found["data"][-1]["results"]
    assert result["amount"] == {"value": 0.013, "currency": "usd"}
    assert (result["line_item"], result["object"]) == (MODEL, "organization.costs.result")


def test_embeddings_are_apart(used: InProcessSite) -> None:
    found = of_organization(used, "usage/embeddings")
    assert [bucket["results"] for bucket in found["data"]] == [[], [], []]


def test_pages_follow_one_another(used: InProcessSite) -> None:
    first = of_organization(used, "costs", limit=2)
    assert (len(first["data"]), first["has_more"]) == (2, True)
    second = of_organization(used, "costs", limit=2, page=first["next_page"])
    assert (len(second["data"]), second["has_more"], second["next_page"]) == (1, False, None)
    assert second["data"][0]["start_time"] == first["data"][-1]["end_time"]


@pytest.mark.parametrize("width", ["1d", "1h"])
def test_a_page_ends_before_the_stretch_that_is_too_long_for_it(
    used: InProcessSite, monkeypatch: pytest.MonkeyPatch, width: str
) -> None:
    """Cut within it, the keys that were left out would seem to have used nothing."""
    before = timezone.now() - timedelta(days=1)
    DayUsage.objects.filter(key=used.cast.bob.key).update(day=before.date())
    LedgerEntry.objects.filter(key_period__key=used.cast.bob.key).update(created_at=before)
    monkeypatch.setattr(buckets, "MAX_RESULTS", 1)
    asked = {"bucket_width": width, "limit": {"1d": 31, "1h": 60}[width], "group_by": "api_key_id"}
    first = of_organization(used, "usage/completions", **asked)
    assert first["has_more"] and first["data"][-1]["end_time"] <= timezone.now().timestamp()
    second = of_organization(used, "usage/completions", **asked, page=first["next_page"])
    assert second["data"][0]["start_time"] == first["data"][-1]["end_time"]
    found = [result for page in (first, second) for bucket in page["data"] for result in bucket["results"]]
    assert [each["api_key_id"] for each in found] == [
        customer.key.public_id for customer in (used.cast.bob, used.cast.alice)
    ]


def test_usage_of_a_rotated_key_is_asked_for_by_any_of_its_ids(used: InProcessSite) -> None:
    first = used.cast.alice.key
    second, _ = issuing.rotate(first, 3600)
    for key in (first, second):
        params = {"group_by": "key", "key": key.public_id}
        (row,) = used.client(used.cast.alice).get("/v1/me/usage", params=params).json()["window"]["rows"]
        assert (row["key"], row["requests"]) == (first.public_id, 2)
        for width in ("1d", "1h"):
            asked = {"api_key_ids": key.public_id, "bucket_width": width, "limit": 24}
            start = int((timezone.now() - timedelta(hours=20)).timestamp())
            found = of_organization(used, "usage/completions", **asked, start_time=start)
            assert sum(each["num_model_requests"] for bucket in found["data"] for each in bucket["results"]) == 2


@pytest.mark.parametrize(
    "query",
    [
        {"start_time": -1},
        {"start_time": 5, "end_time": 5},
        {"limit": 32},
        {"bucket_width": "1m"},
        {"page": "x"},
        {"project_ids": "proj_99999999999999999999"},
        {"project_ids": "proj_-1"},
        {"a": 1},
    ],
)
def test_a_question_that_makes_no_sense_is_refused(site: InProcessSite, query: dict[str, Any]) -> None:
    params = {"start_time": 0, **query}
    refused = site.client(site.cast.operator).get("/v1/organization/usage/completions", params=params)
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"batch": "true"}, "batch"),
        ({"batch": "false"}, "batch"),
        ({"user_ids": "user_1"}, "user_ids"),
        ({"group_by": "project_id,batch"}, "group_by[1]"),
        ({"group_by": "user_id"}, "group_by[0]"),
        ({"group_by": "service_tier"}, "group_by[0]"),
        ({"bucket_width": "1m"}, "bucket_width"),
    ],
)
def test_a_question_that_has_no_answer_here_is_refused_by_name(
    used: InProcessSite, query: dict[str, Any], param: str
) -> None:
    """Answered with all usage, it would be wrong in silence."""
    params = {"start_time": 0, **query}
    refused = used.client(used.cast.operator).get("/v1/organization/usage/completions", params=params)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


# Alerts


def test_parts_of_a_quota_are_noticed_and_mailed_once(used: InProcessSite, settings: Any, monkeypatch: Any) -> None:
    from django.contrib.auth.models import User

    tenant = used.cast.alice.tenant
    tenant.limit_overrides = {"monthly_tokens": 10, "monthly_requests": 100}
    tenant.save()
    owner = User.objects.create_user("alice", "alice@example.org")
    Membership.objects.create(tenant=tenant, user=owner, role="owner")
    Membership.objects.create(tenant=tenant, user=User.objects.create_user("v", "v@example.org"), role="viewer")
    monkeypatch.setattr(settings.CONFIG, "email_url", "smtp://localhost")
    now = timezone.now()
    assert alerts.notice(now) == 2
    assert alerts.notice(now) == 0
    found = used.client(used.cast.alice).get("/v1/me/usage").json()["alerts"]
    assert [(each["percent"], each["of"], each["counts"]) for each in found] == [
        (50, "tenant", "tokens"),
        (80, "tenant", "tokens"),
    ]
    assert used.client(used.cast.bob).get("/v1/me/usage").json()["alerts"] == []
    assert (alerts.mail(now), alerts.mail(now)) == (1, 0)
    (message,) = mail.outbox
    assert message.to == ["alice@example.org"] and "80 % of the tokens of Alice's" in message.subject
    QuotaAlert.objects.update(mailed_at=None)
    monkeypatch.setattr(settings.CONFIG, "email_url", "")
    assert alerts.mail(now) == 0


def test_a_mail_that_fails_is_sent_later(used: InProcessSite, settings: Any, monkeypatch: Any) -> None:
    from django.contrib.auth.models import User

    tenant = used.cast.alice.tenant
    tenant.limit_overrides = {"monthly_tokens": 8}
    tenant.save()
    Membership.objects.create(tenant=tenant, user=User.objects.create_user("alice", "alice@example.org"), role="owner")
    monkeypatch.setattr(settings.CONFIG, "email_url", "smtp://localhost")
    now = timezone.now()
    assert alerts.notice(now) == 3
    with monkeypatch.context() as broken:
        broken.setattr(alerts, "send_mail", _refuse)
        assert alerts.mail(now) == 0
    assert alerts.mail(now) == 1
    assert "100 %" in mail.outbox[0].subject


def test_a_quota_that_is_lowered_below_what_is_used_is_noticed(used: InProcessSite, monkeypatch: Any) -> None:
    monkeypatch.setattr(alerts, "PERIODS_AT_ONCE", 1)
    late = timezone.now() + timedelta(minutes=10)
    tenant = used.cast.alice.tenant
    tenant.limit_overrides = {"monthly_tokens": 8}
    tenant.save()
    key = used.cast.bob.key
    key.limit_overrides = {"monthly_requests": 1}
    key.save()
    assert alerts.notice(late) == 0, "nothing has moved lately"
    assert alerts.notice_all(late) == 6
    assert alerts.notice_all(late) == 0
    whose = set(QuotaAlert.objects.values_list("period__tenant__name", "counts"))
    assert whose == {(tenant.name, "tokens"), (used.cast.bob.tenant.name, "requests")}


def test_operators_are_told_where_a_tenant_has_no_owner_with_an_address(
    used: InProcessSite, settings: Any, monkeypatch: Any
) -> None:
    from django.contrib.auth.models import User

    from accounts.models import StaffRole

    tenant = used.cast.alice.tenant
    tenant.limit_overrides = {"monthly_tokens": 8}
    tenant.save()
    Membership.objects.create(tenant=tenant, user=User.objects.create_user("nobody", ""), role="owner")
    StaffRole.objects.create(user=User.objects.create_user("op", "op@example.org"), role="operator")
    StaffRole.objects.create(user=User.objects.create_user("auditor", "auditor@example.org"), role="auditor")
    monkeypatch.setattr(settings.CONFIG, "email_url", "smtp://localhost")
    now = timezone.now()
    alerts.notice(now)
    assert alerts.mail(now) == 1
    assert mail.outbox[0].to == ["op@example.org"]


def _refuse(*_arguments: Any) -> None:
    raise ConnectionRefusedError


def test_an_address_that_is_refused_holds_up_nobody_and_nobody_is_told_twice(
    used: InProcessSite, settings: Any, monkeypatch: Any
) -> None:
    from django.contrib.auth.models import User

    for who, names in ((used.cast.alice, ("alice", "gone")), (used.cast.bob, ("bob",))):
        who.tenant.limit_overrides = {"monthly_tokens": 8}
        who.tenant.save()
        for name in names:
            user = User.objects.create_user(name, f"{name}@example.org")
            Membership.objects.create(tenant=who.tenant, user=user, role="owner")
    monkeypatch.setattr(settings.CONFIG, "email_url", "smtp://localhost")
    refusals = {"gone@example.org": 550}
    send = alerts.send_mail

    def picky(subject: str, text: str, sender: str, to: list[str]) -> None:
        if code := refusals.get(to[0]):
            raise smtplib.SMTPRecipientsRefused({to[0]: (code, b"no")})
        send(subject, text, sender, to)

    monkeypatch.setattr(alerts, "send_mail", picky)
    now = timezone.now()
    assert alerts.notice(now) == 6
    assert [alerts.mail(now) for _ in range(3)] == [2, 0, 0]
    assert sorted(message.to[0] for message in mail.outbox) == ["alice@example.org", "bob@example.org"]
    QuotaAlert.objects.filter(percent=100).update(mailed_at=None)
    refusals.update({"alice@example.org": 450, "gone@example.org": 450})
    assert (alerts.mail(now), len(mail.outbox)) == (1, 3), "Bob is told, Alice's mailboxes are full"
    refusals.clear()
    assert (alerts.mail(now), alerts.mail(now)) == (2, 0)
