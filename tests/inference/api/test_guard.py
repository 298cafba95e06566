"""The guard and the protocol in front of the application: sizes, deadlines, ids, slow readers. With small bounds."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
import pytest
import uvicorn

from llmsite import guard
from llmsite.guard import ABORT, REQUEST_ID, REQUEST_LOG, Bounds, Guard, HeaderDeadlineProtocol
from tests.in_process import wait_until
from tests.timing import PATIENCE_SECONDS, Stopwatch

pytestmark = pytest.mark.unit

BOUNDS = Bounds(max_body_bytes=100, body_seconds=0.3, send_seconds=0.3)


class Conversation:
    """An ASGI server's side of one request, written down."""

    def __init__(self, *parts: bytes, headers: list[tuple[bytes, bytes]] | None = None, hang: bool = False) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "headers": headers or [],
            "client": ("192.0.2.1", 1),
        }
        self.parts = list(parts)
        self.hang = hang
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self.parts:
            body = self.parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self.parts) or self.hang}
        if self.hang:
            await asyncio.sleep(10)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(dict(message))

    async def with_app(self, app: Callable[..., Awaitable[None]], bounds: Bounds = BOUNDS) -> Conversation:
        await Guard(app, bounds)(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def json(self) -> Any:
        return orjson.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def test_the_application_gets_the_body_in_one_piece() -> None:
    talk = await Conversation(b"ab", b"cd", b"ef").with_app(echo)
    assert talk.sent[1]["body"] == b"abcdef"


async def test_every_answer_has_an_id_of_ours() -> None:
    theirs = [(b"x-request-id", b"mine")]
    talk = await Conversation(b"", headers=theirs).with_app(echo)
    assert len(talk.headers[b"x-request-id"]) == 36
    assert talk.scope[REQUEST_ID].encode() == talk.headers[b"x-request-id"]
    assert talk.scope[REQUEST_LOG]["client_request_id"] == "mine"


async def test_an_id_with_strange_characters_is_not_even_logged() -> None:
    talk = await Conversation(b"", headers=[(b"x-request-id", b'a" injected="1')]).with_app(echo)
    assert "client_request_id" not in talk.scope[REQUEST_LOG]


@pytest.mark.parametrize(
    ("parts", "headers"),
    [
        ((b"x" * 101,), []),
        ((b"x" * 60, b"x" * 60), []),
        ((b"",), [(b"content-length", b"101")]),
        ((b"x" * 101,), [(b"content-length", b"99999999999999999999999")]),
    ],
)
async def test_a_body_over_the_limit_is_a_413(parts: tuple[bytes, ...], headers: list[tuple[bytes, bytes]]) -> None:
    talk = await Conversation(*parts, headers=headers).with_app(echo)
    assert talk.status == 413
    assert talk.json["code"] == "request_too_large"
    assert talk.json["extra"] == {"max_body_bytes": 100}
    assert talk.json["request_id"].encode() == talk.headers[b"x-request-id"]
    assert talk.headers[b"connection"] == b"close"


async def test_all_bodies_together_are_bounded_and_small_ones_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HELD_BODIES", 2)
    large, bounds = b"x" * (1 << 20), Bounds(max_body_bytes=1 << 20, body_seconds=5, send_seconds=5)
    go, front = asyncio.Event(), Guard(echo, bounds)

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def asked(talk: Conversation) -> Conversation:
        await front(talk.scope, talk.receive, talk.send)
        return talk

    front.app = waits
    held = [asyncio.ensure_future(asked(Conversation(large))) for _ in range(2)]
    await asyncio.sleep(0)
    front.app = echo
    refused = await asked(Conversation(large[:90_000], large[90_000:]))
    assert (refused.status, refused.json["code"]) == (503, "service_unavailable")
    assert (refused.headers[b"retry-after"], refused.json["extra"]) == (b"1", {"retry_after": 1})
    assert (await asked(Conversation(b"x" * 65_536))).status == 200
    go.set()
    assert [(await each).status for each in held] == [200, 200]
    assert (await asked(Conversation(large[:90_000], large[90_000:]))).status == 200
    assert front.held.num_bytes == 0


async def test_clients_of_openai_find_the_error_where_they_look() -> None:
    talk = Conversation(b"x" * 101)
    talk.scope["path"] = "/v1/chat/completions"
    error = (await talk.with_app(echo)).json["error"]
    assert (error["code"], error["type"], error["param"]) == ("request_too_large", "invalid_request_error", None)
    assert "error" not in (await Conversation(b"x" * 101).with_app(echo)).json


async def test_clients_of_anthropic_and_llamacpp_find_it_in_their_form() -> None:
    talk = Conversation(b"x" * 101)
    talk.scope["path"] = "/v1/messages"
    body = (await talk.with_app(echo)).json
    assert (body["type"], body["error"]["type"]) == ("error", "request_too_large")
    assert body["request_id"].encode() == talk.headers[b"request-id"]
    talk = Conversation(b"x" * 101)
    talk.scope["path"] = "/completion"
    error = (await talk.with_app(echo)).json["error"]
    assert (error["code"], error["type"]) == (413, "invalid_request_error")


async def test_a_body_at_the_limit_passes() -> None:
    assert (await Conversation(b"x" * 100).with_app(echo)).status == 200


async def test_the_rest_of_a_large_body_is_read_before_the_connection_closes() -> None:
    talk = Conversation(b"x" * 101, b"y", b"z")
    await talk.with_app(echo)
    assert talk.parts == []


async def test_a_client_that_waits_to_be_asked_for_its_body_is_not_waited_for() -> None:
    talk = Conversation(hang=True, headers=[(b"content-length", b"101"), (b"expect", b"100-continue")])
    watch = Stopwatch()
    await talk.with_app(echo)
    assert talk.status == 413
    assert watch.seconds() < 0.2


async def test_a_body_that_does_not_come_is_a_408() -> None:
    talk = await Conversation(b"x", hang=True).with_app(echo)
    assert (talk.status, talk.json["code"]) == (408, "request_timeout")


async def test_a_client_that_goes_before_its_body_is_complete_reaches_nobody() -> None:
    reached = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal reached
        reached = True

    talk = Conversation()
    await talk.with_app(app)
    assert not reached
    assert talk.sent == []
    assert talk.scope[REQUEST_LOG]["error_type"] == "client_gone"


async def test_a_reader_that_does_not_read_is_cut() -> None:
    aborted: list[bool] = []
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            ended.append("application")

    talk = Conversation(b"")
    talk.scope[ABORT] = lambda: aborted.append(True)

    async def never(message: Any) -> None:
        await asyncio.sleep(10)

    talk.send = never  # type: ignore[method-assign]
    await talk.with_app(app)
    assert (aborted, ended) == ([True], ["application"])
    assert talk.scope[REQUEST_LOG]["error_type"] == "client_too_slow"


async def test_what_is_not_http_passes_through() -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await Guard(app, BOUNDS)({"type": "lifespan"}, None, None)  # type: ignore[arg-type]
    assert seen == ["lifespan"]


async def test_a_time_limit_of_the_application_itself_is_not_taken_for_the_clients() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise TimeoutError("of a database, say")

    with pytest.raises(TimeoutError):
        await Conversation(b"").with_app(app)


async def test_an_application_that_fails_before_it_answers_is_an_internal_error() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise TimeoutError("a secret detail")

    talk = await Conversation(b"").with_app(app)
    assert (talk.status, talk.json["code"], talk.json["extra"]) == (500, "internal_error", {"exc_type": "TimeoutError"})


# The protocol, on a real socket

LARGE = 3_000_000
"""Bytes in one piece, more than a kernel takes for a reader that does not read."""


async def answer(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/large":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % LARGE)]})
        await send({"type": "http.response.body", "body": b"x" * LARGE})
    else:
        await echo(scope, receive, send)


@pytest.fixture
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Its parameter is what a reader of an answer that is over is given."""

    class Quick(HeaderDeadlineProtocol):
        header_seconds = 0.3
        read_seconds = getattr(request, "param", 0.3)

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Guard(answer, Bounds(max_body_bytes=10**6, body_seconds=1.0, send_seconds=0.5)),
        http=Quick,
        ws="none",
        lifespan="off",
        log_config=None,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    yield listener.getsockname()
    server.should_exit = True
    thread.join(PATIENCE_SECONDS)
    listener.close()


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(PATIENCE_SECONDS)
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def read_until(connection: socket.socket, end: bytes) -> bytes:
    connection.settimeout(PATIENCE_SECONDS)
    found = b""
    while not found.endswith(end):
        found += connection.recv(65536)
    return found


@pytest.fixture
def reader(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection as over a network: the kernel holds little of what is not read."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        connection.connect(address)
        yield connection


def is_cut(connection: socket.socket) -> bool:
    """Without reading: whether the other side has gone."""
    poll = select.poll()
    poll.register(connection, select.POLLERR | select.POLLHUP)
    return bool(poll.poll(0))


@pytest.mark.parametrize("more", [b"", b"Connection: close\r\n"])
def test_an_answer_that_is_over_and_that_nobody_reads_is_cut(reader: socket.socket, more: bytes) -> None:
    reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n" + more + b"\r\n")
    watch = Stopwatch()
    wait_until(lambda: is_cut(reader))
    assert watch.seconds() < 2


@pytest.mark.parametrize("address", [1.0], indirect=True)  # the reader may lose its processor for a moment
def test_an_answer_that_is_read_slowly_comes_whole(reader: socket.socket) -> None:
    reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    started, found = time.perf_counter(), 0
    reader.settimeout(PATIENCE_SECONDS)
    while part := reader.recv(65536):
        found += len(part)
        if time.perf_counter() - started < 3.0:  # several times what one that does not read is given
            time.sleep(0.01)
    assert found > LARGE


def test_a_reader_that_asks_again_is_compared_with_its_last_answer(reader: socket.socket) -> None:
    reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    reader.settimeout(PATIENCE_SECONDS)
    found = 0
    while found < 2 * LARGE:
        found += len(reader.recv(65536))
    time.sleep(0.5)  # longer than a reader is given
    assert not is_cut(reader)


def test_headers_that_do_not_end_are_a_408(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        started, watch = time.perf_counter(), Stopwatch()
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert time.perf_counter() - started > 0.2
    assert watch.seconds() < 2


def test_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_headers_one_byte_at_a_time_do_not_move_the_deadline(address: tuple[str, int]) -> None:
    watch = Stopwatch()
    with socket.create_connection(address) as connection, pytest.raises(OSError):
        for byte in b"POST / HTTP/1.1\r\nHost: " + b"x" * 200:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    assert watch.seconds() < 2


def test_headers_that_are_too_large_are_a_431(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Large: " + b"x" * 80_000)
        assert read_all(connection).startswith(b"HTTP/1.1 431 ")


def test_a_second_request_on_the_same_connection_has_a_deadline_too(address: tuple[str, int]) -> None:
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
    with socket.create_connection(address) as connection:
        for _ in range(2):
            connection.sendall(request)
            assert b"200 OK" in read_until(connection, b"0\r\n\r\n")
        connection.sendall(b"GET /half")
        assert b"408" in read_all(connection)


def test_a_large_body_gets_its_answer_before_the_connection_closes(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
        connection.sendall(b"x" * 3_000_000)
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")
