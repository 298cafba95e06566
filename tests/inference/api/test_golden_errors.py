"""The golden table of errors against the server: each case in each dialect, by the official clients, and over HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import orjson
import pytest

from inference.api.errors import ANTHROPIC, LLAMA, NATIVE, OPENAI_CHAT, STATUS, ErrorShape, error_response
from tests import golden_errors
from tests.conftest import Customer, make_customer
from tests.golden_errors import Case
from tests.in_process import N_CTX, OTHER_MODEL, InProcessSite

CASES = {case.name: case for case in golden_errors.cases()}
SHAPES: dict[str, ErrorShape] = {
    "native": NATIVE,
    "openai": OPENAI_CHAT,
    "anthropic": ANTHROPIC,
    "llamacpp": LLAMA,
}


def expected(case: Case, dialect: str) -> tuple[Any, ...]:
    found: tuple[Any, ...] = getattr(case, dialect)
    return (*found, found[0]) if dialect == "llamacpp" else found


def seen(dialect: str, status: int, content: bytes) -> tuple[Any, ...]:
    """Status, type and code where the dialect's clients look for them."""
    body = orjson.loads(content)
    match dialect:
        case "native":
            return status, body["code"]
        case "anthropic":
            assert body["type"] == "error"
            assert body["request_id"]
            return status, body["error"]["type"], body["error"]["details"]["error_code"]
        case "openai":
            return status, body["error"]["type"], body["error"]["code"]
    return status, body["error"]["type"], body["error"]["code"]


@pytest.mark.unit
def test_the_table_has_every_code_and_enough_cases() -> None:
    assert {case.native[1] for case in CASES.values()} == STATUS.keys()
    assert len(CASES) >= 40


@pytest.mark.unit
def test_the_page_is_made_of_the_table() -> None:
    assert golden_errors.PAGE.read_text(encoding="utf-8") == golden_errors.page()


@pytest.mark.unit
@pytest.mark.parametrize("dialect", SHAPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_dialect_words_each_case_as_the_table_says(case: Case, dialect: str) -> None:
    response = error_response(SHAPES[dialect], case.refusal, "the-id")
    assert seen(dialect, response.status_code, response.content) == expected(case, dialect)
    headers = {name: value for name, value in response.headers.items() if name != "Content-Type"}
    assert headers == case.headers


def raised_by(call: Callable[[Any], Any], response: Any) -> Exception:
    """What the official client makes of a response, at its first try."""
    reply = httpx2.Response(response.status_code, content=response.content, headers=dict(response.headers))
    with (
        httpx2.Client(transport=httpx2.MockTransport(lambda request: reply)) as http,
        pytest.raises(Exception) as caught,
    ):
        call(http)
    return caught.value


@pytest.mark.unit
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_official_clients_raise_what_the_table_says(case: Case) -> None:
    def ask_openai(http: Any) -> Any:
        return openai.OpenAI(api_key="k", base_url="http://x/v1", http_client=http, max_retries=0).models.list()

    def ask_anthropic(http: Any) -> Any:
        return anthropic.Anthropic(api_key="k", base_url="http://x", http_client=http, max_retries=0).models.list()

    error = raised_by(ask_openai, error_response(OPENAI_CHAT, case.refusal, "the-id"))
    assert type(error).__name__ == case.openai_raises
    assert isinstance(error, openai.APIStatusError)
    assert (error.status_code, error.type, error.code) == case.openai
    other = raised_by(ask_anthropic, error_response(ANTHROPIC, case.refusal, "the-id"))
    assert type(other).__name__ == case.anthropic_raises
    assert isinstance(other, anthropic.APIStatusError)
    assert (other.status_code, other.type, other.error_code) == case.anthropic


# Over HTTP

TURNS = [{"role": "user", "content": "Hello there"}]
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("/v1/generate", {"prompt": "Once upon a time", "max_new_tokens": 4, "cache": False}),
    "openai": ("/v1/chat/completions", {"messages": TURNS, "max_tokens": 4}),
    "anthropic": ("/v1/messages", {"messages": TURNS, "max_tokens": 4}),
    "llamacpp": ("/completion", {"prompt": "Once upon a time", "n_predict": 4}),
}
OUT_OF_RANGE: dict[str, dict[str, Any]] = {
    "native": {"temperature": 99},
    "openai": {"temperature": 7},
    "anthropic": {"temperature": 7},
    "llamacpp": {"n_predict": -7},
}


