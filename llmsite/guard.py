"""The outermost ASGI wrapper: bounds on bodies and slow clients, the request id, one log line per request.

Knows bytes and clocks, no key, no model, no Django. Runs on the event loop, in front of both doors of llmsite/asgi.py.
It leaves `scope["llmsite.request_id"]`, and `scope["llmsite.log"]`: a dict whose entries end up in the log line.
HeaderDeadlineProtocol bounds what no ASGI application can see: the time and size of the headers themselves, and how
long the rest of an answer that is over waits for its reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import socket
import struct
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmsite.config import get_config
from llmsite.logs import log_request

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Callable[[Scope], list[tuple[bytes, bytes]]]

REQUEST_ID = "llmsite.request_id"
REQUEST_LOG = "llmsite.log"
ABORT = "llmsite.abort"
CLIENT_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
MAX_HEADER_BYTES = 64 * 1024
MAX_DRAINED_BYTES = 16 * 1024 * 1024
FREE_BODY_BYTES = 64 * 1024
"""Of each body: what is beyond counts towards HELD_BODIES, so that small requests pass whatever large ones do."""
HELD_BODIES = 128
"""Bodies of full size may be in memory, from their first byte to the end of their answer."""
LEAST_READ_BYTES = 32 * 1024
"""Of the rest of an answer, in the time that a send may take; else the connection is cut."""
UPLOADS = re.compile(r"POST /v1/files|PUT /v1/admin/imports/[0-9]{1,18}/content")
"""Whose bodies may be large: they are left to the view, which knows who sends them before it reads."""
OPENAI_PATHS = (
    "/v1/chat/",
    "/v1/completions",
    "/v1/models",
    "/v1/files",
    "/v1/batches",
    "/v1/responses",
    "/v1/embeddings",
    "/chat/",
)
"""Whose clients look for an error in `error`."""
ANTHROPIC_PATHS = ("/v1/messages",)
"""Whose clients look there, too, for another form."""
LLAMA_PATHS = ("/completion", "/infill", "/tokenize", "/detokenize", "/apply-template", "/lora-adapters", "/slots")
ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error"}
NO_SNIFF = (b"x-content-type-options", b"nosniff")
"""Of every answer: what a model wrote is never taken for a page."""
ID_HEADERS = (b"x-request-id", b"request-id")
"""The second is Anthropic's."""
STATUS_CLIENT_GONE = 499
"""Only ever logged: nobody is left to read a status."""

log = structlog.get_logger("llmsite.request")
_ids = random.Random()


def new_request_id() -> str:
    """A UUID of version 4. An id is no secret, so it does not cost a call into the kernel as uuid.uuid4 does."""
    return str(uuid.UUID(int=_ids.getrandbits(128), version=4))


class BodyTooLarge(Exception):
    """The declared or the streamed body is over the limit."""


class TooMuchHeld(Exception):
    """All bodies that are in memory would be more than may be."""


class BodyTooSlow(Exception):
    """The body did not arrive before its deadline."""


class Unreadable(Exception):
    """A request that cannot be understood, such as one whose query is no UTF-8."""


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


