"""Several orders of one HTTP request as one stream of server-sent events, their frames interleaved as they come.

Runs on the event loop, one task for each order. The first that fails ends all with its error. For every dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial

from accounts.trail.refusals import Refusal
from inference.api.errors import to_refusal
from inference.api.following import ending_of, events_of_cached, failure
from inference.api.parts import Entrance, Parts
from inference.api.sse import KEEP_ALIVE_SECONDS, EventStream, with_keep_alive
from inference.api.streaming import RESTARTING, Frames, spoken
from inference.intake.admission import Admitted, CachedAnswer

QUEUE_SIZE = 64
"""Frames that wait for the client; behind them the followers' own queues fill up."""

FramesOf = Callable[[int, Admitted | CachedAnswer], Frames]


async def open_part_stream(
    parts: Parts,
    first: Admitted | CachedAnswer,
    frames_of: FramesOf,
    *,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    closing: Callable[[], bytes] = bytes,
) -> EventStream:
    """As streaming.open_stream: a failure before the first frame has a status. closing: what is said behind the end of
    all parts. Raises Refusal.
    """
    merged = _Merged(parts, first, frames_of)
    waiting = asyncio.ensure_future(merged.next())
    try:
        done, _ = await asyncio.wait([waiting], timeout=keep_alive_seconds)
        if done:
            waiting.result()
    except BaseException:
        waiting.cancel()
        merged.stop()
        raise
    words = frames_of(0, first)
    response = EventStream(
        with_keep_alive(_frames(merged, waiting, words, closing), keep_alive_seconds),
        abandon=merged.stop,
        last_words=partial(words.error, RESTARTING),
    )
    response.headers["x-cache"] = "hit" if isinstance(first, CachedAnswer) else "miss"
    if parts.is_clamped:
        response.headers["x-quota-clamped"] = "true"
    return response


class _Merged:
    """The frames of all parts in the order in which they come."""

    def __init__(self, parts: Parts, first: Admitted | CachedAnswer, frames_of: FramesOf) -> None:
        self._frames_of, self._route, self._parts = frames_of, parts.route, parts
        self._queue: asyncio.Queue[bytes | Refusal | None] = asyncio.Queue(QUEUE_SIZE)
        self._num_open = len(parts.orders)
        entrance = Entrance(parts, first)
        self._tasks = [asyncio.ensure_future(self._feed(number, entrance)) for number in range(self._num_open)]

    async def next(self) -> bytes | None:
        """The next frame; None after the last. Raises the Refusal of the first part that fails."""
        while self._num_open:
            item = await self._queue.get()
            if isinstance(item, Refusal):
                raise item
            if item is not None:
                return item
            self._num_open -= 1
        return None

    def stop(self) -> None:
        """Idempotent; what still runs is cancelled."""
        for task in self._tasks:
            task.cancel()
        self._parts.close_soon()

    async def _feed(self, number: int, entrance: Entrance) -> None:
        try:
            async with entrance.enter(number) as answer:
                frames = self._frames_of(number, answer)
                if isinstance(answer, CachedAnswer):
                    delta, ending, end_id = events_of_cached(answer.completion)
                    await self._queue.put(frames.delta(delta))
                    await self._queue.put(frames.end(ending, end_id))
                else:
                    await self._follow(answer.ticket.request_id, frames)
        except Exception as error:  # noqa: BLE001 - the task's border: it becomes the error that ends the stream
            await self._queue.put(to_refusal(error, method="POST", path=self._route, stage="generation"))
        else:
            await self._queue.put(None)

    async def _follow(self, request_id: str, frames: Frames) -> None:
        async for event, said in spoken(request_id, frames):
            if event.kind != "finished":
                await self._queue.put(said)
                continue
            ending = ending_of(event)
            if ending.finish_reason in (None, "cancelled"):
                raise failure(ending)
            await self._queue.put(frames.end(ending, event.id))


async def _frames(
    merged: _Merged, waiting: asyncio.Future[bytes | None], words: Frames, closing: Callable[[], bytes]
) -> AsyncGenerator[bytes]:
    try:
        said = await waiting
        while said is not None:
            yield said
            said = await merged.next()
        if last := closing():
            yield last
    except Refusal as refusal:
        yield words.error(refusal)
    finally:
        merged.stop()
