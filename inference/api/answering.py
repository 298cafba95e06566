"""One answer that is text, as one JSON object or as server-sent events: the way is the same, a dialect has the words.

`answer` runs in the hop; what waits for the engine runs on the event loop. What a dialect knows of its request when it
was admitted is `asked`, in a form of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

from django.http import HttpResponse, HttpResponseBase

from inference.api import cancelling
from inference.api.async_view import Later, Outcome, json_response
from inference.api.following import Collected, collect, ending_of_cached, events_of_cached
from inference.api.generation import GenerationView, answer_headers
from inference.api.parts import Parts, leave
from inference.api.sse import KEEP_ALIVE_SECONDS, EventStream
from inference.api.streaming import Frames, open_stream
from inference.intake.admission import Admitted, CachedAnswer


class TextView(GenerationView, ABC):
    """A dialect gives `whole` and `frames`; the other methods below them where it does more."""

    @abstractmethod
    def whole(self, asked: Any, collected: Collected, *, cached: bool) -> Any:
        """The answer as one JSON object. Pure: it is made on the event loop."""

    @abstractmethod
    def frames(self, asked: Any, answer: Admitted | CachedAnswer) -> Frames:
        """The words of its events."""

    def closing(self, asked: Any, frames: Any) -> Callable[[], Awaitable[bytes]] | None:
        """What is said behind a good end of its events."""
        return None

    def finish(self, asked: Any, content: Any) -> Any:
        """What happens with the object before the client has it. Blocking."""
        return content

    async def finish_soon(self, asked: Any, content: Any) -> Any:
        """As `finish`, on the event loop."""
        return content

    # The way

    def admit_first(self, parts: Parts, *, background: bool | None = False) -> Admitted | CachedAnswer:
        """The first of several answers, or the only one. Blocking. Raises Refusal."""
        if len(parts.orders) == 1:
            return self.admit(parts.orders[0], background=background)
        answer = parts.admit(0)
        self.note_admission(answer)
        return answer

    def answer(
        self,
        asked: Any,
        answer: Admitted | CachedAnswer,
        *,
        stream: bool | None,
        keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
    ) -> Outcome:
        """Of a request that has one answer."""
        if isinstance(answer, CachedAnswer):
            return self._stream_cached(asked, answer) if stream else self._reply_cached(asked, answer)
        if stream:
            return Later(partial(self._stream, asked, answer, keep_alive_seconds), abandon=partial(leave, answer))
        return Later(partial(self._reply, asked, answer), abandon=partial(leave, answer))

    async def _reply(self, asked: Any, admitted: Admitted) -> HttpResponse:
        self.stage = "generation"
        ticket = admitted.ticket
        with cancelling.unless_finished(ticket.request_id, is_batch=ticket.is_batch):
            collected = await collect(ticket.request_id)
        content = await self.finish_soon(asked, self.whole(asked, collected, cached=False))
        headers = answer_headers(collected.ending, cached=False, clamped=admitted.clamped)
        return json_response(content, headers=headers)

    def _reply_cached(self, asked: Any, answer: CachedAnswer) -> HttpResponse:
        ending = ending_of_cached(answer.completion)
        collected = Collected(answer.completion.output, ending)
        content = self.finish(asked, self.whole(asked, collected, cached=True))
        return json_response(content, headers=answer_headers(ending, cached=True))

    async def _stream(self, asked: Any, admitted: Admitted, keep_alive_seconds: float) -> HttpResponseBase:
        self.stage = "generation"
        frames = self.frames(asked, admitted)
        return await open_stream(
            admitted, frames, keep_alive_seconds=keep_alive_seconds, closing=self.closing(asked, frames)
        )

    def _stream_cached(self, asked: Any, answer: CachedAnswer) -> EventStream:
        words = self.frames(asked, answer)
        closing = self.closing(asked, words)

        async def frames() -> AsyncGenerator[bytes]:
            delta, ending, end_id = events_of_cached(answer.completion)
            yield words.delta(delta)
            yield words.end(ending, end_id)
            if closing is not None:
                yield await closing()

        response = EventStream(frames(), abandon=lambda: None)
        response.headers["x-cache"] = "hit"
        return response

    def note_error(self, code: str) -> None:
        """For the log line of a stream that ends with an error."""
        self.log_fields["error_type"] = code


def num_prompt_tokens(answer: Admitted | CachedAnswer) -> int:
    return answer.ticket.num_prompt_tokens if isinstance(answer, Admitted) else answer.completion.prompt_tokens
