"""POSTs with an Idempotency-Key over HTTP, with a fake model: one generation and one charge, whoever asks how often."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import orjson
import pytest

from accounts.ledger.audit import audit
from inference.api import presence, repeating
from inference.api.hop import shared_hop
from inference.intake import admission, idempotency
from inference.models import Receipt
from inference.transport.queue import ticket_queue
from tests.in_process import MODEL, Client, FakeSpeed, InProcessSite, leave_after, wait_until
from tests.openai_calls import HELLO, sdk
from tests.timing import PATIENCE_SECONDS

pytestmark = [pytest.mark.api, pytest.mark.integration]

ROUNDS = int(os.environ.get("IDEMPOTENCY_ROUNDS", "3"))
"""500 is what was promised once; the suite shows that the test works."""
RACERS = 64
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "Once upon a time", "max_new_tokens": 8, "cache": False, "temperature": 0},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 8, "temperature": 0},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0},
    "/completion": {"prompt": "Once upon a time", "n_predict": 8},
}


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(seconds_per_step=0.001)


@pytest.fixture
def alice(site: InProcessSite) -> Client:
    return site.client(site.cast.alice)


def key_header(key: str | None = None) -> dict[str, str]:
    return {"Idempotency-Key": key or uuid.uuid4().hex}


def receipts(site: InProcessSite) -> list[Receipt]:
    site.settle()
    return list(Receipt.objects.order_by("created_at"))


def is_sound() -> bool:
    return audit().is_clean


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", DIALECTS)
def test_the_same_key_and_body_is_the_same_answer(site: InProcessSite, alice: Client, path: str, stream: bool) -> None:
    header, body = key_header(), {**DIALECTS[path], "stream": stream}
    first = alice.post(path, json=body, headers=header)
    assert first.status_code == 200, first.text
    assert "idempotent-replayed" not in first.headers
    charged = site.charged(site.cast.alice)
    again = alice.post(path, json=dict(reversed(body.items())), headers=header)
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["idempotent-replayed"] == "true"
    for name in ("x-request-id", "content-type"):
        assert again.headers[name] == first.headers[name]
    assert site.charged(site.cast.alice) == charged
    assert len(receipts(site)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_of_one_request_are_replayed_as_well(site: InProcessSite, alice: Client, stream: bool) -> None:
    header, body = key_header(), {**DIALECTS["/v1/completions"], "n": 3, "stream": stream}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: alice.post("/v1/completions", json=body, headers=header), range(4)))
    assert {answer.content for answer in answers} == {answers[0].content}
    assert sorted(answer.headers.get("idempotent-replayed", "") for answer in answers) == ["", *["true"] * 3]
    batch = {"prompts": ["one two", "three"], "max_new_tokens": 4}
    key = key_header()
    whole = [alice.post("/v1/generate/batch", json=batch, headers=key) for _ in range(2)]
    assert whole[0].content == whole[1].content
    assert len(receipts(site)) == 5


def test_the_answers_to_one_key_race(site: InProcessSite, alice: Client) -> None:
    """Of 64 at once one is computed and charged, the others attach or replay. Whole answers and streams in turn."""
    body = DIALECTS["/v1/generate"]
    expected = alice.post("/v1/generate", json=body).json()["output"]
    (used, _), number = site.charged(site.cast.alice), len(receipts(site))
    limits = httpx.Limits(max_connections=RACERS, max_keepalive_connections=RACERS)
    everybody = httpx.Client(base_url=site.base_url, headers=site.cast.alice.headers, limits=limits, timeout=60)
    with everybody as client, ThreadPoolExecutor(RACERS) as pool:
        for place in range(1, ROUNDS + 1):
            header, stream = key_header(), place % 2 == 0
            start = threading.Barrier(RACERS)

            def race(_: int, header: Any = header, stream: bool = stream, start: Any = start) -> httpx.Response:
                start.wait(30)
                return client.post("/v1/generate", json={**body, "stream": stream}, headers=header)

            answers = list(pool.map(race, range(RACERS)))
            assert Counter(answer.status_code for answer in answers) == {200: RACERS}, answers[0].text
            assert len({answer.headers["x-request-id"] for answer in answers}) == 1
            assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
            assert len({text_of(answer) for answer in answers}) == 1
            assert text_of(answers[0]) == expected
            if place % 50 == 0 or place == ROUNDS:
                assert len(receipts(site)) == number + place
    assert site.charged(site.cast.alice) == (used * (ROUNDS + 1), 0)
    assert is_sound()


def text_of(answer: httpx.Response) -> str:
    if answer.headers["content-type"] == "application/json":
        return str(answer.json()["output"])
    lines = [line for line in answer.text.split("\n\n") if "event: delta" in line]
    return "".join(orjson.loads(line.split("data: ")[1])["text"] for line in lines)


# What is refused


def test_another_body_is_a_conflict_in_every_dialect(alice: Client) -> None:
    for path, body in DIALECTS.items():
        header = key_header()
        assert alice.post(path, json=body, headers=header).status_code == 200
        refused = alice.post(path, json={**body, "seed": 7}, headers=header)
        assert refused.status_code == 409
        assert refused.headers["x-should-retry"] == "false"
        assert "Idempotency-Key" in refused.text
    assert alice.post("/v1/generate", json=DIALECTS["/v1/generate"], headers=header).status_code == 200  # another route


@pytest.mark.parametrize("key", ["", "x" * 256, "two words", "é".encode()])
def test_a_key_is_bounded(alice: Client, key: Any) -> None:
    refused = alice.post("/v1/generate", json=DIALECTS["/v1/generate"], headers={"Idempotency-Key": key})
    assert (refused.status_code, refused.json()["code"]) == (400, "bad_request")


def test_keys_of_tenants_are_their_own(site: InProcessSite, alice: Client) -> None:
    header, body = key_header(), DIALECTS["/v1/generate"]
    first = alice.post("/v1/generate", json=body, headers=header)
    other = site.client(site.cast.charlie).post("/v1/generate", json={**body, "seed": 5}, headers=header)
    assert other.status_code == 200
    assert "idempotent-replayed" not in other.headers
    assert other.headers["x-request-id"] != first.headers["x-request-id"]


def test_a_key_without_the_scope_reads_no_answer_of_its_tenant(site: InProcessSite, alice: Client) -> None:
    from accounts.identity import issuing
    from tests.conftest import Customer

    header, body = key_header(), DIALECTS["/v1/generate"]
    assert alice.post("/v1/generate", json=body, headers=header).status_code == 200
    tenant = site.cast.alice.tenant
    key, text = issuing.issue(tenant, "reader", ["usage"], {}, None)
    reader = site.client(Customer(tenant, key, text))
    assert reader.post("/v1/generate", json=body, headers=header).status_code == 403


@pytest.mark.parametrize("named", [{}, {"model": MODEL}])
def test_a_key_that_may_not_use_the_model_is_not_given_its_answer(
    site: InProcessSite, alice: Client, named: dict[str, str]
) -> None:
    from accounts.identity import issuing
    from tests.conftest import Customer

    header, body = key_header(), {**DIALECTS["/v1/generate"], **named}
    assert alice.post("/v1/generate", json=body, headers=header).status_code == 200
    tenant = site.cast.alice.tenant
    for models, status in ((["another"], 404), ([MODEL], 200)):
        key, text = issuing.issue(tenant, "narrow", allowed_models=models)
        again = site.client(Customer(tenant, key, text)).post("/v1/generate", json=body, headers=header)
        assert again.status_code == status, again.text
    assert again.headers["idempotent-replayed"] == "true"


def test_a_refusal_leaves_the_key_free(site: InProcessSite, alice: Client) -> None:
    header = key_header()
    long = {**DIALECTS["/v1/generate"], "prompt": "word " * 300}
    for body in (long, {"prompt": ""}, long):
        assert alice.post("/v1/generate", json=body, headers=header).status_code in (400, 422)
    answer = alice.post("/v1/generate", json=DIALECTS["/v1/generate"], headers=header)
    assert answer.status_code == 200
    assert "idempotent-replayed" not in answer.headers


# What goes wrong


def test_a_request_that_lost_its_worker_may_be_tried_again(site: InProcessSite, alice: Client) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()
    header, body = key_header(), {**DIALECTS["/v1/generate"], "max_new_tokens": 200, "stream": True}
    with alice.stream("POST", "/v1/generate", json=body, headers=header) as response:
        parts = response.iter_text()
        next(parts)
        site.stop_worker()
        assert "event: error" in "".join(parts)
    assert site.charged(site.cast.alice) == (0, 0)
    site.speed.seconds_per_step = 0.0
    site.start_worker()
    again = alice.post("/v1/generate", json=body, headers=header)
    assert "event: finished" in again.text
    assert "idempotent-replayed" not in again.headers
    assert [receipt.status for receipt in receipts(site)] == ["failed", "completed"]


def test_who_asks_again_soon_finds_the_request_running(site: InProcessSite, alice: Client) -> None:
    """The first connection is cut in the middle; the second one has the whole answer, and it is charged once."""
    site.stop_worker()
    site.speed.seconds_per_step = 0.005
    site.start_worker()
    header, body = key_header(), {**DIALECTS["/v1/generate"], "max_new_tokens": 100, "stream": True}
    with alice.stream("POST", "/v1/generate", json=body, headers=header) as response:
        next(response.iter_text())
    again = alice.post("/v1/generate", json=body, headers=header)
    assert "event: finished" in again.text
    assert again.headers["idempotent-replayed"] == "true"
    third = alice.post("/v1/generate", json=body, headers=header)
    assert third.content == again.content
    (receipt,) = receipts(site)
    assert (receipt.completion_tokens, receipt.status) == (100, "completed")


def test_who_never_asks_again_is_cancelled_after_a_while(
    site: InProcessSite, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "PATIENCE_SECONDS", 0.1)
    site.stop_worker()
    site.speed.seconds_per_step = 0.05
    site.start_worker()
    header, body = key_header(), {**DIALECTS["/v1/generate"], "max_new_tokens": 200, "stream": True}
    with alice.stream("POST", "/v1/generate", json=body, headers=header) as response:
        next(response.iter_text())
    wait_until(lambda: site.num_running() == 0)
    wait_until(lambda: site.charged(site.cast.alice)[1] == 0)  # its last event is under way
    charged = site.charged(site.cast.alice)
    assert 0 < charged[0] < 200
    again = alice.post("/v1/generate", json=body, headers=header)
    assert '"finish_reason":"cancelled"' in again.text
    assert site.charged(site.cast.alice) == charged


def test_a_whole_answer_outlives_the_first_who_asked(site: InProcessSite, alice: Client) -> None:
    """One attaches to a request; then the first goes."""
    site.stop_worker()
    site.speed.seconds_per_step = 0.01
    site.start_worker()
    header, body = key_header(), {**DIALECTS["/v1/generate"], "max_new_tokens": 100}
    leave_after(site, alice.key, body, lambda: wait_until(lambda: site.num_running() == 1), **header)
    again = alice.post("/v1/generate", json=body, headers=header)
    assert again.status_code == 200
    assert again.headers["x-usage-completion-tokens"] == "100"
    assert len(receipts(site)) == 1


def test_several_answers_are_made_to_their_end_without_the_first(site: InProcessSite, alice: Client) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.01
    site.start_worker()
    for stream in (False, True):
        header, body = key_header(), {"prompt": "one", "max_tokens": 60, "n": 2, "temperature": 0, "stream": stream}
        if stream:
            with alice.stream("POST", "/v1/completions", json=body, headers=header) as response:
                next(response.iter_text())
        else:
            both_run = lambda: wait_until(lambda: site.num_running() == 2)  # noqa: E731
            leave_after(site, alice.key, body, both_run, "/v1/completions", **header)
        again = alice.post("/v1/completions", json=body, headers=header)
        assert again.status_code == 200, again.text
        assert again.headers["idempotent-replayed"] == "true"
    assert [receipt.completion_tokens for receipt in receipts(site)] == [60] * 4


def test_a_stream_of_several_is_made_to_its_end_also_for_who_never_saw_a_word_of_it(
    site: InProcessSite, alice: Client
) -> None:
    """As long as nothing is said there is no stream that somebody could go on reading: it is made all the same."""
    site.stop_worker()
    header, path = key_header(), "/v1/completions"
    body = {"prompt": "one two", "max_tokens": 90, "n": 2, "temperature": 0, "stream": True}
    leave_after(
        site,
        site.cast.alice.text,
        body,
        lambda: wait_until(lambda: ticket_queue().num_waiting("default") == 2),
        path,
        **header,
    )
    site.start_worker()
    again = alice.post(path, json=body, headers=header)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (200, "true"), again.text
    assert again.text.endswith("data: [DONE]\n\n")
    assert [receipt.completion_tokens for receipt in receipts(site)] == [90] * 2
    assert site.charged(site.cast.alice) == (2 + 2 * 90, 0)


def test_who_goes_before_a_cached_stream_comes_may_ask_again(
    site: InProcessSite, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    header, body = key_header(), {**DIALECTS["/v1/generate"], "cache": True, "stream": True}
    said = text_of(alice.post("/v1/generate", json=body))
    site.settle()
    entered, go_on = threading.Event(), threading.Event()
    admit = admission.admit

    def held(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        go_on.wait(PATIENCE_SECONDS)
        return admit(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(admission, "admit", held)
        leave_after(site, site.cast.alice.text, body, lambda: entered.wait(PATIENCE_SECONDS), **header)
        go_on.set()
        wait_until(lambda: shared_hop().num_pending == 0)
    again = alice.post("/v1/generate", json=body, headers=header)
    assert (again.status_code, again.headers["x-cache"], text_of(again)) == (200, "hit", said)


async def test_what_is_to_be_made_to_its_end_needs_no_reader() -> None:
    made: list[bytes] = []

    async def frames() -> AsyncGenerator[bytes]:
        for part in (b"one", b"two"):
            await asyncio.sleep(0)
            made.append(part)
            yield part

    read = repeating.made_to_the_end(frames())
    for _ in range(100):
        await asyncio.sleep(0)
    assert made == [b"one", b"two"]
    assert [part async for part in read] == made


def test_a_background_request_is_given_again_and_kept_as_long_as_any(
    site: InProcessSite, alice: Client, valkey_connection: Any, settings: Any
) -> None:
    body = {**DIALECTS["/v1/generate"], "background": True}
    header = key_header()
    first, again = (alice.post("/v1/generate", json=body, headers=header) for _ in range(2))
    assert (again.status_code, again.content) == (202, first.content)
    assert again.headers["location"] == first.headers["location"] == first.json()["links"]["self"]
    streamed = alice.post("/v1/generate", json={**body, "stream": True}, headers=key_header())
    site.settle()
    for key in ("ticket", "gen"):
        left = valkey_connection.ttl(f"{key}:{streamed.headers['x-request-id']}")
        assert left > settings.CONFIG.stream_kept_seconds, key


# Records


def claim(place: idempotency.Place, request_id: str, web: str = "web") -> idempotency.Claim:
    return idempotency.records().claim(place, request_id, web)


@pytest.fixture
def place(db: None, valkey: Any) -> Callable[[str], idempotency.Place]:
    return lambda key: idempotency.place_of(1, "/v1/generate", key, b"{}")


def test_the_claim_of_a_dead_web_is_taken_over_unless_something_was_admitted(place: Any, valkey: Any) -> None:
    ticket_queue().beat_web("web")
    assert claim(place("a"), "one").state == "first"
    assert claim(place("a"), "two").state == "waiting"
    valkey.delete("web:web")
    assert claim(place("a"), "two", "other").state == "first"
    valkey.hset(place("a").record, "admitted", 1)
    found = claim(place("a"), "three", "other")
    assert (found.state, found.request_id) == ("lost", "two")
    assert claim(place("a"), "four").state == "lost"


def test_answers_beyond_the_tenants_memory_go_and_their_keys_stay(place: Any, valkey: Any, settings: Any) -> None:
    settings.CONFIG = settings.CONFIG.model_copy(update={"idempotent_answers_mb": 1})
    for number in range(4):
        assert claim(place(str(number)), f"request-{number}").state == "first"
        answer = idempotency.Answer(200, {}, os.urandom(400_000))
        assert idempotency.records().keep(place(str(number)), f"request-{number}", answer)
        assert not idempotency.records().keep(place(str(number)), f"request-{number}", answer)
    assert [claim(place(str(number)), "x").state for number in range(4)] == ["lost", "lost", "answered", "answered"]
    assert int(valkey.hget("kept:1:sizes", "total")) < 1 << 20
    assert valkey.ttl(place("0").record) > 23 * 3600


def test_only_whoever_claimed_may_answer_or_release(place: Any) -> None:
    claim(place("a"), "one")
    assert not idempotency.records().release(place("a"), "two")
    assert not idempotency.records().keep(place("a"), "two", idempotency.Answer(200, {}, b""))
    assert idempotency.records().release(place("a"), "one")
    assert claim(place("a"), "two").state == "first"


def test_a_key_is_free_again_only_where_nothing_is_charged(place: Any, valkey: Any) -> None:
    """Whoever fails to word the answer of another must not have it computed again."""
    claim(place("a"), "one")
    valkey.hset(place("a").record, "admitted", 1)
    for state, charged, is_free in [("leased", None, False), ("done", 7, False), ("done", 0, True)]:
        valkey.hset("ticket:one", "state", state)
        if charged is not None:
            valkey.hset("ticket:one", "charged", charged)
        assert idempotency.records().release(place("a"), "one") is is_free


# The official client


class LosesFirstAnswers(httpx.HTTPTransport):
    """The server has the request, and the connection breaks before its answer comes."""

    num_lost = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if self.num_lost < 1:
            self.num_lost += 1
            response.close()
            raise httpx.ReadError("the connection broke", request=request)
        return response


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_clients_own_retries_are_charged_once(site: InProcessSite, stream: bool) -> None:
    transport = LosesFirstAnswers()
    with sdk(
        site.base_url, site.cast.alice.text, max_retries=2, http_client=httpx.Client(transport=transport)
    ) as client:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=HELLO, max_tokens=8, temperature=0, stream=stream, extra_headers=key_header()
        )
        assert transport.num_lost == 1
        assert raw.headers["idempotent-replayed"] == "true"
        answer: Any = raw.parse()
        chunks = list(answer) if stream else [answer]
        assert chunks[-1].choices[0].finish_reason == "length"
    assert len(receipts(site)) == 1
    assert is_sound()


def test_the_official_client_raises_a_conflict_without_trying_again(site: InProcessSite) -> None:
    header = key_header()
    ask: dict[str, Any] = {"model": MODEL, "messages": HELLO, "temperature": 0, "extra_headers": header}
    with sdk(site.base_url, site.cast.alice.text, max_retries=2) as client:
        client.chat.completions.create(**ask, max_tokens=4)
        with pytest.raises(openai.ConflictError):
            client.chat.completions.create(**ask, max_tokens=5)


def test_a_web_that_runs_is_known(site: InProcessSite, valkey_connection: Any) -> None:
    assert valkey_connection.exists(f"web:{presence.web_id()}")
