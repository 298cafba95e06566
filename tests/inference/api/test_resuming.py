"""Resumed streams and background requests over HTTP, with a fake model: what is resumed is what was cut."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from accounts.ledger.audit import audit
from accounts.trail.refusals import Refusal
from inference.api.sse import frame, numbered, position_of
from inference.conformance.target import Answer
from inference.models import Receipt
from inference.transport.queue import ticket_queue
from tests.in_process import MODEL, OTHER_MODEL, Client, FakeSpeed, InProcessSite, wait_until
from tests.openai_calls import HELLO

pytestmark = [pytest.mark.api, pytest.mark.integration]

CUTS = int(os.environ.get("RESUME_CUTS", "24"))
"""200 is what was promised once."""
TOKENS = 60
DIALECTS: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "Once upon a time", "max_new_tokens": TOKENS, "cache": False, "temperature": 0},
    "/v1/chat/completions": {
        "messages": HELLO,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    },
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": TOKENS, "temperature": 0},
    "/completion": {"prompt": "Once upon a time", "n_predict": TOKENS, "temperature": 0, "return_progress": True},
    "/v1/messages": {"messages": HELLO, "max_tokens": TOKENS, "temperature": 0},
}
Frame = tuple[str, str]
"""Id and data."""


@pytest.fixture
def fake_speed() -> FakeSpeed:
    return FakeSpeed(seconds_per_step=0.001)


@pytest.fixture
def alice(site: InProcessSite) -> Client:
    return site.client(site.cast.alice)


def frames(response: httpx.Response) -> Iterator[Frame]:
    event_id = ""
    for line in response.iter_lines():
        if line.startswith("id: "):
            event_id = line.removeprefix("id: ")
        elif line.startswith("data: "):
            yield event_id, line.removeprefix("data: ")


def read(client: Client, path: str, number: int | None = None, **body: Any) -> tuple[str, list[Frame]]:
    """The id of a request, and the first frames of its stream: then the connection is cut."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        found: list[Frame] = []
        for each in frames(response):
            found.append(each)
            if len(found) == number:
                break
        return response.headers["x-request-id"], found


