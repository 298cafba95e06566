"""The guard and the protocol in front of the application: sizes, deadlines, ids, slow readers. With small bounds."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
import pytest
import uvicorn

from llmsite.guard import ABORT, REQUEST_ID, REQUEST_LOG, Bounds, Guard, HeaderDeadlineProtocol
from tests.in_process import wait_until

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


async def test_clients_of_openai_find_the_error_where_they_look() -> None:
    talk = Conversation(b"x" * 101)
    talk.scope["path"] = "/v1/chat/completions"
    error = (await talk.with_app(echo)).json["error"]
    assert (error["code"], error["type"], error["param"]) == ("request_too_large", "invalid_request_error", None)
    assert "error" not in (await Conversation(b"x" * 101).with_app(echo)).json


async def test_a_body_at_the_limit_passes() -> None:
    assert (await Conversation(b"x" * 100).with_app(echo)).status == 200


async def test_the_rest_of_a_large_body_is_read_before_the_connection_closes() -> None:
    talk = Conversation(b"x" * 101, b"y", b"z")
    await talk.with_app(echo)
    assert talk.parts == []


async def test_a_client_that_waits_to_be_asked_for_its_body_is_not_waited_for() -> None:
    talk = Conversation(hang=True, headers=[(b"content-length", b"101"), (b"expect", b"100-continue")])
    started = time.perf_counter()
    await talk.with_app(echo)
    assert talk.status == 413
    assert time.perf_counter() - started < 0.2


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


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    class Quick(HeaderDeadlineProtocol):
        header_seconds = 0.3

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        Guard(echo, Bounds(max_body_bytes=10**6, body_seconds=1.0, send_seconds=0.5)),
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
    thread.join(5)
    listener.close()


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(3)
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def read_until(connection: socket.socket, end: bytes) -> bytes:
    connection.settimeout(3)
    found = b""
    while not found.endswith(end):
        found += connection.recv(65536)
    return found


def test_headers_that_do_not_end_are_a_408(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        started = time.perf_counter()
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert 0.2 < time.perf_counter() - started < 2


def test_a_connection_that_says_nothing_is_closed(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_headers_one_byte_at_a_time_do_not_move_the_deadline(address: tuple[str, int]) -> None:
    started = time.perf_counter()
    with socket.create_connection(address) as connection, pytest.raises(OSError):
        for byte in b"POST / HTTP/1.1\r\nHost: " + b"x" * 200:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    assert time.perf_counter() - started < 2


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
