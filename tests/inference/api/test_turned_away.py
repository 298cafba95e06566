"""What the guard refuses before a key is read, as `explain`, the console and the operator's API find it afterwards."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.test import Client as Browser
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from accounts.models import RefusedRequest
from accounts.trail import refusal_log
from accounts.trail.refusals import Refusal
from inference.api import turned_away
from inference.inquiry.explain import explain
from llmsite.asgi import application
from llmsite.guard import MAX_HEADER_BYTES, Bounds, HeaderDeadlineProtocol, TurnedAway
from tests.in_process import InProcessSite
from tests.inference.api.test_guard import read_all

pytestmark = [pytest.mark.integration, pytest.mark.api]

BOUNDS = Bounds(max_body_bytes=2000, body_seconds=0.3, send_seconds=5.0)
CANARY = "canary-of-a-secret"


@pytest.fixture
def narrow(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> InProcessSite:
    """With small bounds."""
    monkeypatch.setattr(application, "bounds", BOUNDS)
    monkeypatch.setattr(HeaderDeadlineProtocol, "header_seconds", 0.3)
    return site


def say(site: InProcessSite, head: str) -> tuple[int, str]:
    """Status and request id, from the header, of the answer to raw bytes."""
    host, port = site.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connected:
        connected.sendall(head.encode())
        answer = read_all(connected).decode()
    lines = dict(line.split(": ", 1) for line in answer.split("\r\n\r\n")[0].split("\r\n")[1:])
    assert lines["x-request-id"] == lines["request-id"] and lines["x-request-id"] in answer.split("\r\n\r\n")[1]
    return int(answer.split()[1]), lines["x-request-id"]


HEADS = {
    "a body too large": (
        f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {CANARY}\r\nContent-Length: 2001\r\n\r\n" + "x" * 2001,
        (413, "request_too_large", "max_body_bytes", 2000, "/v1/generate"),
    ),
    "a body too slow": (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-API-Key: {CANARY}\r\nContent-Length: 9\r\n\r\nx",
        (408, "request_timeout", "body_timeout_seconds", 1, "/v1/chat/completions"),
    ),
    "headers too slow": (
        f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {CANARY}",
        (408, "request_timeout", "body_timeout_seconds", 1, ""),
    ),
    "headers too large": (
        f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nX-API-Key: {CANARY}{'x' * MAX_HEADER_BYTES}",
        (431, "request_header_fields_too_large", "max_header_bytes", MAX_HEADER_BYTES, ""),
    ),
    "a path that nobody has": (
        f"POST /{CANARY} HTTP/1.1\r\nHost: x\r\nContent-Length: 2001\r\n\r\n" + "x" * 2001,
        (413, "request_too_large", "max_body_bytes", 2000, ""),
    ),
}


@pytest.mark.parametrize("what", HEADS)
def test_what_is_turned_away_is_found_by_the_id_of_its_answer(narrow: InProcessSite, capsys: Any, what: str) -> None:
    head, (status, code, limit, value, route) = HEADS[what]
    told, request_id = say(narrow, head)
    assert told == status
    found = explain(request_id)
    assert found is not None, "before it is written"
    refusal = found["refusal"]
    assert (refusal["code"], refusal["limit"], refusal["value"]) == (code, limit, value)
    assert (refusal["route"], refusal["of"], refusal["tenant"]) == (route, None, None)
    refusal_log.LOG.write()
    assert RefusedRequest.objects.filter(request_id=request_id).count() == 1
    call_command("explain", request_id)
    words = capsys.readouterr().out
    assert refusal["message"] in words and f"limit that bound: {limit}, {value}" in words
    assert CANARY not in str(RefusedRequest.objects.values().get(request_id=request_id))
    assert narrow.client(narrow.cast.alice).get(f"/v1/requests/{request_id}").status_code == 404, "it is nobody's"
    listed = narrow.client(narrow.cast.operator).get("/v1/admin/refusals").json()
    assert request_id in str(listed)


def test_a_connection_that_says_nothing_is_no_refused_request(narrow: InProcessSite) -> None:
    status, request_id = say(narrow, "")
    assert status == 408 and explain(request_id) is None


def test_the_console_lists_and_explains_it(narrow: InProcessSite) -> None:
    _, request_id = say(narrow, HEADS["a body too large"][0])
    refusal_log.LOG.write()
    browser = Browser()
    browser.force_login(User.objects.create_superuser("root"))
    row = RefusedRequest.objects.get(request_id=request_id)
    listed = browser.get(reverse("admin:accounts_refusedrequest_changelist")).content.decode()
    assert request_id in listed and "max_body_bytes" in listed and "2,000" in listed
    page = browser.get(reverse("admin:accounts_refusedrequest_change", args=[row.pk])).content.decode()
    assert "over the limit of 2000 bytes" in page and "MAX_BODY_BYTES in the settings" in page
    assert browser.get(reverse("console-request", args=[request_id])).status_code == 200


@pytest.mark.django_db
def test_a_flood_is_counted_and_pushes_out_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    log = refusal_log.RefusalLog()
    monkeypatch.setattr(log, "_ensure_started", lambda: None)
    monkeypatch.setattr(refusal_log, "LOG", log)
    with CaptureQueriesContext(
        connection,
    ) as asked:
        for number in range(1000):
            turned_away.note(TurnedAway(f"flood-{number}", "/v1/generate", "request_timeout", "Slow.", ("x", 1)))
        for number in range(refusal_log.MAX_EACH):
            refusal = Refusal("invalid_api_key", "Wrong.")
            refusal_log.note(refusal, request_id=f"key-{number}", route="/v1/generate", principal=None)
    assert len(asked) == 0
    assert log.write() == refusal_log.MAX_UNREAD + refusal_log.MAX_EACH
    last = RefusedRequest.objects.get(request_id=f"flood-{refusal_log.MAX_UNREAD - 1}")
    assert last.num_more == 1000 - refusal_log.MAX_UNREAD
    assert not RefusedRequest.objects.filter(request_id__startswith="key", num_more__gt=0).exists()


@pytest.mark.django_db
def test_a_flood_while_the_database_is_away_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import OperationalError

    log = refusal_log.RefusalLog()
    monkeypatch.setattr(log, "_ensure_started", lambda: None)
    monkeypatch.setattr(refusal_log, "LOG", log)

    def away(*_arguments: Any, **_options: Any) -> None:
        raise OperationalError("away")

    with monkeypatch.context() as broken:
        broken.setattr(RefusedRequest.objects, "bulk_create", away)
        for second in range(5):
            for number in range(100):
                turned_away.note(TurnedAway(f"{second}-{number}", "", "request_timeout", "Slow."))
            with pytest.raises(OperationalError):
                log.write()
    assert log.write() == refusal_log.MAX_UNREAD
    assert sum(row.num_more for row in RefusedRequest.objects.all()) == 500 - refusal_log.MAX_UNREAD
