"""Server-sent events: frames, keep-alive comments, and the response that ends what nobody listens to any more.

Runs on the event loop; knows bytes, no dialect. https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import orjson
from django.http import StreamingHttpResponse

from inference.transport.holding import Position

KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_SECONDS = 10.0
LINE_BREAKS = tuple((break_.encode(), b"\\u%04x" % ord(break_)) for break_ in "\x85\u2028\u2029")
"""Of Unicode, which JSON leaves as they are and SSE takes for text; some readers of lines split events at them."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def frame(data: Any, *, event: str | None = None, event_id: str | None = None) -> bytes:
    """One event. JSON has no raw line breaks, so one data line is enough."""
    head = b""
    if event_id:
        head += b"id: " + event_id.encode() + b"\n"
    if event:
        head += b"event: " + event.encode() + b"\n"
    body = orjson.dumps(data)
    for line_break, spelled in LINE_BREAKS:
        if line_break in body:
            body = body.replace(line_break, spelled)
    return head + b"data: " + body + b"\n\n"


def numbered(said: bytes, event_id: str) -> list[tuple[Position, bytes]]:
    """What a dialect said of one event, frame by frame, each with an id behind which a reader may resume.

    The last one has the event's own, those before it `<id>.1`, `<id>.2`, ...
    """
    frames = said.split(b"\n\n")[:-1]  # JSON has no raw line breaks
    if len(frames) == 1 and said.startswith(b"id: " + event_id.encode() + b"\n"):
        return [(position_of(event_id), said)]
    found = []
    for number, text in enumerate(frames, 1):
        frame_id = event_id if number == len(frames) else f"{event_id}.{number}"
        rest = text.partition(b"\n")[2] if text.startswith(b"id: ") else text
        found.append((position_of(frame_id), b"id: " + frame_id.encode() + b"\n" + rest + b"\n\n"))
    return found


def position_of(frame_id: str) -> Position:
    """Behind the whole event, or behind one of its frames. Raises ValueError."""
    event_id, _, frame_number = frame_id.partition(".")
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0), int(frame_number) if frame_number else math.inf


async def with_keep_alive(frames: AsyncGenerator[bytes], seconds: float) -> AsyncGenerator[bytes]:
    """`frames`, and a comment whenever none came for `seconds`: it finds dead peers and keeps proxies quiet."""
    pending: asyncio.Future[bytes] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(frames))
            while not pending.done():
                await asyncio.wait([pending], timeout=seconds)
                if not pending.done():
                    yield KEEP_ALIVE
            try:
                yield pending.result()
            except StopAsyncIteration:
                return
    finally:
        if pending is not None:
            pending.cancel()


class EventStream(StreamingHttpResponse):
    """A stream of frames. `abandon` is called once if it ends before its frames do, from the event loop's thread.

    last_words says what a client reads when the server itself stops in the middle.
    """

    on_end: Callable[[], None] | None = None

    def __init__(
        self, frames: AsyncGenerator[bytes], *, abandon: Callable[[], None], last_words: Callable[[], bytes] = bytes
    ) -> None:
        self.frames = frames
        self.last_words = last_words
        self.is_finished = False
        self.abandon = abandon
        self.parts = self._watched()
        super().__init__(self.parts, content_type="text/event-stream", headers=HEADERS)
        self._resource_closers.append(self._end)  # type: ignore[attr-defined]

    async def _watched(self) -> AsyncGenerator[bytes]:
        async with aclosing(self.frames) as frames:
            async for part in frames:
                yield part
        self.is_finished = True

    def _end(self) -> None:
        """Called by whoever closes the response, also when it never got to the first frame."""
        if not self.is_finished:
            self.is_finished = True
            self.abandon()
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()
