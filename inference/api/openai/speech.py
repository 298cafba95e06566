"""The text of one answer told apart: thoughts, content, calls of tools. Whole or in pieces, the result is the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from inference.chat.thinking import Spoken, ThoughtSplitter
from inference.tools import ArgumentsDelta, CallBroken, CallEnded, CallStarted, Content, Event, ToolCallStream


@dataclass(frozen=True, slots=True)
class Utterance:
    """A piece of an answer. calls are OpenAI's deltas, one of a call at most: the first has its id and name, and each
    has some of its arguments. ends_call: the arguments of the last one are whole."""

    thought: str = ""
    content: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    ends_call: bool = False

    def __add__(self, other: Utterance) -> Utterance:
        calls = _joined(self.calls, other.calls)
        return Utterance(self.thought + other.thought, self.content + other.content, calls, other.ends_call)


def _joined(first: tuple[dict[str, Any], ...], second: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    if not (first and second and first[-1]["index"] == second[0]["index"]):
        return first + second
    head, rest = first[-1], second[0]["function"]["arguments"]
    function = {**head["function"], "arguments": head["function"]["arguments"] + rest}
    return (*first[:-1], {**head, "function": function}, *second[1:])


class Speech:
    """splitter: None leaves thoughts in the content. A call that was told before it was whole, and was cut, stays as it
    was told."""

    def __init__(self, splitter: ThoughtSplitter | None, reader: ToolCallStream, *, max_calls: int | None) -> None:
        self._splitter, self._reader, self._max_calls = splitter, reader, max_calls
        self.num_calls = 0
        """Whole ones."""

    def feed(self, text: str) -> Utterance:
        return sum(self.pieces(text), Utterance())

    def finish(self) -> Utterance:
        return sum(self.last_pieces(), Utterance())

    def pieces(self, text: str) -> list[Utterance]:
        """In the order in which they were said; each is of one kind, and of one call at most."""
        spoken = Spoken(said=text) if self._splitter is None else self._splitter.feed(text)
        return self._pieces(spoken.thought, self._reader.feed(spoken.said) if spoken.said else ())

    def last_pieces(self) -> list[Utterance]:
        """The end: what was held."""
        spoken = Spoken() if self._splitter is None else self._splitter.finish()
        events = self._reader.feed(spoken.said) if spoken.said else []
        last = self._reader.finish()
        cut = next((place for place, event in enumerate(last) if isinstance(event, CallBroken)), len(last))
        return self._pieces(spoken.thought, [*events, *last[:cut]])

    def _pieces(self, thought: str, events: Iterable[Event]) -> list[Utterance]:
        pieces = [Utterance(thought)] if thought else []
        for event in events:
            match event:
                case Content():
                    pieces.append(Utterance(content=event.text))
                case CallBroken():
                    continue  # what it was follows as content
                case _ if self._max_calls is not None and event.index >= self._max_calls:
                    continue
                case CallStarted():
                    function = {"name": event.name, "arguments": ""}
                    call = {"index": event.index, "id": event.id, "type": "function", "function": function}
                    pieces.append(Utterance(calls=(call,)))
                case ArgumentsDelta():
                    more = {"index": event.index, "function": {"arguments": event.text}}
                    pieces.append(Utterance(calls=(more,)))
                case CallEnded():
                    self.num_calls += 1
                    pieces.append(Utterance(ends_call=True))
        return pieces