class ClientTooSlow(ConnectionError):
    """The client did not read what was sent within the time limit; its connection has been cut."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """max_body_bytes is inclusive. body_seconds bounds the whole body, send_seconds each send to a client."""

    max_body_bytes: int
    body_seconds: float
    send_seconds: float


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """What was answered here, by nobody's view. limit: what bound, and its value as a whole number; None: nothing did.

    path: empty where the headers did not come so far.
    """

    request_id: str
    path: str
    code: str
    message: str
    limit: tuple[str, int] | None = None


Noted = Callable[[TurnedAway], None]
"""Who keeps what was turned away. On the event loop, before the client is answered: it must neither block nor raise."""


def not_kept(_: TurnedAway) -> None:
    """Of an application that keeps nothing."""


@dataclass(slots=True)
class Held:
    """Bytes of bodies that are in memory, of all requests. On the event loop alone, so it needs no lock."""

    num_bytes: int = 0


@dataclass(slots=True)
class Exchange:
    """One request and its answer, as bytes."""

    scope: Scope
    outer_receive: Receive
    outer_send: Send
    bounds: Bounds
    request_id: str
    refusal_headers: Headers
    held: Held
    noted: Noted = not_kept
    num_held: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    status: int = 0
    is_complete: bool = False
    started_at: float = field(default_factory=time.perf_counter)

    async def read_body(self) -> None:
        """Raises BodyTooLarge, TooMuchHeld, BodyTooSlow or ClientGone."""
        if _content_length(self.scope) > self.bounds.max_body_bytes:
            raise BodyTooLarge
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                message = await self._next_part()
                body = message.get("body", b"")
                if message.get("more_body"):
                    body = await self._read_on(bytearray(body))
        except TimeoutError as error:
            raise BodyTooSlow from error
        if len(body) > self.bounds.max_body_bytes:
            raise BodyTooLarge
        self._hold(len(body))
        self.body = body

    async def _read_on(self, body: bytearray) -> bytes:
        while True:
            message = await self._next_part()
            body += message.get("body", b"")
            if len(body) > self.bounds.max_body_bytes:
                raise BodyTooLarge
            self._hold(len(body))
            if not message.get("more_body"):
                return bytes(body)

    def _hold(self, num_bytes: int) -> None:
        """Of bytes that came, none is counted before: declared ones would keep room for whoever never sends them."""
        more = max(0, num_bytes - FREE_BODY_BYTES) - self.num_held
        if more > 0 and self.held.num_bytes + more > HELD_BODIES * self.bounds.max_body_bytes:
            raise TooMuchHeld
        self.num_held += more
        self.held.num_bytes += more

    def let_go(self) -> None:
        self.held.num_bytes -= self.num_held
        self.num_held = 0

    async def _next_part(self) -> Message:
        message = await self.outer_receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message

    async def receive(self) -> Message:
        """The body in one piece; after that whatever the server says, which is that the client has gone."""
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self.outer_receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            known = dict(headers).get(b"x-request-id", self.request_id.encode())  # an answer of before has its own
            headers += [(name, known) for name in ID_HEADERS if (name, known) not in headers]
            if all(name.lower() != NO_SNIFF[0] for name, _ in headers):
                headers.append(NO_SNIFF)
            message = {**message, "headers": headers}
        elif not message.get("more_body"):
            self.is_complete = True
        try:
            async with asyncio.timeout(self.bounds.send_seconds):
                await self.outer_send(message)
        except TimeoutError as error:
            self.abort()
            raise ClientTooSlow from error

    def abort(self) -> None:
        """Cut the connection where the server lets us; else it closes when the application returns."""
        abort = self.scope.get(ABORT)
        if abort is not None:
            abort()

    async def refuse(
        self,
        status: int,
        code: str,
        message: str,
        *,
        limit: tuple[str, int] | None = None,
        drain: bool = False,
        **extra: Any,
    ) -> None:
        """A JSON error and the end of the connection.

        With drain the rest of the body is read and dropped before the connection closes: closing on unread bytes
        sends a reset that can overtake the answer.
        """
        self.fields["error_type"] = code
        self.noted(TurnedAway(self.request_id, self.scope["path"], code, message, limit))
        content: dict[str, Any] = {"code": code, "message": message, "request_id": self.request_id}
        if extra:
            content["extra"] = extra
        if self.scope["path"].startswith(OPENAI_PATHS):
            kind = "server_error" if status >= 500 else "invalid_request_error"
            content["error"] = {"message": message, "type": kind, "param": None, "code": code}
        elif self.scope["path"].startswith(ANTHROPIC_PATHS):
            kind = ANTHROPIC_TYPES.get(status, "invalid_request_error")
            content["type"] = "error"
            content["error"] = {"type": kind, "message": message, "details": {"error_code": code}}
        elif self.scope["path"].startswith(LLAMA_PATHS):
            kind = "server_error" if status >= 500 else "invalid_request_error"
            content["error"] = {"code": status, "message": message, "type": kind}
        body = orjson.dumps(content)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *self.refusal_headers(self.scope),
        ]
        if "retry_after" in extra:
            headers.append((b"retry-after", str(extra["retry_after"]).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        if drain and not _expects_continue(self.scope):
            await self._drain()
        await self.send({"type": "http.response.body", "body": b""})

    async def _drain(self) -> None:
        num_bytes = 0
        try:
            async with asyncio.timeout(self.bounds.body_seconds):
                while num_bytes < MAX_DRAINED_BYTES:
                    message = await self._next_part()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except (TimeoutError, ClientGone):
            return

    def write_log_line(self) -> None:
        client = self.scope.get("client")
        log_request(
            {
                "request_id": self.request_id,
                "method": self.scope["method"],
                "path": self.scope["path"],
                "status_code": self.status or STATUS_CLIENT_GONE,
                "latency_ms": round((time.perf_counter() - self.started_at) * 1000, 2),
                "client_ip": client[0] if client else "",
                **self.fields,
            }
        )


class Guard:
    """Wraps `app`: every request has an id, a bounded body, a bounded time to send it and to read the answer.

    refusal_headers: what the application adds to what is refused here. It must not block.
    """

    def __init__(
        self, app: App, bounds: Bounds, refusal_headers: Headers = lambda scope: [], noted: Noted = not_kept
    ) -> None:
        self.app = app
        self.bounds = bounds
        self.refusal_headers = refusal_headers
        self.noted = noted
        self.held = Held()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(
            scope, receive, send, self.bounds, new_request_id(), self.refusal_headers, self.held, self.noted
        )
        scope[REQUEST_ID] = exchange.request_id
        scope[REQUEST_LOG] = exchange.fields
        _note_client_id(scope, exchange.fields)
        try:
            await self._serve(exchange)
        finally:
            exchange.let_go()
            exchange.write_log_line()

    async def _serve(self, exchange: Exchange) -> None:
        try:
            if not is_upload(exchange.scope):
                await exchange.read_body()
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except BodyTooLarge:
            limit = self.bounds.max_body_bytes
            text = f"The request body is over the limit of {limit} bytes."
            bound = ("max_body_bytes", limit)
            await exchange.refuse(413, "request_too_large", text, limit=bound, drain=True, max_body_bytes=limit)
        except TooMuchHeld:
            exchange.let_go()
            text = "Too many large requests are being read; try again."
            bound = ("held_bodies", HELD_BODIES)
            await exchange.refuse(503, "service_unavailable", text, limit=bound, drain=True, retry_after=1)
        except BodyTooSlow:
            text = f"The request body did not arrive within {self.bounds.body_seconds:g} seconds."
            bound = ("body_timeout_seconds", math.ceil(self.bounds.body_seconds))
            await exchange.refuse(408, "request_timeout", text, limit=bound)
        except Unreadable as error:
            await exchange.refuse(400, "bad_request", str(error))
        except (ClientGone, ClientTooSlow) as error:
            exchange.fields["error_type"] = "client_gone" if isinstance(error, ClientGone) else "client_too_slow"
        except Exception as error:  # the process's border: views answer their own errors
            log.exception("the application failed", request_id=exchange.request_id)
            if exchange.status:
                raise
            text = "The server had an error while processing the request."
            await exchange.refuse(500, "internal_error", text, exc_type=type(error).__name__)


def is_upload(scope: Scope) -> bool:
    return UPLOADS.fullmatch(f"{scope['method']} {scope['path']}") is not None


def _content_length(scope: Scope) -> int:
    """The declared length; 0 where none, or none that is a number, is declared: then the bytes are counted."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 20 else 0
    return 0


