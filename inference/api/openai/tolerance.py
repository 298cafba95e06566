"""Fields of messages and tools that nobody knows are left out, before their forms look at them: clients send new ones,
and send answers back with what their SDK has added. Values are left to the forms. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from inference.api.chat_schemas import (
    AssistantMessage,
    CallBody,
    CalledFunction,
    FunctionBody,
    SystemMessage,
    TextPart,
    ToolBody,
    ToolMessage,
    UserMessage,
)

FORMS: Mapping[str, type[BaseModel]] = {
    "system": SystemMessage,
    "developer": SystemMessage,
    "user": UserMessage,
    "assistant": AssistantMessage,
    "tool": ToolMessage,
}


def known_messages(value: Any) -> Any:
    """Raises PydanticCustomError for a part that is no text."""
    return [_message(each, place) for place, each in enumerate(value)] if isinstance(value, list) else value


def known_tools(value: Any) -> Any:
    return [_inner(each, ToolBody, FunctionBody) for each in value] if isinstance(value, list) else value


def _message(message: Any, place: int) -> Any:
    role = message.get("role") if isinstance(message, dict) else None
    form = FORMS.get(role) if isinstance(role, str) else None
    if form is None:
        return message
    found = _known(message, form)
    if isinstance(content := found.get("content"), list):
        found["content"] = [_part(part, number, place) for number, part in enumerate(content)]
    if isinstance(calls := found.get("tool_calls"), list):
        found["tool_calls"] = [_inner(call, CallBody, CalledFunction) for call in calls]
    return found


def _part(part: Any, number: int, place: int) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal":  # what another server's model said
        return {"type": "text", "text": part.get("refusal")}
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_part",
            "Part {number} of message {place} is of type {kind}: this server takes text alone",
            {"number": number, "place": place, "kind": kind[:40]},
        )
    return _known(part, TextPart)


def _inner(value: Any, form: type[BaseModel], function: type[BaseModel]) -> Any:
    """A tool or a call of one, and the function in it."""
    found = _known(value, form)
    if not isinstance(found, dict) or "function" not in found:
        return found
    return {**found, "function": _known(found["function"], function)}


def _known(value: Any, form: type[BaseModel]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: each for name, each in value.items() if name in form.model_fields}
