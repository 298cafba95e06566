"""OpenAI's server-sent events: chunks, `[DONE]`, and an error in between that its clients raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accounts.trail.refusals import Refusal
from inference.api.errors import OpenAIErrors
from inference.api.following import CANCELLED, Ending
from inference.api.openai.asked import Asked
from inference.api.openai.replies import Tally
from inference.api.sse import frame
from inference.transport.stream import StreamEvent

DONE = b"data: [DONE]\n\n"


class ChunkFrames:
    """Of one choice. is_alone: nothing comes behind its end; else whoever merges several streams closes them."""

    def __init__(
        self,
        asked: Asked,
        tally: Tally,
        errors: OpenAIErrors,
        *,
        index: int = 0,
        shares_prompt: bool = False,
        is_alone: bool = True,
        on_error: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._asked, self._tally, self._errors = asked, tally, errors
        self._shares_prompt, self._is_alone, self._on_error = shares_prompt, is_alone, on_error
        self._writer = asked.writer(index)

    def started(self, event: StreamEvent) -> bytes:
        return b""

    def delta(self, event: StreamEvent) -> bytes:
        return self._frames(self._writer.delta(event.data["text"], event.probs()), event.id)

    def end(self, ending: Ending, event_id: str) -> bytes:
        if ending.finish_reason == "cancelled":
            return self.error(Refusal(CANCELLED[0], CANCELLED[1]), event_id)
        self._tally.add(ending, shares_prompt=self._shares_prompt)
        said = self._frames(self._writer.end(ending), event_id)
        return said + closing(self._asked, self._tally) if self._is_alone else said

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self._on_error(refusal.code)
        content = {**self._asked.chunk(self._writer.failed()), "error": self._errors.error(refusal)}
        return frame(content, event_id=event_id if self._is_alone else None) + DONE

    def _frames(self, choices: list[dict[str, Any]], event_id: str) -> bytes:
        """The last one has the event's id: what was said of it is said then."""
        frames = [
            frame(self._asked.chunk(choice), event_id=event_id if self._is_alone and number == len(choices) else None)
            for number, choice in enumerate(choices, 1)
        ]
        return b"".join(frames)


def closing(asked: Asked, tally: Tally) -> bytes:
    """Behind the last choice."""
    return (frame(asked.usage_chunk(tally)) if asked.include_usage else b"") + DONE
