"""The events of admitted requests as server-sent events, in whatever words their dialect has for them.

Runs on the event loop. Every dialect passes its Frames; when 200 is said and what cancels is the same in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Protocol

from accounts.trail.refusals import Refusal
from inference.api import cancelling
from inference.api.following import Ending, ending_of, failure, follow
from inference.api.sse import KEEP_ALIVE_SECONDS, EventStream, numbered, with_keep_alive
from inference.intake.admission import Admitted
from inference.transport.holding import Position
from inference.transport.stream import StreamEvent

RESTARTING = Refusal("service_unavailable", "The server is restarting.", retry_after=2)


Spoken = tuple[StreamEvent, bytes]
"""An event and its frame; that of the end is worded later, as it may be a failure."""


class Frames(Protocol):
    """How a dialect words the events of one request. Nothing is sent of those that it has no words for."""

    def started(self, event: StreamEvent) -> bytes: ...

    def delta(self, event: StreamEvent) -> bytes: ...

    def end(self, ending: Ending, event_id: str) -> bytes: ...

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes: ...


async def open_stream(
    admitted: Admitted,
    frames: Frames,
    *,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    closing: Callable[[], Awaitable[bytes]] | None = None,
) -> EventStream:
    """200 and headers come with the first frame, or the first keep-alive; before that a failure has a status.
    closing: what is said behind a good end. Raises Refusal.
    """
    request_id = admitted.ticket.request_id
    events = spoken(request_id, frames, is_replay=admitted.is_replay)
    first = asyncio.ensure_future(anext(events))
    try:
        with cancelling.unless_finished(request_id):
            done, _ = await asyncio.wait([first], timeout=keep_alive_seconds)
            if done:
                _raise_failure(first.result()[0])
    except BaseException:
        first.cancel()
        raise
    response = EventStream(
        with_keep_alive(_frames(frames, first, events, admitted.after, closing), keep_alive_seconds),
        abandon=partial(cancelling.leave_soon, request_id),
        last_words=partial(frames.error, RESTARTING),
    )
    response.headers["x-cache"] = "miss"
    if admitted.clamped:
        response.headers["x-quota-clamped"] = "true"
    return response


async def spoken(request_id: str, frames: Frames, *, is_replay: bool = False) -> AsyncGenerator[Spoken]:
    """Events with what the dialect says of them. Raises Refusal as `follow`."""
    async with aclosing(follow(request_id, is_replay=is_replay)) as events:
        async for event in events:
            if event.kind == "finished":
                yield event, b""
            elif said := frames.delta(event) if event.kind == "delta" else frames.started(event):
                yield event, said


async def _frames(
    frames: Frames,
    first: asyncio.Future[Spoken],
    events: AsyncGenerator[Spoken],
    after: Position,
    closing: Callable[[], Awaitable[bytes]] | None,
) -> AsyncGenerator[bytes]:
    """Behind `after`: what comes before is worded as well, since words may depend on what was said."""
    try:
        event, said = await first
        while event.kind != "finished":
            for position, text in numbered(said, event.id):
                if position > after:
                    yield text
            event, said = await anext(events)
        ending = ending_of(event)
        failed = ending.finish_reason is None
        said = frames.error(failure(ending), event.id) if failed else frames.end(ending, event.id)
        yield b"".join(text for position, text in numbered(said, event.id) if position > after)
        if closing is not None and not failed:
            yield await closing()
    except Refusal as refusal:
        yield frames.error(refusal)
    finally:
        await events.aclose()


def _raise_failure(event: StreamEvent) -> None:
    if event.kind == "finished" and ending_of(event).finish_reason is None:
        raise failure(ending_of(event))
