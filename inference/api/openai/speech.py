"""The text of one answer told apart: thoughts, content, calls of tools. Whole or in pieces, the result is the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from inference.chat.thinking import Spoken, ThoughtSplitter
from inference.tools import ArgumentsDelta, CallEnded, CallStarted, Content, Event, ToolCallStream


@dataclass(frozen=True, slots=True)
class Utterance:
    """A piece of an answer. calls are whole, in OpenAI's form, with their index."""

    thought: str = ""
    content: str = ""
    calls: tuple[dict[str, Any], ...] = ()

    def __add__(self, other: Utterance) -> Utterance:
        return Utterance(self.thought + other.thought, self.content + other.content, self.calls + other.calls)


class Speech:
    """splitter: None leaves thoughts in the content. reader: must tell whole calls alone."""

    def __init__(self, splitter: ThoughtSplitter | None, reader: ToolCallStream, *, max_calls: int | None) -> None:
        self._splitter, self._reader, self._max_calls = splitter, reader, max_calls
        self._started: dict[int, CallStarted] = {}
        self._arguments: dict[int, str] = {}
        self.num_calls = 0

    def feed(self, text: str) -> Utterance:
        spoken = Spoken(said=text) if self._splitter is None else self._splitter.feed(text)
        return Utterance(spoken.thought) + self._read(self._reader.feed(spoken.said) if spoken.said else ())

    def finish(self) -> Utterance:
        spoken = Spoken() if self._splitter is None else self._splitter.finish()
        events = self._reader.feed(spoken.said) if spoken.said else []
        return Utterance(spoken.thought) + self._read([*events, *self._reader.finish()])

    def _read(self, events: Iterable[Event]) -> Utterance:
        content, calls = "", []
        for event in events:
            match event:
                case Content():
                    content += event.text
                case CallStarted():
                    self._started[event.index] = event
                case ArgumentsDelta():
                    self._arguments[event.index] = self._arguments.get(event.index, "") + event.text
                case CallEnded() if self._max_calls is None or self.num_calls < self._max_calls:
                    calls.append(self._call(event.index))
        return Utterance(content=content, calls=tuple(calls))

    def _call(self, index: int) -> dict[str, Any]:
        started, arguments = self._started.pop(index), self._arguments.pop(index, "{}")
        self.num_calls += 1
        function = {"name": started.name, "arguments": arguments}
        return {"index": self.num_calls - 1, "id": started.id, "type": "function", "function": function}
