"""Markup and escape sequences as a model's words: every dialect says what its answer is, and none of it is a page."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from accounts.models import Tenant
from inference.engine.fake_backend import FakeBackend
from tests.in_process import MODEL, InProcessSite

pytestmark = [pytest.mark.integration, pytest.mark.api]

SCRIPT = "<script>alert(1)</script>\x1b[2J\x00"
CHAT = {"messages": [{"role": "user", "content": SCRIPT.replace("\x00", "")}], "max_tokens": 3, "model": MODEL}
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "Once", "max_new_tokens": 3},
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "Once", "max_tokens": 3, "model": MODEL},
    "/v1/responses": {"input": "Once", "max_output_tokens": 16, "model": MODEL},
    "/v1/messages": CHAT,
    "/completion": {"prompt": "Once", "n_predict": 3},
}


def check(answer: httpx.Response, content_type: str) -> None:
    assert answer.headers["content-type"].startswith(content_type), answer.headers
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]


@pytest.fixture
def hostile(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> InProcessSite:
    monkeypatch.setattr(FakeBackend, "piece", lambda self, token: SCRIPT.encode())
    return site


@pytest.mark.parametrize("path", DIALECTS)
def test_whatever_a_model_says_every_dialect_says_what_it_is_and_that_it_is_no_page(
    hostile: InProcessSite, path: str
) -> None:
    alice = hostile.client(hostile.cast.alice)
    whole = alice.post(path, json=DIALECTS[path])
    assert whole.status_code == 200, whole.text
    check(whole, "application/json")
    assert "<script>" in whole.text and "\x1b" not in whole.text and "\x00" not in whole.text
    with alice.stream("POST", path, json={**DIALECTS[path], "stream": True}) as answer:
        streamed = answer.read().decode()
        check(answer, "text/event-stream")
    assert "<script>" in streamed and "\x1b" not in streamed and "\x00" not in streamed
    refused = alice.post(path, json={**DIALECTS[path], "model": SCRIPT})
    assert refused.status_code in (400, 404, 422)
    check(refused, "application/json")


def test_what_was_uploaded_comes_back_as_a_file_to_keep(hostile: InProcessSite) -> None:
    alice = hostile.client(hostile.cast.alice)
    page = b"<html><script>alert(1)</script>"
    name = '"><script>.html'
    made = alice.post("/v1/files", files={"file": (name, page, "text/html")}, data={"purpose": "user_data"})
    if made.status_code != 200:  # a purpose that is checked must be lines of JSON
        line = b'{"custom_id": "<script>", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}}\n'
        page = line
        made = alice.post("/v1/files", files={"file": (name, line, "text/html")}, data={"purpose": "batch"})
    assert made.status_code == 200, made.text
    check(made, "application/json")
    answer = alice.get(f"/v1/files/{made.json()['id']}/content")
    assert answer.content == page
    check(answer, "application/octet-stream")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "<" not in answer.headers["content-disposition"]


def test_statements_are_files_too_and_names_in_refusals_are_json(hostile: InProcessSite) -> None:
    Tenant.objects.filter(pk=hostile.cast.alice.tenant.pk).update(name=SCRIPT[:-1])
    alice = hostile.client(hostile.cast.alice)
    check(alice.get("/v1/me"), "application/json")
    answer = alice.get(f"/v1/models/{SCRIPT[:-5]}")
    assert answer.status_code == 404
    check(answer, "application/json")
    check(httpx.get(f"{hostile.base_url}/<script>alert(1)</script>"), "application/json")
