"""The parts beneath the views: the table of errors, the hop, frames and streams, the two doors."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import orjson
import pydantic
import pytest
from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.core.exceptions import ValidationError as ModelValidationError
from django.db import DatabaseError, DataError, IntegrityError, OperationalError
from django.http import Http404, HttpResponse, StreamingHttpResponse
from redis import exceptions as redis_errors
from rest_framework import exceptions as drf

from accounts.trail.refusals import Refusal
from inference.api import errors
from inference.api.errors import NATIVE, STATUS, error_response, to_refusal
from inference.api.following import FAILURES, Ending, failure
from inference.api.hop import MAX_PENDING_PER_THREAD, Hop
from inference.api.native.schemas import GenerateBody
from inference.api.sse import KEEP_ALIVE, EventStream, frame, with_keep_alive
from llmsite.doors import ApiDoor, Doors, Lifespan
from tests.in_process import InProcessSite, wait_until
from tests.timing import PATIENCE_SECONDS

ROOMS = [Path(__file__).parents[3] / room for room in ("accounts", "inference")]


def refusal_for(error: Exception) -> Refusal:
    return to_refusal(error, method="POST", path="/x")


# Errors


@pytest.mark.unit
def test_every_code_that_a_room_refuses_with_has_a_status() -> None:
    sources = [path.read_text() for room in ROOMS for path in room.rglob("*.py")]
    codes = {code for text in sources for code in re.findall(r'Refusal\(\s*"([a-z_]+)"', text)}
    assert len(codes) > 15
    assert codes - STATUS.keys() == set()
    assert {code for code, _, _ in FAILURES.values()} - STATUS.keys() == set()


@pytest.mark.unit
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refusal("queue_full", "full"), "queue_full"),
        (OperationalError("server closed the connection"), "service_unavailable"),
        (DatabaseError("database table is locked"), "service_unavailable"),
        (DataError("PostgreSQL text fields cannot contain NUL (0x00) bytes"), "bad_request"),
        (redis_errors.ConnectionError("refused"), "service_unavailable"),
        (redis_errors.TimeoutError("slow"), "service_unavailable"),
        (redis_errors.BusyLoadingError("loading"), "service_unavailable"),
        (redis_errors.OutOfMemoryError("OOM"), "service_unavailable"),
        (Http404(), "not_found"),
        (drf.NotFound(), "not_found"),
        (drf.ParseError(), "invalid_json"),
        (drf.ValidationError({"a": ["b"]}), "validation_error"),
        (ModelValidationError({"a": ["b"]}), "validation_error"),
        (ModelValidationError("b"), "validation_error"),
        (drf.MethodNotAllowed("PUT"), "method_not_allowed"),
        (drf.UnsupportedMediaType("text/csv"), "unsupported_media_type"),
        (drf.NotAcceptable(), "not_acceptable"),
        (drf.NotAuthenticated(), "missing_api_key"),
        (drf.PermissionDenied(), "forbidden"),
        (PermissionDenied(), "forbidden"),
        (SuspiciousOperation(), "bad_request"),
        (IntegrityError("a row of somebody"), "internal_error"),
        (redis_errors.ResponseError("a mistake of ours"), "internal_error"),
        (KeyError("a detail"), "internal_error"),
    ],
)
def test_every_kind_of_error_has_a_code(error: Exception, code: str) -> None:
    assert refusal_for(error).code == code


@pytest.mark.unit
def test_nested_errors_name_the_path_to_the_field() -> None:
    found = refusal_for(drf.ValidationError({"a": {"b": ["wrong"]}, "c": ["bad"]}))
    assert [field["field"] for field in found.extra["fields"]] == ["a.b", "c"]


@pytest.mark.unit
def test_details_of_the_unforeseen_stay_inside() -> None:
    body = NATIVE.body(refusal_for(KeyError("a detail")), "the-id")
    assert b"a detail" not in body
    assert orjson.loads(body)["extra"]["exc_type"] == "KeyError"


@pytest.mark.unit
def test_a_refusal_says_when_to_come_back_twice() -> None:
    response = error_response(NATIVE, Refusal("queue_full", "full", retry_after=1.2, limit="queue_length"), "the-id")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
    assert orjson.loads(response.content) == {
        "code": "queue_full",
        "message": "full",
        "extra": {"limit": "queue_length", "retry_after": 2},
        "request_id": "the-id",
    }


@pytest.mark.unit
def test_many_wrong_fields_are_told_up_to_a_bound() -> None:
    with pytest.raises(pydantic.ValidationError) as wrong:
        GenerateBody.model_validate_json(orjson.dumps({f"f{number}": 1 for number in range(500)}))
    assert len(refusal_for(wrong.value).extra["fields"]) == 32


@pytest.mark.unit
@pytest.mark.parametrize(("word", "found"), [(word, code) for word, (code, _, _) in FAILURES.items()])
def test_the_workers_words_are_translated(word: str, found: str) -> None:
    assert failure(Ending("error", error=word)).code == found
    assert failure(Ending("error", error="never heard of")).code == "generation_failed"


@pytest.mark.api
def test_paths_of_people_get_pages_and_paths_of_programs_get_json(site: InProcessSite) -> None:
    client = site.client()
    assert client.get("/v1/nowhere").json()["code"] == "not_found"
    assert client.get("/admin/nowhere/", follow_redirects=False).status_code in {302, 404}
    assert client.get("/static/nowhere.js").headers["content-type"].startswith("text/html")
    hostile = client.get("/openapi.json", headers={"Host": "evil.example"})
    assert (hostile.status_code, hostile.json()["code"]) == (400, "bad_request")


@pytest.mark.unit
def test_the_handlers_of_django_answer_programs_in_json(rf: Any) -> None:
    request = rf.get("/v1/x")
    assert orjson.loads(errors.server_error(request).content)["code"] == "internal_error"
    assert errors.permission_denied(request, PermissionDenied()).status_code == 403
    assert errors.server_error(rf.get("/admin/x")).headers["Content-Type"].startswith("text/html")


# The hop


@pytest.fixture
def hop() -> Any:
    found = Hop(2)
    yield found
    found.close()


def ignore(_: object) -> None:
    return


@pytest.mark.unit
async def test_work_runs_in_a_bounded_number_of_threads(hop: Hop) -> None:
    names = await asyncio.gather(
        *(hop.run(lambda: (time.sleep(0.005), threading.current_thread().name)[1], abandon=ignore) for _ in range(20))
    )
    assert 1 <= len(set(names)) <= 2
    await asyncio.sleep(0)
    assert hop.num_pending == 0


@pytest.mark.unit
async def test_what_a_cancelled_caller_would_have_got_is_abandoned(hop: Hop) -> None:
    started, go_on, abandoned = threading.Event(), threading.Event(), threading.Event()

    def work() -> str:
        started.set()
        go_on.wait(PATIENCE_SECONDS)
        return "taken"

    task = asyncio.ensure_future(hop.run(work, abandon=lambda outcome: abandoned.set() if outcome == "taken" else None))
    await asyncio.to_thread(started.wait, PATIENCE_SECONDS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(abandoned.wait, PATIENCE_SECONDS)


@pytest.mark.unit
async def test_work_that_has_not_begun_is_not_begun_for_a_caller_that_has_gone() -> None:
    hop = Hop(1)
    go_on, ran = threading.Event(), threading.Event()
    first = asyncio.ensure_future(hop.run(lambda: go_on.wait(PATIENCE_SECONDS), abandon=ignore))
    await until(lambda: hop.num_pending == 1)
    second = asyncio.ensure_future(hop.run(ran.set, abandon=ignore))
    await until(lambda: hop.num_pending == 2)
    second.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    await first
    hop.close()
    assert not ran.is_set()


@pytest.mark.unit
async def test_too_many_that_wait_are_refused() -> None:
    hop = Hop(1)
    go_on = threading.Event()
    waiting = [
        asyncio.ensure_future(hop.run(lambda: go_on.wait(PATIENCE_SECONDS), abandon=ignore))
        for _ in range(MAX_PENDING_PER_THREAD)
    ]
    await until(lambda: hop.num_pending == MAX_PENDING_PER_THREAD)
    with pytest.raises(Refusal) as refused:
        await hop.run(lambda: None, abandon=ignore)
    assert refused.value.code == "service_unavailable"
    go_on.set()
    await asyncio.gather(*waiting)
    hop.close()


@pytest.mark.unit
async def test_an_error_reaches_the_caller_and_the_thread_lives_on(hop: Hop) -> None:
    def fail() -> None:
        raise ValueError("no")

    for _ in range(4):
        with pytest.raises(ValueError, match="no"):
            await hop.run(fail, abandon=ignore)
    hop.send(fail)
    assert await hop.run(lambda: "alive", abandon=ignore) == "alive"


# Frames and streams


@pytest.mark.unit
def test_a_frame_is_one_event() -> None:
    assert frame({"a": "x\ny"}) == b'data: {"a":"x\\ny"}\n\n'
    assert frame({}, event="delta", event_id="1-0") == b"id: 1-0\nevent: delta\ndata: {}\n\n"


async def slowly(*parts: tuple[float, bytes]) -> AsyncGenerator[bytes]:
    for seconds, part in parts:
        await asyncio.sleep(seconds)
        yield part


async def until(condition: Callable[[], object]) -> None:
    """Lets the loop go on until it is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.001)


