"""Two doors into one URL table, behind the guard. On the event loop.

A view that is a coroutine function comes in by ApiDoor: no middleware, no signals, no thread of its own. Everything
else, the console, static files and the operator's API, comes in by Django's handler with MIDDLEWARE. Django's handler
keeps a thread for each request until its response is closed (request_started, response.close), which is why streams
must not use it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from io import BytesIO

from asgiref.sync import iscoroutinefunction
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from django.urls import Resolver404, ResolverMatch, get_resolver

from llmsite.guard import MAX_DRAINED_BYTES, App, Receive, Scope, Send, Unreadable, is_upload

logger = logging.getLogger(__name__)

DRAIN_SECONDS = 10.0
View = Callable[..., Awaitable[HttpResponseBase]]


class ApiDoor:
    """Runs one asynchronous view per request, and cancels it when its client goes.

    A view that reads the body itself finds `request.upload`; the others have it whole.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match: ResolverMatch = scope["llmsite.match"]
        if is_upload(scope):
            await self._take_upload(match, scope, receive, send)
            return
        body = (await receive()).get("body", b"")
        try:
            request = ASGIRequest(dict(scope), BytesIO(body))
        except UnicodeDecodeError as error:
            raise Unreadable("The query of the address is not UTF-8.") from error
        request._body = body
        request.resolver_match = match
        await self._serve(match.func(request, *match.args, **match.kwargs), receive, send)

    async def _take_upload(self, match: ResolverMatch, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = ASGIRequest(dict(scope), BytesIO())
        except UnicodeDecodeError as error:
            raise Unreadable("The query of the address is not UTF-8.") from error
        request._body = b""
        request.resolver_match = match
        upload = Upload(receive)
        request.upload = upload  # type: ignore[attr-defined]
        response = await match.func(request, *match.args, **match.kwargs)
        if not await upload.drain():
            response.headers["Connection"] = "close"
        try:
            await _send_response(response, send)
        finally:
            close_response(response)

    async def _serve(self, answer: Awaitable[HttpResponseBase], receive: Receive, send: Send) -> None:
        listener = asyncio.ensure_future(_disconnect(receive))
        work = asyncio.current_task()
        assert work is not None
        listener.add_done_callback(lambda done: None if done.cancelled() else work.cancel())
        response = None
        try:
            response = await answer
            await _send_response(response, send)
        except asyncio.CancelledError:
            if not listener.done():  # the server stops: its readers are told
                await _say_last_words(response, send)
                raise
            work.uncancel()
        finally:
            listener.cancel()
            if response is not None:
                close_response(response)


class Upload:
    """A body that its view reads, piece by piece. Whoever reads bounds bytes and time."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_over = False
        self.is_broken = False
        """The client closed the connection before its body was complete."""

    async def read(self) -> bytes:
        """The next piece, b"" at the end."""
        while not self.is_over:
            message = await self._receive()
            self.is_over = not message.get("more_body")
            self.is_broken = message["type"] == "http.disconnect"
            if body := message.get("body", b""):
                return bytes(body)
        return b""

    async def drain(self) -> bool:
        """Drop the rest, within bounds; False if there is more. Closing on unread bytes sends a reset that can overtake
        the answer."""
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.is_over and num_bytes < MAX_DRAINED_BYTES:
                    num_bytes += len(await self.read())
        return self.is_over


def close_response(response: HttpResponseBase) -> None:
    """What the response holds. Its own `close` would also tell Django's receivers, none of whom knows this door."""
    for closer in response._resource_closers:  # type: ignore[attr-defined]
        try:
            closer()
        except Exception:
            logger.exception("a response could not be closed")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_response(response: HttpResponseBase, send: Send) -> None:
    headers = [(name.lower().encode("ascii"), value.encode("latin1")) for name, value in response.items()]
    if isinstance(response, StreamingHttpResponse):
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        async with aclosing(_parts(response)) as parts:
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    assert isinstance(response, HttpResponse)
    content = response.content
    headers.append((b"content-length", str(len(content)).encode()))
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _parts(response: StreamingHttpResponse) -> AsyncGenerator[bytes]:
    """Of any streaming response; an inner generator of its own is closed with this one."""
    async for part in response:
        yield part


async def _say_last_words(response: HttpResponseBase | None, send: Send) -> None:
    last_words: Callable[[], bytes] = getattr(response, "last_words", bytes)
    words = last_words()
    if words:
        await send({"type": "http.response.body", "body": words, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class Doors:
    """Resolves the path once and picks the door. `lifespan` gets the server's start and stop."""

    def __init__(self, api: App, console: App, lifespan: App) -> None:
        self.api = api
        self.console = console
        self.lifespan = lifespan
        self._matches: dict[str, ResolverMatch] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.lifespan(scope, receive, send)
            return
        match = self._resolve(scope["path"])
        if match is not None and iscoroutinefunction(match.func):
            scope["llmsite.match"] = match
            await self.api(scope, receive, send)
        else:
            await self.console(scope, receive, send)

    def _resolve(self, path: str) -> ResolverMatch | None:
        """None for an unknown path. Paths without parameters are remembered: there are as many as routes."""
        known = self._matches.get(path)
        if known is not None:
            return known
        try:
            match = get_resolver().resolve(path)
        except Resolver404:
            return None
        if not match.args and not match.kwargs:
            self._matches[path] = match
        return match


class Lifespan:
    """Runs `start` in order when the server starts and `stop` in order when it stops."""

    def __init__(
        self, start: Iterable[Callable[[], Awaitable[None]]], stop: Iterable[Callable[[], Awaitable[None]]]
    ) -> None:
        self._start = tuple(start)
        self._stop = tuple(stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        for step in self._start:
            await step()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        for step in self._stop:
            await step()
        await send({"type": "lifespan.shutdown.complete"})
