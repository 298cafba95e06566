"""Anthropic's server-sent events: each under the name of its type, an error in between under `error`.

https://docs.anthropic.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accounts.trail.refusals import Refusal
from inference.api.anthropic.asked import AskedMessage, stop_of, usage, usage_of
from inference.api.errors import ANTHROPIC
from inference.api.following import CANCELLED, Ending
from inference.api.sse import frame
from inference.transport.stream import StreamEvent


class MessageFrames:
    """num_prompt_tokens: as admitted. The head is said with the first piece of the answer: a failure before that has a
    status."""

    def __init__(
        self, asked: AskedMessage, num_prompt_tokens: int, *, on_error: Callable[[str], None] = lambda code: None
    ) -> None:
        self._asked, self._num_prompt_tokens, self._on_error = asked, num_prompt_tokens, on_error
        self._writer = asked.writer()
        self._num_cached = 0
        self._has_begun = False

    def started(self, event: StreamEvent) -> bytes:
        self._num_cached = int(event.data.get("cached", 0))
        return b""

    def delta(self, event: StreamEvent) -> bytes:
        return self._frames([*self._begin(), *self._writer.feed(event.data["text"])], event.id)

    def end(self, ending: Ending, event_id: str) -> bytes:
        if ending.finish_reason == "cancelled":
            return self.error(Refusal(CANCELLED[0], CANCELLED[1]), event_id)
        rest = [*self._begin(), *self._writer.finish()]
        delta = {"type": "message_delta", "delta": stop_of(ending, self._writer), "usage": usage_of(ending)}
        return self._frames([*rest, delta, {"type": "message_stop"}], event_id)

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self._on_error(refusal.code)
        content = ANTHROPIC.content(refusal, self._asked.request_id)
        return frame(content, event="error", event_id=event_id)

    def _begin(self) -> list[dict[str, Any]]:
        if self._has_begun:
            return []
        self._has_begun = True
        message = self._asked.head(usage(self._num_prompt_tokens, self._num_cached, 0))
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    @staticmethod
    def _frames(events: Sequence[dict[str, Any]], event_id: str) -> bytes:
        """The last one has the event's id: what was said of it is said then."""
        return b"".join(
            frame(event, event=event["type"], event_id=event_id if number == len(events) else None)
            for number, event in enumerate(events, 1)
        )