@pytest.mark.unit
async def test_silence_is_filled_with_comments() -> None:
    frames, enough = list[bytes](), asyncio.Event()

    async def silent_meanwhile() -> AsyncGenerator[bytes]:
        yield b"a"
        await enough.wait()
        yield b"b"

    async for part in with_keep_alive(silent_meanwhile(), 0.05):
        frames.append(part)
        if frames.count(KEEP_ALIVE) == 2:
            enough.set()
    assert frames == [b"a", KEEP_ALIVE, KEEP_ALIVE, b"b"]


@pytest.mark.unit
async def test_a_stream_that_is_left_early_is_abandoned_once() -> None:
    abandoned: list[int] = []
    response = EventStream(slowly((0, b"a"), (0, b"b")), abandon=lambda: abandoned.append(1))
    ended: list[int] = []
    response.on_end = lambda: ended.append(1)
    async for _ in response:
        break
    response.close()
    response.close()
    assert (abandoned, ended) == ([1], [1])


@pytest.mark.unit
async def test_a_stream_that_never_began_is_abandoned_too() -> None:
    abandoned: list[int] = []
    EventStream(slowly((0, b"a")), abandon=lambda: abandoned.append(1)).close()
    assert abandoned == [1]


@pytest.mark.unit
async def test_a_stream_that_ended_is_not_abandoned() -> None:
    response = EventStream(slowly((0, b"a")), abandon=lambda: pytest.fail("it had ended"))
    assert [part async for part in response] == [b"a"]
    response.close()


