"""One POST with an Idempotency-Key among others with the same: it answers first, attaches to the one that does, or is
given the answer that was kept. Belongs to one view; `enter` runs in the hop, the rest on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial

import structlog
from django.conf import settings
from django.http import HttpResponse, HttpResponseBase
from redis import RedisError

from accounts.trail.refusals import Refusal
from inference.api import presence, replaying
from inference.api.async_view import Later, Outcome
from inference.api.hop import shared_hop
from inference.api.replaying import ReplayableView
from inference.api.sse import KEEP_ALIVE, EventStream
from inference.catalog import adapters
from inference.intake.idempotency import Answer, Place, State, records
from inference.transport.queue import ticket_queue

log = structlog.get_logger("llmsite.idempotency")

STANDING = frozenset({"generation_timeout", "request_cancelled", "grammar_dead_end", "invalid_grammar"})
"""Ends without an answer that may be charged: then they are the answer. Any other error is about this attempt alone."""
KEPT_HEADERS = (
    "content-type",
    "location",
    "x-cache",
    "x-quota-clamped",
    "server-timing",
    "x-usage-",
    "retry-after",
    "x-should-retry",
)
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.02, 0.25
REPLAYED = "idempotent-replayed"


class Repeating:
    """view: the one that was asked. answer: what it does where it is the first."""

    def __init__(self, view: ReplayableView, place: Place, answer: Callable[[], Outcome]) -> None:
        self.place = place
        self._view, self._answer = view, answer
        self._request_id = view.request_id

    def enter(self) -> Outcome:
        """Blocking. Raises Refusal, which leaves the key free where nothing was charged."""
        claim = records().claim(self.place, self._view.request_id, presence.web_id())
        match claim.state:
            case State.FIRST:
                return self._be_first()
            case State.RUNNING:
                return self._attach(claim.request_id)
            case State.WAITING:
                return Later(self._wait, abandon=lambda: None)
            case State.LOST:
                raise _lost(claim.request_id)
        assert claim.answer is not None and self._view.principal is not None
        if claim.answer.model:  # it may be another key of the tenant, or have lost the model since
            adapters.resolve_model(claim.answer.model, self._view.principal)
        return _given(claim.answer, claim.request_id)

    # The first

    def _be_first(self) -> Outcome:
        try:
            outcome = self._answer()
        except BaseException:
            records().release(self.place, self._request_id)
            raise
        if isinstance(outcome, Later):
            return Later(partial(self._run_first, outcome.run), abandon=partial(self._abandoned, outcome.abandon))
        if isinstance(outcome, EventStream):
            release = partial(records().release, self.place, self._request_id)
            return Later(partial(self._send_first, outcome), abandon=release)
        self._file(outcome, self._view)
        return outcome

    def _abandoned(self, abandon: Callable[[], object]) -> None:
        abandon()
        if not self._view.is_followable:
            records().lose(self.place, self._request_id)

    async def _run_first(self, run: Callable[[], Awaitable[HttpResponseBase]]) -> HttpResponseBase:
        """Several answers hang on this process: they are made to their end, whoever goes."""
        if self._view.is_followable:
            return await self._run(run, self._view)
        return await asyncio.shield(asyncio.ensure_future(self._run(run, self._view)))

    async def _send_first(self, stream: EventStream) -> HttpResponseBase:
        """Of the completion cache: no ticket is there to word it again from, so it is filed whoever goes."""
        return self._to_the_end(stream, self._view)

    # Those behind it

    def _attach(self, request_id: str) -> Outcome:
        question = ticket_queue().question(request_id)
        if question is None:  # of another version, or gone this moment
            raise _lost(request_id)
        self._request_id = request_id
        view, again = replaying.replay(self._view, question)

        async def run() -> HttpResponseBase:
            response = await self._run(again.run, view)
            response.headers[REPLAYED] = "true"
            return response

        return Later(run, abandon=again.abandon)

    async def _wait(self) -> HttpResponseBase:
        """Until the first has a ticket or an answer, or was refused: then this one may be the first."""
        loop, pause = asyncio.get_running_loop(), FIRST_WAIT_SECONDS
        give_up_at = loop.time() + settings.CONFIG.generation_timeout_seconds
        while loop.time() < give_up_at:
            await asyncio.sleep(pause)
            pause = min(LONGEST_WAIT_SECONDS, pause * 2)
            outcome = await shared_hop().run(self.enter, abandon=_abandon)
            if not isinstance(outcome, Later):
                return outcome
            if outcome.run != self._wait:
                return await outcome.run()
        raise Refusal("service_unavailable", "The first request of this Idempotency-Key has no answer.", retry_after=2)

    # Whoever words the answer files it

    async def _run(self, run: Callable[[], Awaitable[HttpResponseBase]], view: ReplayableView) -> HttpResponseBase:
        try:
            response = await run()
        except Exception as error:  # noqa: BLE001 - told by the view, after the key is free again
            response = view.refused(error)
        if isinstance(response, EventStream) and not view.is_followable:
            return self._to_the_end(response, view)
        if isinstance(response, EventStream):
            response.frames = self._overheard(response.frames, response, view)
        else:
            await shared_hop().run(partial(self._file, response, view), abandon=lambda _: None)
        return response

    def _to_the_end(self, response: EventStream, view: ReplayableView) -> EventStream:
        response.frames = made_to_the_end(self._overheard(response.frames, response, view))
        response.abandon = lambda: None
        return response

    async def _overheard(
        self, frames: AsyncGenerator[bytes], response: EventStream, view: ReplayableView
    ) -> AsyncGenerator[bytes]:
        """The stream as it is; what it said is filed before it ends."""
        said: list[bytes] = []
        async with aclosing(frames):
            async for part in frames:
                if part != KEEP_ALIVE:
                    said.append(part)
                yield part
        whole = HttpResponse(b"".join(said), headers=dict(response.items()))
        await shared_hop().run(partial(self._file, whole, view), abandon=lambda _: None)

    def _file(self, response: HttpResponseBase, view: ReplayableView) -> None:
        """Blocking. An answer that cannot be kept now is worded again from its events when somebody asks."""
        assert isinstance(response, HttpResponse)
        code = view.log_fields.get("error_type")
        try:
            has_failed = code is not None and code not in STANDING
            if code is not None and view.is_followable:
                has_failed = records().release(self.place, self._request_id) or has_failed
            elif has_failed:  # of several answers some may be charged, and nobody can word them from their events
                records().lose(self.place, self._request_id)
            if has_failed:
                return
            model = view.model_asked or str(view.log_fields.get("model_id", ""))
            answer = Answer(response.status_code, _kept_headers(response), response.content, model)
            records().keep(self.place, self._request_id, answer)
        except RedisError as error:
            log.warning("the answer to an idempotency key is not kept", error=str(error))


def _lost(request_id: str) -> Refusal:
    return Refusal(
        "idempotent_answer_lost",
        "The answer to this Idempotency-Key is not kept, and it may have been charged. Use a new key.",
        request_id=request_id,
    )


def _kept_headers(response: HttpResponseBase) -> dict[str, str]:
    return {name: value for name, value in response.items() if name.lower().startswith(KEPT_HEADERS)}


def _given(answer: Answer, request_id: str) -> HttpResponseBase:
    """What was answered before."""
    headers = {**answer.headers, REPLAYED: "true", "x-request-id": request_id}
    content_type = headers.pop("Content-Type", None)
    if content_type == "text/event-stream":

        async def frames() -> AsyncGenerator[bytes]:
            yield answer.body

        response: HttpResponseBase = EventStream(frames(), abandon=lambda: None)
        for name, value in headers.items():
            response.headers[name] = value
        return response
    return HttpResponse(answer.body, status=answer.status, content_type=content_type, headers=headers)


def made_to_the_end(frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """As they come; from now on they are made to their end, also when nobody reads them, or ever did."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async with aclosing(frames):
                async for part in frames:
                    queue.put_nowait(part)
        finally:
            queue.put_nowait(None)

    task = asyncio.ensure_future(pump())
    _pumps.add(task)
    task.add_done_callback(_pumps.discard)
    return _read(queue)


async def _read(queue: asyncio.Queue[bytes | None]) -> AsyncGenerator[bytes]:
    while (part := await queue.get()) is not None:
        yield part


_pumps: set[asyncio.Task[None]] = set()
"""Held here, or the loop might forget them."""


def _abandon(outcome: Outcome) -> None:
    if isinstance(outcome, Later):
        outcome.abandon()
