"""HTTP/1.1 on one kept-alive connection, as cheaply as Python allows: the load generator must not be the bottleneck.

Runs on the load generator's event loop. Knows bytes and clocks, not what is asked or why (inference/bench/load.py).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import cast

import httptools

READ_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One response. Durations run from the moment the request was written, in seconds.

    first_seconds is when the marker that was asked for had arrived (None if it never did, or none was asked for).
    """

    status: int
    body: bytes
    seconds: float
    first_seconds: float | None


def render_request(method: str, path: str, host: str, headers: dict[str, str], body: bytes) -> bytes:
    """The bytes of a request with a JSON body."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


class Connection(asyncio.Protocol):
    """One request at a time over one connection. `send` raises ConnectionError, TimeoutError or ValueError."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._lost = False
        self._waiting: asyncio.Future[Answer] | None = None
        self._marker = b""

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    @property
    def usable(self) -> bool:
        return not self._lost

    async def send(self, request: bytes, marker: bytes = b"", limit_seconds: float = READ_TIMEOUT_SECONDS) -> Answer:
        """Write the request and wait for the whole answer, limit_seconds at most."""
        if self._transport is None or self._lost:
            raise ConnectionError("the connection is closed")
        self._parser = httptools.HttpResponseParser(self)
        self._marker = marker
        self._body = bytearray()
        self._first: float | None = None
        self._waiting = asyncio.get_running_loop().create_future()
        self._started = time.perf_counter()
        self._transport.write(request)
        try:
            async with asyncio.timeout(limit_seconds):
                return await self._waiting
        finally:
            self._waiting = None

    def close(self) -> None:
        self._lost = True
        if self._transport is not None:
            self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's classes

    def data_received(self, data: bytes) -> None:
        if self._waiting is None:
            self.close()  # bytes that nobody asked for: the framing is lost
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ValueError(f"not HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._fail(ConnectionError("the server closed the connection before its answer was complete"))

    # httptools' side

    def on_body(self, body: bytes) -> None:
        self._body += body
        if self._first is None and self._marker and self._marker in self._body:
            self._first = time.perf_counter() - self._started

    def on_message_complete(self) -> None:
        seconds = time.perf_counter() - self._started
        if not self._parser.should_keep_alive():
            self.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(Answer(self._parser.get_status_code(), bytes(self._body), seconds, self._first))

    def _fail(self, error: Exception) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(error)