def resume(client: Client, request_id: str, after: str | None) -> list[Frame]:
    headers = {"Last-Event-ID": after} if after else {}
    with client.stream("GET", f"/v1/requests/{request_id}/events", headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["x-request-id"] == request_id
        return list(frames(response))


def text_of(found: list[Frame]) -> str:
    """What all frames of any dialect say together."""
    return "".join(_text(orjson.loads(data)) for _, data in found if data != "[DONE]")


def _text(data: dict[str, Any]) -> str:
    for choice in data.get("choices", ()):
        return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
    if data.get("type") == "content_block_delta":
        return str(data["delta"]["text"])
    return str(data.get("text", data.get("content", "")))


@pytest.mark.parametrize("path", DIALECTS)
def test_a_stream_that_is_cut_anywhere_resumes_where_it_was(site: InProcessSite, alice: Client, path: str) -> None:
    """Running or done: text and kinds of frames are those of the stream that was not cut, and nothing is charged
    twice."""
    body = DIALECTS[path]
    _, whole = read(alice, path, **body)
    assert len({event_id for event_id, _ in whole}) == len(whole), "every frame has an id of its own"
    positions = [position_of(event_id) for event_id, _ in whole]
    assert positions == sorted(positions)
    used, _ = site.charged(site.cast.alice)
    draw = random.Random(path)
    for cut in range(CUTS // len(DIALECTS)):
        number = draw.randint(1, len(whole))
        request_id, begun = read(alice, path, number, **body, background=True)
        rest = resume(alice, request_id, begun[-1][0])
        assert text_of(begun + rest) == text_of(whole), (number, begun, rest)
        again = resume(alice, request_id, begun[-1][0])
        assert [each[0] for each in again] == [each[0] for each in rest]
        assert begun[-1][0] not in {each[0] for each in rest}
        complete = resume(alice, request_id, None)
        assert [each[0] for each in complete] == [each[0] for each in begun + rest]
        assert complete[-1][1][:6] == whole[-1][1][:6]
        assert resume(alice, request_id, complete[-1][0]) == []
        assert site.charged(site.cast.alice) == (used * (cut + 2), 0)
    assert audit().is_clean


def test_frames_of_one_event_have_ids_of_their_own() -> None:
    three = frame({"a": 1}) + frame({"b": 2}, event="x", event_id="5-0") + b"data: [DONE]\n\n"
    found = numbered(three, "5-0")
    assert [text.split(b"\n")[0] for _, text in found] == [b"id: 5-0.1", b"id: 5-0.2", b"id: 5-0"]
    assert found[1][1] == b'id: 5-0.2\nevent: x\ndata: {"b":2}\n\n'
    assert [place for place, _ in found] == sorted(place for place, _ in found)
    assert position_of("4-9") < found[0][0] < found[2][0] < position_of("5-1.1")
    assert numbered(b"", "5-0") == []


def test_a_line_of_an_event_is_one_line_for_every_reader() -> None:
    text = "a\x85b\u2028c\u2029d\x0be\nf"
    (line,) = frame({"text": text}).decode().rstrip("\n").splitlines()
    assert orjson.loads(line.removeprefix("data: ")) == {"text": text}
    raw = f'data: {{"text":"{text[:6]}"}}\n\n'.encode()  # as another server writes it
    assert Answer(200, {"content-type": "text/event-stream"}, raw).objects() == [{"text": text[:6]}]


def test_a_plain_stream_can_be_read_again_up_to_its_cut(site: InProcessSite, alice: Client) -> None:
    """A closed connection cancels; what was generated until then is there, and how it ended."""
    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()
    body = {**DIALECTS["/v1/generate"], "max_new_tokens": 200}
    request_id, begun = read(alice, "/v1/generate", 3, **body)
    wait_until(lambda: site.num_running() == 0)  # who comes before that keeps it alive
    rest = resume(alice, request_id, begun[-1][0])
    assert '"finish_reason":"cancelled"' in rest[-1][1]


def test_a_second_reader_keeps_a_plain_stream_alive(site: InProcessSite, alice: Client) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.005
    site.start_worker()
    body = {**DIALECTS["/v1/generate"], "stream": True}
    with alice.stream("POST", "/v1/generate", json=body) as first:
        request_id = first.headers["x-request-id"]
        with alice.stream("GET", f"/v1/requests/{request_id}/events") as second:
            reading = frames(second)
            next(reading)
            first.close()
            assert '"finish_reason":"length"' in list(reading)[-1][1]


def test_a_reader_whom_nobody_can_answer_takes_no_other_along(
    site: InProcessSite, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He joined once and leaves once, wherever it went wrong."""
    from inference.api.llamacpp import views

    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()

    def busy(*_: Any) -> Any:
        raise Refusal("service_unavailable", "All tokenizers are busy.", retry_after=1)

    body = {**DIALECTS["/completion"], "stream": True}
    with alice.stream("POST", "/completion", json=body) as first:
        reading = frames(first)
        next(reading)
        with monkeypatch.context() as patch:
            patch.setattr(views, "_texts", busy)
            assert alice.get(f"/v1/requests/{first.headers['x-request-id']}/events").status_code == 503
        assert '"stop_type":"limit"' in list(reading)[-1][1]


def test_a_reader_who_is_too_slow_has_gone(site: InProcessSite, alice: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from inference.transport import stream

    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()
    offer, offered = stream._Follower.offer, list[Any]()

    def late(follower: stream._Follower, event: Any) -> None:
        offer(follower, event)
        offered.append(event)
        follower.overflowed = len(offered) > 3

    monkeypatch.setattr(stream._Follower, "offer", late)
    _, found = read(alice, "/v1/generate", **{**DIALECTS["/v1/generate"], "max_new_tokens": 200})
    assert orjson.loads(found[-1][1])["code"] == "client_too_slow"
    wait_until(lambda: site.num_running() == 0)
    site.settle()
    receipt = Receipt.objects.get()
    assert receipt.status == "cancelled"
    assert receipt.completion_tokens < 200


def test_what_named_no_model_is_worded_again_by_the_one_that_answered(site: InProcessSite) -> None:
    """Another is the default by then, which this tenant may not even use."""
    from inference.catalog import registry
    from inference.models import ServedModel

    bob = site.client(site.cast.bob)
    for path, body in DIALECTS.items():
        whole = bob.post(path, json=body).json()
        links = bob.post(path, json={**body, "background": True}).json()["links"]
        wait_until(lambda links=links: bob.get(links["self"]).json().get("receipt"))
        ServedModel.objects.filter(name=MODEL).update(is_default=False)
        ServedModel.objects.filter(name=OTHER_MODEL).update(is_default=True)
        registry.forget()
        assert bob.post(path, json=body).status_code == 404
        answer = bob.get(links["self"]).json()["answer"]
        assert (said(answer), answer["model"]) == (said(whole), MODEL)
        assert text_of([*frames(bob.get(links["events"]))]) == said(whole)
        ServedModel.objects.filter(name=OTHER_MODEL).update(is_default=False)
        ServedModel.objects.filter(name=MODEL).update(is_default=True)
        registry.forget()


def test_only_the_tenant_resumes(site: InProcessSite, alice: Client) -> None:
    request_id, _ = read(alice, "/v1/generate", **DIALECTS["/v1/generate"])
    charlie = site.client(site.cast.charlie)
    for method, path in [("GET", "events"), ("POST", "cancel")]:
        assert charlie.request(method, f"/v1/requests/{request_id}/{path}").status_code == 404
    assert charlie.get(f"/v1/requests/{request_id}").status_code == 404
    for bad in ("x", "1-2-3", "1-2.", "9" * 40, "-1"):
        refused = alice.get(f"/v1/requests/{request_id}/events", headers={"Last-Event-ID": bad})
        assert (refused.status_code, refused.json()["code"]) == (400, "bad_request"), bad
    assert alice.get("/v1/requests/nothing/events").status_code == 404


def test_events_that_are_not_kept_say_so(site: InProcessSite, alice: Client) -> None:
    plain = alice.generate(cache=False).headers["x-request-id"]
    several = alice.post("/v1/completions", json={"prompt": "one", "max_tokens": 2, "n": 2}).headers["x-request-id"]
    old, _ = read(alice, "/v1/generate", **DIALECTS["/v1/generate"])
    site.settle()
    ticket_queue().client.delete(f"ticket:{old}", f"gen:{old}")
    for request_id in (plain, several, old):
        refused = alice.get(f"/v1/requests/{request_id}/events")
        assert (refused.status_code, refused.json()["code"]) == (410, "events_not_kept")


def test_the_query_may_say_where_to_resume(alice: Client) -> None:
    request_id, whole = read(alice, "/v1/generate", **DIALECTS["/v1/generate"])
    rest = alice.get(f"/v1/requests/{request_id}/events", params={"last_event_id": whole[-2][0]})
    assert rest.text.count("data: ") == 1


# Background


@pytest.mark.parametrize("path", DIALECTS)
def test_a_background_request_is_accepted_and_fetched(site: InProcessSite, alice: Client, path: str) -> None:
    whole = alice.post(path, json=DIALECTS[path]).json()
    accepted = alice.post(path, json={**DIALECTS[path], "background": True})
    assert accepted.status_code == 202, accepted.text
    links = accepted.json()["links"]
    assert accepted.headers["location"] == links["self"]
    wait_until(lambda: alice.get(links["self"]).json().get("receipt"))
    found = alice.get(links["self"]).json()
    assert found["status"] == "completed"
    assert said(found["answer"]) == said(whole)
    assert text_of([*frames(alice.get(links["events"]))]) == said(whole)
    reader = reader_of(site)
    assert "answer" not in reader.get(links["self"]).json()
    assert site.charged(site.cast.alice)[1] == 0


def said(answer: dict[str, Any]) -> str:
    for choice in answer.get("choices", ()):
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    if answer.get("type") == "message":
        return "".join(block["text"] for block in answer["content"])
    return str(answer.get("output", answer.get("content")))


def reader_of(site: InProcessSite) -> Client:
    """Alice's key that may see usage, and generate nothing."""
    from accounts.identity import issuing
    from tests.conftest import Customer

    key, text = issuing.issue(site.cast.alice.tenant, "reader", ["usage"], {}, None)
    return site.client(Customer(site.cast.alice.tenant, key, text))


def test_a_background_request_that_fails_says_why(site: InProcessSite, alice: Client) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()
    body = {**DIALECTS["/v1/chat/completions"], "max_tokens": 200, "background": True}
    links = alice.post("/v1/chat/completions", json=body).json()["links"]
    wait_until(lambda: site.num_running() == 1)
    assert alice.post(links["cancel"]).json()["status"] == "cancelling"
    wait_until(lambda: alice.get(links["self"]).json().get("receipt"))
    found = alice.get(links["self"]).json()
    assert found["status"] == "cancelled"
    assert found["answer"]["error"]["code"] == "request_cancelled"


def test_what_is_settled_while_somebody_looks_has_a_receipt(
    site: InProcessSite, alice: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not in the database yet, and is not in Redis any more."""
    from inference import settlement

    links = alice.post("/completion", json={**DIALECTS["/completion"], "background": True}).json()["links"]
    wait_until(lambda: alice.get(links["self"]).json().get("receipt"))
    site.settle()
    first, nothing = Receipt.objects.filter, Receipt.objects.none
    looks = iter([nothing])
    monkeypatch.setattr(Receipt.objects, "filter", lambda **which: next(looks, lambda: first(**which))())
    monkeypatch.setattr(settlement, "pending", lambda *_: None)
    assert alice.get(links["self"]).json()["answer"]["stop_type"] == "limit"


def test_several_answers_do_not_go_on_in_the_background(alice: Client) -> None:
    body = {"prompt": "one", "max_tokens": 2, "n": 2, "background": True}
    assert alice.post("/v1/completions", json=body).status_code == 400


def test_several_answers_are_cancelled_by_the_id_of_their_request(site: InProcessSite, alice: Client) -> None:
    site.stop_worker()
    site.speed.seconds_per_step = 0.02
    site.start_worker()
    body = {"prompt": "one", "max_tokens": 200, "n": 2, "temperature": 0, "stream": True}
    with alice.stream("POST", "/v1/completions", json=body) as response:
        reading = response.iter_lines()
        next(reading)
        request_id = response.headers["x-request-id"]
        other = site.client(site.cast.charlie)
        assert other.post(f"/v1/requests/{request_id}/cancel").status_code == 404
        assert alice.post(f"/v1/requests/{request_id}/cancel").json()["status"] == "cancelling"
        assert "request_cancelled" in "".join(reading)
    wait_until(lambda: site.num_running() == 0)
    site.settle()
    assert {receipt.status for receipt in Receipt.objects.all()} == {"cancelled"}


def test_a_plain_request_leaves_no_prompt_behind(site: InProcessSite, alice: Client, valkey_connection: Any) -> None:
    """What is kept of a stream goes with its events."""
    alice.generate("canary bird", cache=False)
    site.settle()
    for key in valkey_connection.scan_iter("ticket:*"):
        assert b"canary" not in b"".join(valkey_connection.hgetall(key).values())
    request_id, _ = read(alice, "/v1/generate", **{**DIALECTS["/v1/generate"], "prompt": "canary bird"})
    assert 0 < valkey_connection.ttl(f"ticket:{request_id}") <= 600
    assert 0 < valkey_connection.ttl(f"gen:{request_id}") <= 600
