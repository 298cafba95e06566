"""What a model says and who may read it, in a real browser: markup in an answer, and pages of other origins.

The site is in this process with a fake model. Skipped where there is no chromium.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from django.contrib.auth.models import User
from selenium import webdriver
from selenium.webdriver.common.by import By

from inference.engine.fake_backend import FakeBackend
from tests.browser import chromium
from tests.browser.chromium import find
from tests.browser.test_console_in_a_browser import browser  # noqa: F401  a fixture
from tests.in_process import FakeSpeed, InProcessSite

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SCRIPT = b"<script>window.owned = 1</script><img src=x onerror='window.owned = 1'><b>bold</b>\x1b[31m "
ASK = """
const [url, key, stream, done] = arguments;
const body = JSON.stringify({prompt: "Once upon a time", max_new_tokens: 12, cache: false, stream});
const headers = {"Authorization": `Bearer ${key}`, "Content-Type": "application/json"};
fetch(url, {method: "POST", headers, body}).then(async (answer) => {
  const found = {status: answer.status, id: answer.headers.get("x-request-id"),
                 left: answer.headers.get("x-ratelimit-remaining-requests"), pieces: 0, text: ""};
  const reader = answer.body.getReader();
  for (;;) {
    const {done: ended, value} = await reader.read();
    if (ended) break;
    found.pieces += 1;
    found.text += new TextDecoder().decode(value);
  }
  done(found);
}).catch((error) => done({error: error.name}));
"""


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(seconds_per_step=0.02)


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title>")

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def page() -> Iterator[str]:
    """The origin of a page that is not the site's."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_markup_that_a_model_wrote_is_text_in_the_playground(
    browser: webdriver.Chrome,  # noqa: F811
    site: InProcessSite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeBackend, "piece", lambda self, token: SCRIPT)
    password = "a long password for tests"
    User.objects.create_superuser("root", password=password)
    chromium.sign_in(browser, site.base_url, {"username": "root", "password": password})
    browser.get(f"{site.base_url}/admin/playground/?key={site.cast.alice.key.pk}")
    for name, value in {"max_new_tokens": "4", "text": "Once upon a time"}.items():
        field = find(browser, f"#play-form [name={name}]")
        field.clear()
        field.send_keys(value)
    browser.execute_script("document.getElementById('play-send').click()")
    find(browser, "#play-form[data-answers]", 30)
    answer = find(browser, "#answer-a .is-model")
    assert answer.text.count("<script>window.owned = 1</script>") == 4, browser.page_source
    assert not answer.find_elements(By.CSS_SELECTOR, "script, img, b")
    assert browser.execute_script("return window.owned") is None
    for page in ("inference/receipt/", "requests/", ""):
        browser.get(f"{site.base_url}/admin/{page}")
        assert browser.execute_script("return window.owned") is None


def test_an_answer_that_is_opened_as_a_page_is_no_page(
    browser: webdriver.Chrome,  # noqa: F811
    site: InProcessSite,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the API itself: what a browser shows of it is JSON, whatever is in it."""
    browser.get(f"{site.base_url}/v1/models/%3Cscript%3Ewindow.owned=1%3C%2Fscript%3E")
    assert browser.execute_script("return document.contentType") == "application/json"
    assert browser.execute_script("return window.owned") is None


def test_a_browser_lets_a_page_ask_where_the_keys_tenant_lists_its_origin(
    browser: webdriver.Chrome,  # noqa: F811
    site: InProcessSite,
    page: str,
) -> None:
    def ask(customer: Any, key: str = "", stream: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = browser.execute_async_script(
            ASK, f"{site.base_url}/v1/generate", key or customer.text, stream
        )
        return found

    browser.set_script_timeout(30)
    browser.get(page)
    assert ask(site.cast.alice) == {"error": "TypeError"}, "nobody lists it"
    tenant = site.cast.alice.tenant
    tenant.allowed_origins = [page]
    tenant.save(update_fields=["allowed_origins"])
    found = ask(site.cast.alice)
    assert found["status"] == 200 and found["id"] and int(found["left"]) >= 0
    found = ask(site.cast.alice, stream=True)
    assert found["status"] == 200 and found["pieces"] > 5 and "event: " in found["text"]
    assert ask(site.cast.bob) == {"error": "TypeError"}, "another tenant's key"
    refused = ask(site.cast.alice, key=f"{site.cast.alice.text[:-1]}{'a' if site.cast.alice.text[-1] != 'a' else 'b'}")
    assert refused["status"] == 401 and "invalid_api_key" in refused["text"]
    tenant.allowed_origins = []
    tenant.save(update_fields=["allowed_origins"])
    assert ask(site.cast.alice) == {"error": "TypeError"}
