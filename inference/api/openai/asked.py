"""A request as all of its answers speak of it: the head of each object, one choice as a whole, and one in pieces.

Pure; made in the hop once a request. A writer is one choice of a stream, on the event loop.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from inference.api.following import Collected, Ending
from inference.api.openai.replies import Tally, TextLogprobs, chat_logprobs
from inference.api.openai.schemas import ChatFields, CompletionsBody
from inference.api.openai.speech import Speech, Utterance
from inference.catalog.served import Served
from inference.chat.prompt import ChatPrompt
from inference.chat.thinking import THINK, Opening, Tags, ThoughtSplitter
from inference.engine.types import TokenProbs
from inference.tools import ToolPlan

Choices = list[dict[str, Any]]


class Writer(ABC):
    """One choice, piece by piece. Each of the choices that it returns goes into a chunk of its own."""

    @abstractmethod
    def delta(self, text: str, probs: Sequence[TokenProbs]) -> Choices: ...

    @abstractmethod
    def end(self, ending: Ending) -> Choices: ...

    @abstractmethod
    def failed(self) -> dict[str, Any]:
        """The choice of a chunk that carries an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(ABC):
    """What both routes have in common."""

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    request_id: str
    served: Served
    include_usage: bool = False
    model: str
    """As it was asked for."""
    created: int = field(default_factory=lambda: int(time.time()))

    @abstractmethod
    def choice(self, index: int, collected: Collected) -> dict[str, Any]: ...

    @abstractmethod
    def writer(self, index: int) -> Writer: ...

    def reply(self, answers: Sequence[Collected], tally: Tally) -> dict[str, Any]:
        choices = [self.choice(index, collected) for index, collected in enumerate(answers)]
        return self._head(self.kind) | {"choices": choices, "usage": tally.usage(), **tally.timings()}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.include_usage else {}
        return self._head(self.chunk_kind) | {"choices": [choice], **usage}

    def usage_chunk(self, tally: Tally) -> dict[str, Any]:
        return self._head(self.chunk_kind) | {"choices": [], "usage": tally.usage(), **tally.timings()}

    def _head(self, kind: str) -> dict[str, Any]:
        """system_fingerprint tells the files that the model is served from apart: a seed holds for one of them."""
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.served.digest[:10]}",
        }


# Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedChat(Asked):
    """tags: of the model's thoughts. opening: None where the answer cannot begin within them, as under a grammar of the
    client. is_open: the prompt ends within thoughts. plan: of the request's tools."""

    prefix: ClassVar[str] = "chatcmpl"
    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    body: ChatFields
    prompt: ChatPrompt
    plan: ToolPlan
    tags: Tags = THINK
    opening: Opening | None = None
    is_open: bool = False

    def choice(self, index: int, collected: Collected) -> dict[str, Any]:
        speech = self.speech(index)
        spoken = speech.feed(collected.text) + speech.finish()
        message: dict[str, Any] = {"role": "assistant", "content": spoken.content, "refusal": None}
        if spoken.thought:
            message["reasoning_content"] = spoken.thought
        if spoken.calls:
            message["tool_calls"] = [_without_index(call) for call in spoken.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(collected.probs),
            "finish_reason": finish_reason(collected.ending, speech),
        }

    def writer(self, index: int) -> Writer:
        return ChatWriter(self, index)

    def speech(self, index: int) -> Speech:
        """Who words the same answer again gives calls the same ids."""
        splits = self.body.reasoning_format != "none"
        rng = random.Random(f"{self.request_id}.{index}")
        return Speech(
            ThoughtSplitter(self.tags, is_open=self.is_open) if splits else None,
            self.plan.stream(rng=rng, is_thinking=self.is_open and not splits),
            max_calls=1 if self.body.parallel_tool_calls is False else None,
        )

    def logprobs(self, probs: Sequence[TokenProbs]) -> dict[str, Any] | None:
        """None where none were asked for."""
        return chat_logprobs(probs, self.body.top_logprobs or 0) if self.body.reports_logprobs else None


def finish_reason(ending: Ending, speech: Speech) -> str | None:
    """An answer that was cut is not one that waits for its tools."""
    return "tool_calls" if speech.num_calls and ending.finish_reason == "stop" else ending.finish_reason


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "index"}


class ChatWriter(Writer):
    """The role first, then what is thought, said and called, then why it ended."""

    def __init__(self, asked: AskedChat, index: int) -> None:
        self._asked, self._index = asked, index
        self._speech = asked.speech(index)
        self._has_begun = False

    def delta(self, text: str, probs: Sequence[TokenProbs]) -> Choices:
        return self._spoken(self._speech.feed(text), probs)

    def end(self, ending: Ending) -> Choices:
        last = self._spoken(self._speech.finish(), ())
        return [*last, self._choice({}, finish_reason=finish_reason(ending, self._speech))]

    def failed(self) -> dict[str, Any]:
        return self._choice({"content": ""}, finish_reason="error")

    def _spoken(self, spoken: Utterance, probs: Sequence[TokenProbs]) -> Choices:
        choices = [] if self._has_begun else [self._choice({"role": "assistant", "content": ""})]
        self._has_begun = True
        delta: dict[str, Any] = {"reasoning_content": spoken.thought} if spoken.thought else {}
        if spoken.calls:
            delta["tool_calls"] = list(spoken.calls)
        if spoken.content or (probs and not delta):
            delta["content"] = spoken.content
        return [*choices, self._choice(delta, self._asked.logprobs(probs) if probs else None)] if delta else choices

    def _choice(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


# Completions


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedText(Asked):
    """A text that goes on."""

    prefix: ClassVar[str] = "cmpl"
    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    body: CompletionsBody

    def choice(self, index: int, collected: Collected) -> dict[str, Any]:
        logprobs = self.logprobs()
        return {
            "index": index,
            "text": collected.text,
            "logprobs": None if logprobs is None else logprobs.of(collected.probs),
            "finish_reason": collected.ending.finish_reason,
        }

    def writer(self, index: int) -> Writer:
        return TextWriter(self.logprobs(), index)

    def logprobs(self) -> TextLogprobs | None:
        return None if self.body.logprobs is None else TextLogprobs(self.body.logprobs)


class TextWriter(Writer):
    """Text, then why it ended."""

    def __init__(self, logprobs: TextLogprobs | None, index: int) -> None:
        self._logprobs, self._index = logprobs, index

    def delta(self, text: str, probs: Sequence[TokenProbs]) -> Choices:
        if not text and not probs:
            return []
        logprobs = self._logprobs.of(probs) if self._logprobs and probs else None
        return [{"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": None}]

    def end(self, ending: Ending) -> Choices:
        return [self._last(ending.finish_reason)]

    def failed(self) -> dict[str, Any]:
        return self._last("error")

    def _last(self, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": "", "logprobs": None, "finish_reason": finish_reason}
