"""The text of one answer as Anthropic's content blocks: thoughts, text, calls of tools, in their order.

A stream sends the events; a whole answer adds the same events up, so that both say the same, but of a call that was
cut: a stream has begun to tell it, and a whole answer has its text. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from inference.chat.thinking import Spoken, ThoughtSplitter
from inference.tools import ArgumentsDelta, CallBroken, CallEnded, CallStarted, Content, Event, ToolCallStream

Json = dict[str, Any]
EMPTY: dict[str, Json] = {
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
    "text": {"type": "text", "text": ""},
}


class BlockWriter:
    """Feed it the pieces of an answer's text, then finish it.

    signature: clients keep it with thoughts and send it back; here it only names the answer. max_calls: calls beyond
    are left out.
    """

    def __init__(
        self, splitter: ThoughtSplitter, reader: ToolCallStream, *, signature: str, max_calls: int | None
    ) -> None:
        self._splitter, self._reader = splitter, reader
        self._signature, self._max_calls = signature, max_calls
        self._open: str | None = None
        self._index = -1
        self.num_calls = 0

    def feed(self, text: str) -> list[Json]:
        spoken = self._splitter.feed(text)
        return self._thought(spoken) + self._read(self._reader.feed(spoken.said) if spoken.said else ())

    def finish(self) -> list[Json]:
        spoken = self._splitter.finish()
        events = self._reader.feed(spoken.said) if spoken.said else []
        last = self._reader.finish()
        cut = next((place for place, event in enumerate(last) if isinstance(event, CallBroken)), len(last))
        return self._thought(spoken) + self._read([*events, *last[:cut]]) + self._close()

    def _thought(self, spoken: Spoken) -> list[Json]:
        return self._grow("thinking", "thinking_delta", "thinking", spoken.thought) if spoken.thought else []

    def _read(self, events: Iterable[Event]) -> list[Json]:
        found: list[Json] = []
        for event in events:
            match event:
                case Content():
                    found += self._grow("text", "text_delta", "text", event.text)
                case CallBroken():
                    continue  # what it was follows as text
                case _ if self._max_calls is not None and event.index >= self._max_calls:
                    continue
                case CallStarted():
                    block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
                    found += self._begin("tool_use", block)
                case ArgumentsDelta():
                    found.append(self._delta({"type": "input_json_delta", "partial_json": event.text}))
                case CallEnded():
                    self.num_calls += 1
                    found += self._close()
        return found

    def _grow(self, kind: str, delta: str, name: str, text: str) -> list[Json]:
        opened = [] if self._open == kind else self._begin(kind, EMPTY[kind])
        return [*opened, self._delta({"type": delta, name: text})]

    def _begin(self, kind: str, block: Json) -> list[Json]:
        closed = self._close()
        self._open = kind
        self._index += 1
        return [*closed, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _delta(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[Json]:
        kind, self._open = self._open, None
        if kind is None:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": self._signature})] if kind == "thinking" else []
        return [*signed, {"type": "content_block_stop", "index": self._index}]


def blocks_of(events: Iterable[Json]) -> list[Json]:
    """What the events of a whole answer add up to. The input of a call is the JSON that the model wrote: it may have
    numbers and escapes that would not be written again."""
    blocks: list[Json] = []
    arguments = ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                blocks.append(dict(event["content_block"]))
                arguments = ""
            case "content_block_delta" if event["delta"]["type"] == "input_json_delta":
                arguments += event["delta"]["partial_json"]
            case "content_block_delta":
                _add(blocks[-1], event["delta"])
            case "content_block_stop" if arguments:
                blocks[-1]["input"], arguments = orjson.Fragment(arguments), ""
    return blocks


def _add(block: Json, delta: Json) -> None:
    match delta["type"]:
        case "signature_delta":
            block["signature"] = delta["signature"]
        case kind:
            name = kind.removesuffix("_delta")
            block[name] += delta[name]
