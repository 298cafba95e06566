"""One answer as the items of a response, whole or event by event; the result is the same.

Pure. A writer is one response, on the event loop where it streams. https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from django.conf import settings
from pydantic import BaseModel

from inference.api.following import Collected, Ending
from inference.api.openai.asked import AskedChat
from inference.api.openai.replies import Tally, chat_logprobs
from inference.api.openai.response_schemas import ResponsesBody
from inference.api.openai.speech import Utterance
from inference.engine.types import SamplingParams, TokenProbs

Events = list[dict[str, Any]]
ID_PREFIX = "resp_"
STATUSES = {"stop": "completed", "length": "incomplete"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedResponse(AskedChat):
    """items: of the whole conversation, as they are listed. keeps: the tenant has it stored, and so has the request."""

    prefix: ClassVar[str] = "resp"
    kind: ClassVar[str] = "response"

    body: ResponsesBody
    items: Sequence[dict[str, Any]]
    keeps: bool

    @property
    def id(self) -> str:
        return ID_PREFIX + self.request_id

    def reply(self, answers: Sequence[Collected], tally: Tally) -> dict[str, Any]:
        """A response has one answer."""
        (collected,) = answers
        writer = OutputWriter(self)
        writer.write(collected.text, collected.probs)
        writer.end(collected.ending)
        return self.ended(writer.items, collected.ending, tally)

    def begun(self) -> dict[str, Any]:
        return self._response("in_progress", [], None)

    def ended(self, items: list[dict[str, Any]], ending: Ending, tally: Tally) -> dict[str, Any]:
        status = STATUSES[ending.finish_reason or "stop"]
        return self._response(status, items, usage_of(tally)) | {
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        }

    def failed(self, items: list[dict[str, Any]], error: dict[str, Any], *, is_cancelled: bool) -> dict[str, Any]:
        told = {"code": error["code"] or "server_error", "message": error["message"]}
        response = self._response("cancelled" if is_cancelled else "failed", items, None)
        return response | {"error": told, "store": False}

    def _response(self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body = self.body
        sampling = body.given_sampling()
        choice = body.tool_choice
        return {
            "id": self.id,
            "object": self.kind,
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.keeps,
            "temperature": sampling.get("temperature", settings.CONFIG.default_temperature),
            "text": {"format": body.text.format.told() if body.text and body.text.format else {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto",
            "tools": [tool.told() for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.get("top_p", SamplingParams().top_p),
            "truncation": body.truncation or "disabled",
            "usage": usage,
            "user": body.user,
            "metadata": body.metadata or {},
        }


def usage_of(tally: Tally) -> dict[str, Any]:
    """reasoning_tokens are counted where the answer is finished (response_views.py): only a tokenizer knows them.
    cache_write_tokens, which clients want to be there, are those that cost more: none do."""
    return {
        "input_tokens": tally.prompt_tokens,
        "input_tokens_details": {"cached_tokens": tally.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": tally.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tally.prompt_tokens + tally.completion_tokens,
    }


def thoughts_of(response: dict[str, Any]) -> str:
    return "".join(
        part["text"] for item in response["output"] if item["type"] == "reasoning" for part in item["content"]
    )


class OutputWriter:
    """Items in the order in which they are said: thoughts, then texts and calls as they come."""

    def __init__(self, asked: AskedResponse) -> None:
        self._asked = asked
        self._speech = asked.speech(0)
        self._probs: list[TokenProbs] = []
        self._open: _OpenText | _OpenCall | None = None
        self.items: list[dict[str, Any]] = []

    def write(self, text: str, probs: Sequence[TokenProbs] = ()) -> Events:
        self._probs += probs
        return self._said(self._speech.pieces(text))

    def end(self, ending: Ending) -> Events:
        """An answer without a word is an empty message. What an answer was cut in is incomplete."""
        events = self._said(self._speech.last_pieces())
        if not self.items and self._open is None:
            events += self._text("message", "")
        return events + self._close("incomplete" if ending.finish_reason == "length" else "completed")

    @property
    def so_far(self) -> list[dict[str, Any]]:
        """For a response that fails."""
        return [*self.items, *([self._open.item("incomplete")] if self._open else [])]

    def _said(self, pieces: Iterable[Utterance]) -> Events:
        events: Events = []
        for piece in pieces:
            if piece.thought:
                events += self._text("reasoning", piece.thought)
            if piece.content:
                events += self._text("message", piece.content)
            for call in piece.calls:
                events += self._call(call)
            if piece.ends_call:
                events += self._close("completed")
        return events

    def _text(self, kind: str, text: str) -> Events:
        """Of a message or a thought, which is begun where another item was open."""
        events: Events = []
        opened = self._open
        if not isinstance(opened, _OpenText) or opened.kind != kind:
            if isinstance(opened, _OpenText):
                self._probs = _those_of(text, self._probs)
            events += self._close("completed")
            self._open = opened = _OpenText(kind, self._id(kind), len(self.items))
            events += opened.begun()
        if not text:
            return events
        logprobs: list[dict[str, Any]] = []
        if kind == "message" and self._asked.body.reports_logprobs:
            logprobs = chat_logprobs(self._probs, self._asked.body.top_logprobs or 0)["content"]
            self._probs = []
        return [*events, opened.more(text, logprobs)]

    def _close(self, status: str) -> Events:
        if self._open is None:
            return []
        events = self._open.done(status)
        self.items.append(self._open.item(status))
        self._open = None
        return events

    def _call(self, call: dict[str, Any]) -> Events:
        """The beginning of a call, or more of its arguments."""
        events: Events = []
        if "id" in call:
            events += self._close("completed")
            name = call["function"]["name"]
            self._open = _OpenCall(self._id("function_call"), len(self.items), call["id"], name)
            events += self._open.begun()
        assert isinstance(self._open, _OpenCall)
        arguments = call["function"]["arguments"]
        return [*events, self._open.more(arguments)] if arguments else events

    def _id(self, kind: str) -> str:
        return f"{PREFIXES[kind]}_{self._asked.request_id}-{len(self.items)}"


def _those_of(text: str, probs: Sequence[TokenProbs]) -> list[TokenProbs]:
    """From the token on in which the text begins: those before it are of the thoughts and of their tag."""
    start = b"".join(each.piece for each in probs).rfind(text.encode())
    ends = accumulate(len(each.piece) for each in probs)
    return list(probs[sum(end <= start for end in ends) :])


PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


def _event(kind: str, /, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


class _OpenText:
    """A message or a thought that is being said: one part of text."""

    def __init__(self, kind: str, item_id: str, place: int) -> None:
        self.kind = kind
        self._words = "output_text" if kind == "message" else "reasoning_text"
        self._id, self._place = item_id, place
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begun(self) -> Events:
        empty = self.item("in_progress") | {"content": []}
        part = self._part("", [])
        return [
            _event("output_item.added", output_index=self._place, item=empty),
            _event("content_part.added", **self._at, part=part),
        ]

    def more(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        self._texts.append(text)
        self._logprobs += logprobs
        return _event(f"{self._words}.delta", **self._at, delta=text, **self._with(logprobs))

    def done(self, status: str) -> Events:
        text = "".join(self._texts)
        return [
            _event(f"{self._words}.done", **self._at, text=text, **self._with(self._logprobs)),
            _event("content_part.done", **self._at, part=self._part(text, self._logprobs)),
            _event("output_item.done", output_index=self._place, item=self.item(status)),
        ]

    def item(self, status: str) -> dict[str, Any]:
        more: dict[str, Any] = {"role": "assistant"} if self.kind == "message" else {"summary": []}
        content = [self._part("".join(self._texts), self._logprobs)]
        return {"id": self._id, "type": self.kind, "status": status, **more, "content": content}

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self._place, "content_index": 0}

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.kind != "message":
            return {"type": self._words, "text": text}
        return {"type": self._words, "text": text, "annotations": [], "logprobs": logprobs}

    def _with(self, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self.kind == "message" else {}


class _OpenCall:
    """A call of a function, whose arguments come."""

    def __init__(self, item_id: str, place: int, call_id: str, name: str) -> None:
        self._at: dict[str, Any] = {"item_id": item_id, "output_index": place}
        self._call_id, self._name = call_id, name
        self._arguments: list[str] = []

    def begun(self) -> Events:
        return [_event("output_item.added", output_index=self._at["output_index"], item=self.item("in_progress"))]

    def more(self, arguments: str) -> dict[str, Any]:
        self._arguments.append(arguments)
        return _event("function_call_arguments.delta", **self._at, delta=arguments)

    def done(self, status: str) -> Events:
        item = self.item(status)
        return [
            _event("function_call_arguments.done", **self._at, name=self._name, arguments=item["arguments"]),
            _event("output_item.done", output_index=self._at["output_index"], item=item),
        ]

    def item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._at["item_id"],
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }
