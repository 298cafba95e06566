"""llama.cpp's server-sent events: partial results with the token ids of each, and a last one without text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from accounts.trail.refusals import Refusal
from inference.api.errors import LLAMA
from inference.api.following import CANCELLED, Collected, Ending
from inference.api.llamacpp import replies
from inference.api.llamacpp.schemas import SamplingBody
from inference.api.sse import frame
from inference.transport.stream import StreamEvent


class LlamaFrames:
    """Of one answer. has_ids: events have the ids of the one stream that they come from."""

    def __init__(
        self,
        body: SamplingBody,
        *,
        model: str,
        settings: dict[str, Any],
        prompt: str,
        num_prompt_tokens: int,
        index: int = 0,
        has_ids: bool = True,
        on_error: Callable[[str], None] = lambda code: None,
    ) -> None:
        self._body, self._model, self._settings, self._prompt = body, model, settings, prompt
        self._num_prompt_tokens = num_prompt_tokens
        self._index, self._has_ids, self._on_error = index, has_ids, on_error
        self._slot_id = -1
        self._num_cached = 0
        self._num_predicted = 0
        self._has_new_line = False
        self._started_at = self._first_at = time.perf_counter()

    def started(self, event: StreamEvent) -> bytes:
        """Words where progress is wanted. A worker of before the start had a slot says nothing of one."""
        self._slot_id, self._num_cached = event.data.get("slot", -1), event.data.get("cached", 0)
        self._started_at = time.perf_counter()
        if not self._body.return_progress:
            return b""
        return self._frame(self._partial("", []) | self._progress(self._num_cached, 0.0), event.id)

    def delta(self, event: StreamEvent) -> bytes:
        text, now = event.data["text"], time.perf_counter()
        content: dict[str, Any] = {}
        if self._num_predicted == 0:
            self._first_at = now
            if self._body.return_progress:
                content = self._progress(self._num_prompt_tokens, now - self._started_at)
        self._num_predicted += event.data["n"]
        self._has_new_line |= "\n" in text
        content = self._partial(text, event.data.get("tokens", [])) | content
        if probs := event.probs():
            content["completion_probabilities"] = replies.probabilities(probs, bool(self._body.post_sampling_probs))
        if self._body.timings_per_token:
            content["timings"] = replies.timings_so_far(
                self._num_prompt_tokens,
                self._num_cached,
                self._first_at - self._started_at,
                self._num_predicted,
                now - self._first_at,
            )
        return self._frame(content, event.id)

    def end(self, ending: Ending, event_id: str) -> bytes:
        if ending.finish_reason == "cancelled":
            return self.error(Refusal(CANCELLED[0], CANCELLED[1]), event_id)
        content = replies.final(
            Collected("\n" if self._has_new_line else "", ending),
            model=self._model,
            settings=self._settings,
            with_tokens=False,
            prompt=self._prompt,
            index=self._index,
            content="",
        )
        fields = self._body.response_fields
        return self._frame(replies.selected(content, fields) if fields else content, event_id)

    def error(self, refusal: Refusal, event_id: str | None = None) -> bytes:
        self._on_error(refusal.code)
        return self._frame({"error": LLAMA.error(refusal)}, event_id)

    def _partial(self, text: str, tokens: list[int]) -> dict[str, Any]:
        return {
            "index": self._index,
            "content": text,
            "tokens": tokens,
            "stop": False,
            "id_slot": self._slot_id,
            "tokens_predicted": self._num_predicted,
            "tokens_evaluated": self._num_prompt_tokens,
        }

    def _progress(self, processed: int, seconds: float) -> dict[str, Any]:
        found = replies.progress(self._num_prompt_tokens, self._num_cached, processed, seconds)
        return {"prompt_progress": found}

    def _frame(self, content: dict[str, Any], event_id: str | None) -> bytes:
        return frame(content, event_id=event_id if self._has_ids else None)