# The doors


class Line:
    """The server's side of an ASGI conversation."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self.has_body = True

    async def receive(self) -> dict[str, Any]:
        if self.has_body:
            self.has_body = False
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(dict(message))


def scope(view: Any) -> dict[str, Any]:
    class Match:
        func = staticmethod(view)
        args = ()
        kwargs: dict[str, Any] = {}

    return {"type": "http", "method": "POST", "path": "/x", "headers": [], "llmsite.match": Match}


@pytest.mark.unit
async def test_the_api_door_gives_the_view_its_body_and_sends_its_answer() -> None:
    async def view(request: Any) -> HttpResponse:
        return HttpResponse(request.body, content_type="application/json", status=201)

    line = Line()
    await ApiDoor()(scope(view), line.receive, line.send)
    assert line.sent[0]["status"] == 201
    assert dict(line.sent[0]["headers"])[b"content-length"] == b"2"
    assert line.sent[1]["body"] == b"{}"


@pytest.mark.unit
async def test_any_stream_can_be_sent() -> None:
    async def view(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse(slowly((0, b"a"), (0, b"b")))

    line = Line()
    await ApiDoor()(scope(view), line.receive, line.send)
    assert [message.get("body") for message in line.sent[1:]] == [b"a", b"b", b""]


@pytest.mark.unit
async def test_a_client_that_goes_cancels_its_view() -> None:
    begun, ended = list[str](), list[str]()

    async def view(request: Any) -> HttpResponse:
        begun.append("view")
        try:
            await asyncio.sleep(PATIENCE_SECONDS)
        finally:
            ended.append("view")
        return HttpResponse()

    line = Line()
    task = asyncio.ensure_future(ApiDoor()(scope(view), line.receive, line.send))
    await until(lambda: begun)
    line.gone.set()
    await asyncio.wait_for(task, PATIENCE_SECONDS / 2)
    assert (ended, line.sent) == (["view"], [])


@pytest.mark.unit
async def test_a_client_that_goes_cancels_its_stream() -> None:
    abandoned: list[int] = []

    async def view(request: Any) -> EventStream:
        return EventStream(slowly((0, b"a"), (PATIENCE_SECONDS, b"b")), abandon=lambda: abandoned.append(1))

    line = Line()
    task = asyncio.ensure_future(ApiDoor()(scope(view), line.receive, line.send))
    await until(lambda: any(message.get("body") == b"a" for message in line.sent))
    line.gone.set()
    await asyncio.wait_for(task, PATIENCE_SECONDS / 2)
    assert abandoned == [1]


@pytest.mark.unit
async def test_a_server_that_stops_says_so_to_its_streams() -> None:
    async def view(request: Any) -> EventStream:
        parts = slowly((0, b"a"), (PATIENCE_SECONDS, b"b"))
        return EventStream(parts, abandon=lambda: None, last_words=lambda: b"event: error\n\n")

    line = Line()
    task = asyncio.ensure_future(ApiDoor()(scope(view), line.receive, line.send))
    await until(lambda: any(message.get("body") == b"a" for message in line.sent))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert line.sent[-2]["body"] == b"event: error\n\n"
    assert line.sent[-1] == {"type": "http.response.body", "body": b""}


@pytest.mark.unit
async def test_only_coroutine_views_come_in_by_the_api_door() -> None:
    came: list[tuple[str, str]] = []

    def door(name: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            came.append((name, scope["path"]))

        return app

    doors = Doors(door("api"), door("console"), door("lifespan"))
    for path in ("/v1/generate", "/v1/generate", "/v1/requests/abc", "/v1/admin/keys", "/admin/", "/nowhere"):
        await doors({"type": "http", "path": path}, None, None)  # type: ignore[arg-type]
    assert [name for name, _ in came] == ["api", "api", "api", "console", "console", "console"]


@pytest.mark.unit
async def test_the_lifespan_runs_its_steps_in_order() -> None:
    done: list[str] = []

    def step(name: str) -> Any:
        async def run() -> None:
            done.append(name)

        return run

    async def receive() -> dict[str, Any]:
        done.append("asked")
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        done.append(message["type"])

    await Lifespan([step("a"), step("b")], [step("c")])({"type": "lifespan"}, receive, send)
    assert done == ["asked", "a", "b", "lifespan.startup.complete", "asked", "c", "lifespan.shutdown.complete"]


# The log line


@pytest.mark.api
def test_one_line_is_logged_per_request_without_prompt_or_key(
    site: InProcessSite, caplog: pytest.LogCaptureFixture
) -> None:
    client = site.client(site.cast.alice)

    def logged() -> list[Any]:
        return [record.msg for record in caplog.records if record.name == "llmsite.request"]

    with caplog.at_level("INFO", logger="llmsite.request"):
        reply = client.generate("canary words")
        client.generate(temperature=99)
        wait_until(lambda: len(logged()) == 2)  # the line is written after the answer
    lines: list[Any] = logged()
    first, second = lines
    assert first["request_id"] == reply.headers["x-request-id"]
    assert (first["method"], first["status_code"], first["route"]) == ("POST", 200, "/v1/generate")
    assert (first["model_id"], first["cached"], first["api_key_role"]) == ("fake-model", False, "standard")
    assert first["api_key_id"] == site.cast.alice.key.public_id
    assert first["client_ip"] == "127.0.0.1"
    assert first["latency_ms"] > 0
    assert (second["status_code"], second["error_type"]) == (422, "validation_error")
    assert "canary" not in str(lines)
    assert client.key not in str(lines)
