"""Pages of other origins, as browsers ask for them: preflights without a key, answers with the key's tenant."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from django.urls import get_resolver

from accounts.identity import keys, known_keys
from accounts.models import Tenant
from inference.api import cross_origin
from inference.api.async_view import AsyncAPIView
from tests.in_process import MODEL, InProcessSite, wait_until

pytestmark = [pytest.mark.integration, pytest.mark.api]

APP, OTHER = "https://app.example.org", "https://other.example.net"
ALLOWED, EXPOSED = "access-control-allow-origin", "access-control-expose-headers"
ASKED = "authorization,content-type,x-stainless-lang"
BODY = {"prompt": "Once upon a time", "max_new_tokens": 4}


@pytest.fixture
def shared(site: InProcessSite) -> InProcessSite:
    """Alice lists APP, Bob lists OTHER."""
    for customer, origin in ((site.cast.alice, APP), (site.cast.bob, OTHER)):
        tenant = Tenant.objects.get(pk=customer.tenant.pk)
        tenant.allowed_origins = [origin]
        tenant.save(update_fields=["allowed_origins"])
    return site


def preflight(site: InProcessSite, path: str, origin: str, method: str = "POST", asked: str = ASKED) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    if asked:
        headers["Access-Control-Request-Headers"] = asked
    return httpx.options(f"{site.base_url}{path}", headers=headers, timeout=20)


def check_shared(answer: httpx.Response, origin: str) -> None:
    assert answer.headers[ALLOWED] == origin, answer.text
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers


def check_not_shared(answer: httpx.Response) -> None:
    assert not [name for name in answer.headers if name.startswith("access-control-")], answer.headers


def test_a_preflight_is_answered_for_any_tenants_origin_and_the_answer_for_the_keys_own(shared: InProcessSite) -> None:
    for origin in (APP, OTHER):
        answer = preflight(shared, "/v1/generate", origin)
        assert answer.status_code == 200 and answer.content == b""
        check_shared(answer, origin)
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert answer.headers["access-control-allow-headers"] == ASKED
        assert answer.headers["access-control-max-age"] == "600"
        assert {"access-control-request-method", "access-control-request-headers"} <= {
            name.strip().lower() for name in answer.headers["vary"].split(",")
        }
    alice = shared.client(shared.cast.alice)
    answer = alice.post("/v1/generate", json=BODY, headers={"Origin": APP})
    assert answer.status_code == 200
    check_shared(answer, APP)
    assert {"x-request-id", "x-ratelimit-remaining-tokens", "retry-after"} <= set(answer.headers[EXPOSED].split(", "))
    stranger = alice.post("/v1/generate", json=BODY, headers={"Origin": OTHER})
    check_not_shared(stranger)
    assert stranger.headers["vary"].lower() == "origin", "a cache must not give it to others"


def test_who_asks_from_no_page_sees_nothing_of_it(shared: InProcessSite) -> None:
    answer = shared.client(shared.cast.alice).generate()
    check_not_shared(answer)
    assert answer.headers["vary"].lower() == "origin"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", f"{APP}.evil.example", APP.upper(), f"{APP}/"])
def test_an_origin_that_nobody_lists_is_refused_with_a_reason(shared: InProcessSite, origin: str) -> None:
    answer = preflight(shared, "/v1/generate", origin)
    assert answer.status_code == 403 and answer.json()["code"] == "forbidden"
    assert "allowed origins" in answer.json()["message"] and origin not in answer.text
    check_not_shared(answer)


def test_a_star_is_for_every_page_of_that_tenant_alone(shared: InProcessSite) -> None:
    tenant = shared.cast.bob.tenant
    tenant.allowed_origins = ["*"]
    tenant.save(update_fields=["allowed_origins"])
    check_shared(preflight(shared, "/v1/generate", "https://evil.example"), "*")
    everywhere = {"Origin": "https://evil.example"}
    check_shared(shared.client(shared.cast.bob).get("/v1/me", headers=everywhere), "*")
    check_not_shared(shared.client(shared.cast.alice).get("/v1/me", headers=everywhere))


def test_streams_and_every_dialect_take_part(shared: InProcessSite) -> None:
    alice = shared.client(shared.cast.alice)
    chat = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4, "model": MODEL}
    for path, body in (
        ("/v1/generate", BODY),
        ("/v1/chat/completions", chat),
        ("/v1/messages", chat),
        ("/completion", {"prompt": "Once", "n_predict": 4}),
    ):
        check_shared(preflight(shared, path, APP), APP)
        with alice.stream("POST", path, json={**body, "stream": True}, headers={"Origin": APP}) as answer:
            assert answer.status_code == 200, answer.read()
            check_shared(answer, APP)
            assert sum(line.startswith("data:") for line in answer.iter_lines()) > 1


def test_what_pages_may_read_is_told_of_every_header_that_answers_have(shared: InProcessSite) -> None:
    """Of four dialects, good and refused answers, a cached one, and one that is fetched later."""
    alice = shared.client(shared.cast.alice)
    chat = {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}
    answers = [alice.post("/v1/generate", json={**BODY, "temperature": 0}, headers={"Idempotency-Key": "k"})]
    answers += [alice.post("/v1/generate", json={**BODY, "temperature": 0}) for _ in range(2)]
    answers += [alice.post("/v1/generate", json={**BODY, "background": True})]
    answers += [alice.post("/v1/admission", json=BODY), alice.post("/v1/generate", json={"prompt": 1})]
    for path in ("/v1/chat/completions", "/v1/messages", "/v1/completions", "/completion"):
        answers += [alice.post(path, json={**chat, "prompt": "a"}), alice.post(path, json={**chat, "model": "none"})]
    plain = {"server", "content-type", "content-length", "date", "vary", "connection", "transfer-encoding"}
    plain |= {"x-content-type-options", "cache-control", "x-accel-buffering", "www-authenticate", "allow"}
    seen = {name for answer in answers for name in answer.headers} - plain
    assert {"x-request-id", "x-cache", "location", "x-usage-total-tokens", "openai-version"} <= seen
    assert seen <= set(cross_origin.EXPOSED), seen - set(cross_origin.EXPOSED)


def test_a_page_reads_why_it_was_refused(shared: InProcessSite) -> None:
    """Before a key is known, too: with a network error nobody can tell an expired key from a server that is down."""
    check_shared(preflight(shared, "/v1/generate", APP), APP)
    wrong = {"Origin": APP, "Authorization": f"Bearer {keys.generate().text}"}
    answer = httpx.post(f"{shared.base_url}/v1/generate", json=BODY, headers=wrong)
    assert answer.status_code == 401
    check_shared(answer, APP)

    def refused_by_the_guard() -> httpx.Response | None:
        """It goes by what is remembered, which may be forgotten at any moment: each change makes it so."""
        preflight(shared, "/v1/generate", APP)
        big = httpx.post(f"{shared.base_url}/v1/generate", content=b" " * (3 << 20), headers=wrong)
        assert big.status_code == 413
        return big if "access-control-allow-origin" in big.headers else None

    check_shared(wait_until(refused_by_the_guard), APP)
    check_shared(httpx.get(f"{shared.base_url}/healthz", headers={"Origin": APP}), APP)
    check_not_shared(httpx.get(f"{shared.base_url}/healthz", headers={"Origin": "https://evil.example"}))


def test_a_change_counts_at_once_and_without_queries_for_strangers(
    shared: InProcessSite, django_assert_num_queries: Any
) -> None:
    alice = shared.client(shared.cast.alice)
    check_shared(alice.get("/v1/me", headers={"Origin": APP}), APP)
    tenant = shared.cast.alice.tenant
    tenant.allowed_origins = []
    tenant.save(update_fields=["allowed_origins"])
    check_not_shared(alice.get("/v1/me", headers={"Origin": APP}))
    assert preflight(shared, "/v1/me", APP, "GET").status_code == 403
    with django_assert_num_queries(0):  # of this thread; those of the site are counted in test_origins.py
        assert {preflight(shared, "/v1/me", f"https://{n}.example", "GET").status_code for n in range(20)} == {403}


OPERATORS_PATHS = [
    *("/admin/", "/admin/login/", "/admin/playground/run/", "/static/llmsite/console.js", "/docs/"),
    *("/v1/admin/tenants", "/v1/admin/keys", "/v1/admin/usage", "/v1/admin/models/load", "/metrics"),
    *("/v1/organization/costs", "/v1/organization/usage/completions", "/nothing-is-here"),
]


@pytest.mark.parametrize("path", OPERATORS_PATHS)
def test_the_console_and_what_operators_alone_reach_never_takes_part(shared: InProcessSite, path: str) -> None:
    tenant = shared.cast.operator.tenant
    tenant.allowed_origins = ["*"]
    tenant.save(update_fields=["allowed_origins"])
    operator = shared.client(shared.cast.operator)
    for method in ("GET", "POST"):
        check_not_shared(preflight(shared, path, APP, method))
        check_not_shared(operator.request(method, path, headers={"Origin": APP}))
    check_not_shared(operator.post(path, content=b" " * (3 << 20), headers={"Origin": APP}))


def test_every_view_of_the_api_takes_part_or_belongs_to_operators() -> None:
    views = {
        view
        for pattern in get_resolver("inference.api.urls").url_patterns
        if (view := getattr(getattr(pattern, "callback", None), "cls", None)) and issubclass(view, AsyncAPIView)
    }
    kept = {view.__name__ for view in views if not cross_origin.takes_part(view.scopes)}
    assert kept == {"MetricsView", "CompletionsUsageView", "EmbeddingsUsageView", "CostsView", "ImportContentView"}
    assert len(views) > 40


@pytest.mark.parametrize("asked", ["a b", "x\x01", "(", "x," * 3000])
def test_names_of_headers_are_bounded(shared: InProcessSite, asked: str) -> None:
    answer = preflight(shared, "/v1/generate", APP, asked=asked.encode("latin1"))  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert "access-control-allow-headers" not in answer.headers


def test_a_plain_options_is_what_it_was(shared: InProcessSite) -> None:
    answer = httpx.options(f"{shared.base_url}/v1/generate", headers={"Origin": APP})
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"


def test_without_a_database_a_page_sees_a_network_error_and_programs_their_answer(
    shared: InProcessSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.db import OperationalError

    from accounts.identity import known_origins

    def down() -> frozenset[str]:
        raise OperationalError

    known_keys.CACHE.forget()
    monkeypatch.setattr(known_origins, "_read", down)
    assert preflight(shared, "/v1/generate", APP).status_code == 503
    answer = httpx.get(f"{shared.base_url}/healthz", headers={"Origin": APP})
    assert answer.status_code == 200
    check_not_shared(answer)