@dataclass
class Live:
    """A site and a dialect."""

    site: InProcessSite
    plan: Any
    dialect: str
    number: itertools.count[int] = field(default_factory=itertools.count)

    def ask(self, customer: Customer | None, **fields: Any) -> httpx.Response:
        """The dialect's usual request with other fields; ... leaves one out."""
        path, body = BODIES[self.dialect]
        sent = {name: value for name, value in (body | fields).items() if value is not ...}
        return self.site.client(customer).post(path, json=sent)

    def alice(self, **fields: Any) -> httpx.Response:
        return self.ask(self.site.cast.alice, **fields)

    def limited(self, **limits: int | None) -> Customer:
        return make_customer(f"Customer {next(self.number)}", self.plan, **limits)

    def said(self, text: str) -> dict[str, Any]:
        if "messages" in BODIES[self.dialect][1]:
            return {"messages": [{"role": "user", "content": text}]}
        return {"prompt": text}

    def with_key(self, text: str) -> httpx.Response:
        path, body = BODIES[self.dialect]
        return self.site.client().post(path, json=body, headers={"x-api-key": text})

    def expired(self) -> httpx.Response:
        customer = self.limited(max_output=5)
        customer.key.expires_at = datetime.now(UTC) - timedelta(minutes=1)
        customer.key.save()
        return self.ask(customer)

    def hasty(self) -> httpx.Response:
        customer = self.limited(requests_per_minute=1)
        answers = [self.ask(customer) for _ in range(3)]  # the minute may turn once
        return next(each for each in answers if each.status_code == 429)

    def crowded(self) -> httpx.Response:
        self.site.stop_worker()
        try:
            return self.ask(self.limited(queue_length=0))
        finally:
            self.site.start_worker()


LIVE: dict[str, Callable[[Live], httpx.Response]] = {
    "no key": lambda live: live.ask(None),
    "a key that nobody knows": lambda live: live.with_key("sk-nobody"),
    "a key that has expired": Live.expired,
    "a key without the scope": lambda live: live.ask(live.site.cast.operator),
    "a body that is no JSON": lambda live: live.site.client(live.site.cast.alice).post(
        BODIES[live.dialect][0], content=b"{"
    ),
    "a field that is missing": lambda live: live.alice(messages=..., prompt=...),
    "a field of the wrong type": lambda live: live.alice(temperature="hot"),
    "a field out of range": lambda live: live.alice(**OUT_OF_RANGE[live.dialect]),
    "a grammar that is wrong": lambda live: live.alice(grammar="root ::= ("),
    "a schema that is wrong": lambda live: live.alice(json_schema={"type": "bogus"}),
    "a prompt over the context": lambda live: live.alice(**live.said("word " * N_CTX)),
    "a model that nobody knows": lambda live: live.alice(model="nothing"),
    "a model of other tenants": lambda live: live.ask(live.site.cast.charlie, model=OTHER_MODEL),
    "a method that is not taken": lambda live: live.site.client(live.site.cast.alice).put(BODIES[live.dialect][0]),
    "a body that is too large": lambda live: live.alice(**live.said("x" * (3 << 20))),
    "a quota that is used up": lambda live: live.ask(live.limited(monthly_tokens=3)),
    "too many requests in a minute": Live.hasty,
    "more tokens than a minute ever has": lambda live: live.ask(live.limited(tokens_per_minute=3)),
    "no requests at all by the plan": lambda live: live.ask(live.limited(requests_per_minute=0)),
    "a queue that is full": Live.crowded,
}


@pytest.mark.api
@pytest.mark.parametrize("dialect", SHAPES)
def test_the_server_answers_as_the_table_says(site: InProcessSite, plan: Any, dialect: str) -> None:
    wrong = {}
    live = Live(site, plan, dialect)
    for name, provoke in LIVE.items():
        response = provoke(live)
        found = seen(dialect, response.status_code, response.content)
        if found != expected(CASES[name], dialect):
            wrong[name] = (found, response.text)
        for header in ("x-should-retry", "Retry-After"):
            assert (header in response.headers) == (header in CASES[name].headers), (name, header)
        assert response.headers["x-request-id"] == response.headers["request-id"]
    assert not wrong
