"""Pages of the console that act on what runs: each action is seen in what the site does or holds afterwards."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from typing import Any

import pytest
from django.contrib.admin.utils import quote
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client as Browser
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from accounts.models import AuditEntry, LedgerEntry, QuotaPeriod
from inference.models import Receipt
from llmsite.console import one_request
from tests.accounts.quota_cast import reserved, settle_order
from tests.conftest import Cast
from tests.in_process import MODEL, InProcessSite, wait_until
from tests.test_slots import FRANCE, act, computed

pytestmark = pytest.mark.integration
SLOTS = reverse("console-slots")


@pytest.fixture
def operator(client: Browser, db: None) -> Browser:
    client.force_login(User.objects.create_superuser("olga", password="a long password for tests"))
    return client


def page_of(browser: Browser, address: str) -> str:
    answer = browser.get(address)
    assert answer.status_code == 200, answer.content
    return answer.content.decode()


def audited(text: str) -> bool:
    found = AuditEntry.objects.filter(actor_kind="person", actor="olga")
    return any(text in json.dumps(entry.diff) for entry in found)


# Slots and states


@pytest.mark.api
def test_a_slot_is_shown_and_erased(site: InProcessSite, operator: Browser) -> None:
    alice = site.cast.alice
    site.ask(alice, FRANCE, 1)
    page = page_of(operator, SLOTS)
    assert "Alice&#x27;s" in page and 'data-label="Tokens held">35</td>' in page
    asked = {"worker": site.host.worker_id, "model": site.models[MODEL].pk, "tenant": alice.tenant.pk, "number": 1}
    said = operator.post(reverse("console-erase-slot"), asked, follow=True).content.decode()
    assert "it held 35 tokens" in said and "Alice&#x27;s" not in said.split('id="slots"')[1]
    assert computed(site.ask(alice, FRANCE, 1)) == 20, "its prompt is computed anew"
    assert audited("35 tokens")


@pytest.mark.api
def test_a_saved_state_is_shown_and_deleted(site: InProcessSite, operator: Browser) -> None:
    alice = site.client(site.cast.alice)
    site.ask(site.cast.alice, FRANCE, 1)
    assert act(alice, 1, "save", "diary").status_code == 200
    page = page_of(operator, SLOTS)
    name = page.split('name="name" value="')[1].split('"')[0]
    assert "diary" not in page and name.endswith(".saved")
    asked = {"worker": site.host.worker_id, "tenant": site.cast.alice.tenant.pk, "name": name}
    for wrong in ({"name": "../../secret"}, {"worker": "nobody"}, {"tenant": site.cast.bob.tenant.pk}):
        operator.post(reverse("console-forget-state"), {**asked, **wrong})
    assert act(alice, 0, "restore", "diary").status_code == 200, "it is there still"
    said = operator.post(reverse("console-forget-state"), asked, follow=True).content.decode()
    assert "is removed" in said
    assert act(alice, 0, "restore", "diary").status_code == 400
    assert audited(name)


def test_without_a_worker_the_page_says_so(operator: Browser) -> None:
    page = page_of(operator, SLOTS)
    assert "No worker has a model in memory" in page and "There are none" in page


# Requests


@pytest.mark.api
def test_a_request_is_shown_whole_and_a_refused_one_says_why(site: InProcessSite, operator: Browser) -> None:
    alice = site.client(site.cast.alice)
    served = alice.generate().headers["x-request-id"]
    wait_until(lambda: Receipt.objects.filter(pk=served).exists())
    page = page_of(operator, reverse("console-request", args=[served]))
    assert "Served by fake-model" in page and "Completion tokens" in page and "settle" in page
    refused = alice.generate(model="no-such-model").headers["x-request-id"]
    page = page_of(operator, reverse("console-request", args=[refused]))
    assert "Refused at" in page and "no-such-model" not in page.split("The refusal")[1].split("</section>")[0]
    assert operator.get(reverse("console-request", args=["nothing"])).status_code == 404


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"verdict": "same", "completion_tokens": 8, "finish_reason": "stop", "reason": ""}, "The same tokens: 8"),
        (
            {"verdict": "differs", "completion_tokens": 8, "finish_reason": "stop", "reason": "Another build."},
            "Not the same tokens: 8 computed, stop. Another build.",
        ),
        ({"error": {"code": "model_changed", "message": "The model is another file now."}}, "another file now"),
        ("nonsense", "ended with status 1: it crashed"),
    ],
)
def test_what_a_replay_says_is_shown(
    operator: Browser, cast: Cast, monkeypatch: pytest.MonkeyPatch, told: Any, expected: str
) -> None:
    """The process itself is started by the test in a browser."""
    from tests.accounts.test_roles import NOW

    Receipt.objects.create(
        request_id="r1", tenant=cast.alice.tenant, key=cast.alice.key, model="m", created_at=NOW, finished_at=NOW
    )
    asked: list[tuple[str, bytes]] = []

    def child(request_id: str, body: bytes) -> subprocess.CompletedProcess[bytes]:
        asked.append((request_id, body))
        return subprocess.CompletedProcess([], 1, json.dumps(told).encode(), b"it crashed")

    monkeypatch.setattr(one_request, "_child", child)
    address = reverse("console-replay", args=["r1"])
    assert "Paste the body" in operator.post(address, {"body": " "}).content.decode()
    page = operator.post(address, {"body": '{"prompt": "x"}'}).content.decode()
    assert expected in page and asked == [("r1", b'{"prompt": "x"}')]
    with one_request.redis_client.client().lock(one_request.ONE_AT_A_TIME, timeout=5):
        assert "Another request is being replayed" in operator.post(address, {"body": "{}"}).content.decode()
    assert len(asked) == 1


# Models


@pytest.mark.api
def test_memory_is_estimated_for_other_numbers_and_a_template_is_rendered(
    site: InProcessSite, operator: Browser
) -> None:
    row = site.models[MODEL]
    address = reverse("console-model", args=[row.pk])
    page = page_of(operator, address)
    assert "fits beside the others" in page and site.host.worker_id in page
    assert "This field is required" not in page and "Ensure this value" in page_of(operator, address + "?n_slots=0")
    row.refresh_from_db()
    slots = row.n_slots
    page_of(operator, address + "?n_slots=64")
    row.refresh_from_db()
    assert row.n_slots == slots, "nothing is saved"
    body = json.dumps({"messages": [{"role": "user", "content": "<b>Ahoy</b>"}]})
    page = operator.post(address, {"body": body}).content.decode()
    assert "user : &lt;b&gt;Ahoy&lt;/b&gt;" in page
    other = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert "[&lt;b&gt;Ahoy&lt;/b&gt;]" in operator.post(address, {"body": body, "template": other}).content.decode()
    for wrong in ("{", '{"messages": []}', '{"messages": [{"role": "pirate", "content": "x"}]}'):
        assert 'class="console-bad"' in operator.post(address, {"body": wrong}).content.decode()
    broken = operator.post(address, {"body": body, "template": "{% for %}"}).content.decode()
    assert 'class="console-bad"' in broken


@pytest.mark.api
def test_a_model_is_unloaded_loaded_and_pinned(site: InProcessSite, operator: Browser) -> None:
    row = site.models[MODEL]
    address = reverse("console-model-order", args=[row.pk])

    def states() -> set[str]:
        found = {model.report()["state"] for model in site.host._models.values() if model.served.id == row.pk}
        site.host.beat()  # after the look: an order to load goes by what was reported
        return found

    operator.post(address, {"action": "unload"})
    wait_until(lambda: states() == {"unloaded"})
    operator.post(address, {"action": "load"})
    wait_until(lambda: states() == {"ready"})
    assert audited("unload")
    operator.post(address, {"action": "pin"})
    row.refresh_from_db()
    assert row.is_pinned
    assert "There is no such action" in operator.post(address, {"action": "burn"}, follow=True).content.decode()


# The ledger


@pytest.mark.django_db
def test_what_was_used_is_corrected_with_a_reason(operator: Browser, cast: Cast) -> None:
    from accounts.ledger import quotas

    quotas.settle(settle_order(reserved(cast.alice)))
    period = QuotaPeriod.objects.get(tenant=cast.alice.tenant, key=None)
    used, address = period.used_tokens, reverse("console-correction", args=[period.pk])
    numbers = {"tokens": "-5", "requests": "0", "cost": "0"}
    assert 'role="alert"' in operator.post(address, {**numbers, "reason": ""}).content.decode()
    far = operator.post(address, {**numbers, "tokens": str(-used - 1), "reason": "too much"}).content.decode()
    assert "cannot take back more than was used" in far
    nothing = operator.post(address, {**numbers, "tokens": "0", "reason": "nothing"}).content.decode()
    assert "Say what to correct" in nothing
    answer = operator.post(address, {**numbers, "reason": "an outage"}, follow=True).content.decode()
    assert "an outage" in answer
    period.refresh_from_db()
    assert period.used_tokens == used - 5
    assert LedgerEntry.objects.get(kind="adjust").reason == "an outage" and audited("an outage")


@pytest.mark.django_db
def test_a_period_is_a_file_of_what_its_days_have(operator: Browser, cast: Cast) -> None:
    from accounts.ledger import quotas

    for who in (cast.alice, cast.bob):
        quotas.settle(settle_order(reserved(who)))
    for period in QuotaPeriod.objects.filter(tenant=cast.alice.tenant):
        answer = operator.get(reverse("admin:accounts_quotaperiod_csv", args=[period.pk]))
        assert answer["Content-Type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(answer.content.decode())))
        assert sum(int(row["used_tokens"]) for row in rows) == period.used_tokens > 0
        assert {row["key"] for row in rows} == {cast.alice.key.public_id}


# Batches


@pytest.mark.django_db
def test_a_batch_is_cancelled_from_its_page(operator: Browser, cast: Cast) -> None:
    from tests.inference.test_batch_operators import make_batch, make_file

    problems = [{"code": "wrong", "message": "<b>not JSON</b>", "line": 3, "param": None}]
    batch = make_batch(cast.alice, make_file(cast.alice), errors=problems)
    page = page_of(operator, reverse("admin:inference_batch_change", args=[quote(batch.pk)]))
    assert "1 of 2 done" in page and "&lt;b&gt;not JSON&lt;/b&gt;" in page and "Cancel this batch?" in page
    address = reverse("admin:inference_batch_cancel_this", args=[quote(batch.pk)])
    assert address in page and operator.get(address).status_code == 405
    for _ in range(2):
        page = operator.post(address, follow=True).content.decode()
    assert "nothing was cancelled" in page and address not in page
    batch.refresh_from_db()
    assert batch.status == "cancelling"
    assert AuditEntry.objects.filter(model="inference.batch", row=batch.pk).count() == 1


# Settings


@pytest.mark.django_db
def test_the_settings_check_says_what_the_commands_say(operator: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsite.doctor.look_at_llama", lambda: iter(()))
    page = page_of(operator, reverse("console-settings"))
    assert "What manage.py doctor says" in page and "check security.W" in page and "all migrations applied" in page


# All of them


@pytest.mark.api
def test_the_number_of_queries_is_fixed(site: InProcessSite, operator: Browser) -> None:
    counts: list[int] = []
    for number in (1, 3):
        for slot in range(number):
            site.ask(site.cast.alice if slot % 2 else site.cast.bob, FRANCE, slot)
        with CaptureQueriesContext(connection) as queries:
            page_of(operator, SLOTS)
        counts.append(len(queries))
    assert counts[0] == counts[1] <= 8
