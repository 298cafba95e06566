"""The server-sent events of a response: typed, and numbered by sequence_number. On the event loop; knows no storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accounts.trail.refusals import Refusal
from inference.api.errors import OpenAIErrors
from inference.api.following import CANCELLED, Ending
from inference.api.openai.replies import Tally
from inference.api.openai.response_output import AskedResponse, Events, OutputWriter
from inference.api.sse import frame
from inference.transport.stream import StreamEvent


class ResponseFrames:
    """Frames (api/streaming.py) of one response. Its last word waits for `closing`: what is stored is told then."""

    def __init__(
        self,
        asked: AskedResponse,
        errors: OpenAIErrors,
        *,
        on_error: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._asked, self._errors, self._on_error = asked, errors, on_error
        self._writer = OutputWriter(asked)
        self._number = 0
        self.response: dict[str, Any] | None = None
        """As it ended; None until it has, and where it failed."""

    def started(self, event: StreamEvent) -> bytes:
        return self._frames(self._opening(), event.id)

    def delta(self, event: StreamEvent) -> bytes:
        return self._frames([*self._opening(), *self._writer.write(event.data["text"], event.probs())], event.id)

    def end(self, ending: Ending, event_id: str) -> bytes:
        if ending.finish_reason == "cancelled":
            return self.error(Refusal(CANCELLED[0], CANCELLED[1]), event_id)
        events = [*self._opening(), *self._writer.end(ending)]
        tally = Tally()
        tally.add(ending)
        self.response = self._asked.ended(self._writer.items, ending, tally)
        return self._frames(events, event_id)

    def closing(self, response: dict[str, Any]) -> bytes:
        """The last word: the response as it was finished."""
        return self._frames([{"type": f"response.{response['status']}", "response": response}], None)

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self._on_error(refusal.code)
        error = self._errors.error(refusal)
        is_cancelled = refusal.code == CANCELLED[0]
        response = self._asked.failed(self._writer.so_far, error, is_cancelled=is_cancelled)
        return self._frames([*self._opening(), {"type": "response.failed", "response": response}], event_id)

    def _opening(self) -> Events:
        """Once, before anything else."""
        if self._number:
            return []
        response = self._asked.begun()
        return [{"type": f"response.{word}", "response": response} for word in ("created", "in_progress")]

    def _frames(self, events: Events, event_id: str | None) -> bytes:
        """The last one has the id of what it was made from: what was said of it is said then."""
        frames = []
        for number, event in enumerate(events, 1):
            numbered = {"type": event["type"], "sequence_number": self._number, **event}
            self._number += 1
            frames.append(frame(numbered, event=event["type"], event_id=event_id if number == len(events) else None))
        return b"".join(frames)
