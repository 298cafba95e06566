"""The events of admitted requests as server-sent events, in whatever words their dialect has for them.

Runs on the event loop. Every dialect passes its Frames; when 200 is said and what cancels is the same in all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Protocol

from accounts.refusals import Refusal
from inference.admission import Admitted
from inference.api import cancelling
from inference.api.following import Ending, ending_of, failure, follow
from inference.api.sse import KEEP_ALIVE_SECONDS, EventStream, with_keep_alive
from inference.stream import StreamEvent

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
    admitted: Admitted, frames: Frames, *, keep_alive_seconds: float = KEEP_ALIVE_SECONDS
) -> EventStream:
    """200 and headers come with the first frame, or the first keep-alive; before that a failure has a status.

    Raises Refusal.
    """
    request_id = admitted.ticket.request_id
    events = spoken(request_id, frames)
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
        with_keep_alive(_frames(frames, first, events), keep_alive_seconds),
        abandon=partial(cancelling.cancel_soon, request_id),
        last_words=partial(frames.error, RESTARTING),
    )
    response.headers["x-cache"] = "miss"
    if admitted.clamped:
        response.headers["x-quota-clamped"] = "true"
    return response


async def spoken(request_id: str, frames: Frames) -> AsyncGenerator[Spoken]:
    """Events with what the dialect says of them. Raises Refusal as `follow`."""
    async with aclosing(follow(request_id)) as events:
        async for event in events:
            if event.kind == "finished":
                yield event, b""
            elif said := frames.delta(event) if event.kind == "delta" else frames.started(event):
                yield event, said


async def _frames(
    frames: Frames, first: asyncio.Future[Spoken], events: AsyncGenerator[Spoken]
) -> AsyncGenerator[bytes]:
    try:
        event, said = await first
        while event.kind != "finished":
            yield said
            event, said = await anext(events)
        ending = ending_of(event)
        if ending.finish_reason is None:
            yield frames.error(failure(ending), event.id)
        else:
            yield frames.end(ending, event.id)
    except Refusal as refusal:
        yield frames.error(refusal)
    finally:
        await events.aclose()


def _raise_failure(event: StreamEvent) -> None:
    if event.kind == "finished" and ending_of(event).finish_reason is None:
        raise failure(ending_of(event))