def _expects_continue(scope: Scope) -> bool:
    return any(name == b"expect" for name, _ in scope["headers"])


def _note_client_id(scope: Scope, fields: dict[str, Any]) -> None:
    """A client's own id is worth a field of the log line, never more: ids of ours are primary keys."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and CLIENT_REQUEST_ID.fullmatch(value):
            fields["client_request_id"] = value.decode()


class HeaderDeadlineProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with a deadline and a size for headers, and a time for readers; it has none of them.

    Give it to uvicorn as `http=HeaderDeadlineProtocol`. The clock runs from the connection, or the first byte after a
    finished answer, to the end of the headers: 408 and close after it, 431 and close above MAX_HEADER_BYTES.
    What the application has sent and the kernel did not take is read in time, or the connection is cut: uvicorn's
    keep-alive would close it, and wait for the reader for ever.
    """

    header_seconds: float | None = None
    read_seconds: float | None = None
    """None takes BODY_TIMEOUT_SECONDS of the configuration, for both."""
    noted: ClassVar[Noted] = staticmethod(not_kept)
    """uvicorn makes the protocol: whoever builds the application says here who keeps what is turned away."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._num_answers = 0
        self._num_header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()
        self._num_header_bytes += len(data)
        super().data_received(data)
        if self._header_timer is not None and self._num_header_bytes > MAX_HEADER_BYTES:
            text = f"The request headers are over the limit of {MAX_HEADER_BYTES} bytes."
            self._refuse(431, "request_header_fields_too_large", text, ("max_header_bytes", MAX_HEADER_BYTES))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ABORT] = self._cut  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self._headers_came()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._num_answers += 1
        if self._read_timer is None:
            self._await_reader()

    def _await_reader(self) -> None:
        """While anything of the last answer is left, it shrinks by LEAST_READ_BYTES each time, or goes."""
        if left := self.transport.get_write_buffer_size():
            seconds = get_config().body_timeout_seconds if self.read_seconds is None else self.read_seconds
            self._read_timer = self.loop.call_later(seconds, self._look_at_reader, left, self._num_answers)

    def _look_at_reader(self, before: int, num_answers: int) -> None:
        """What is being sent is bounded by the guard; of another answer than before there is nothing to compare."""
        self._read_timer = None
        is_over = num_answers == self._num_answers and self.cycle.response_complete
        if is_over and self.transport.get_write_buffer_size() > max(0, before - LEAST_READ_BYTES):
            self._cut()
        else:
            self._await_reader()

    def _cut(self) -> None:
        """With a reset: after a close the kernel would keep what is unread, and its connection, for minutes."""
        connection = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it has gone
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _await_headers(self) -> None:
        seconds = self.header_seconds
        if seconds is None:
            seconds = get_config().body_timeout_seconds
        self._num_header_bytes = 0
        text = f"The request headers did not arrive within {seconds:g} seconds."
        limit = ("body_timeout_seconds", math.ceil(seconds))
        self._header_timer = self.loop.call_later(seconds, self._refuse, 408, "request_timeout", text, limit)

    def _headers_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _refuse(self, status: int, code: str, message: str, limit: tuple[str, int]) -> None:
        self._headers_came()
        if self.transport.is_closing():
            return
        request_id = new_request_id()
        if self._num_header_bytes:  # browsers open connections in advance: who said nothing asked nothing
            type(self).noted(TurnedAway(request_id, "", code, message, limit))
        body = orjson.dumps({"code": code, "message": message, "request_id": request_id})
        head = f"HTTP/1.1 {status} {code}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        ids = "".join(f"{name.decode()}: {request_id}\r\n" for name in ID_HEADERS)
        self.transport.write(f"{head}{ids}connection: close\r\n\r\n".encode() + body)
        self.transport.close()
