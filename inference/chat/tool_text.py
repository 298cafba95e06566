"""Tools as plain text, for templates that show none: listed in the system's message, called and answered between tags.

The form is that of Hermes 2 Pro (https://huggingface.co/NousResearch/Hermes-2-Pro-Mistral-7B), which many models know
and which inference/tools reads. Pure, in the rendering child.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

_BEFORE = "You can call the functions that are described here, one on each line, in JSON:\n<tools>\n"
_BEHIND = (
    "\n</tools>\nWhere a function helps, answer with a call of it and nothing else. A call is JSON between tags:\n"
    '<tool_call>\n{"name": "name of the function", "arguments": {"name of a parameter": "its value"}}\n</tool_call>'
)


def with_tools_listed(messages: Sequence[Json], tools: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The tools as the end of the system's first message, or as one of their own."""
    text = _BEFORE + "\n".join(_json(tool) for tool in tools) + _BEHIND
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": "\n\n".join(filter(None, [first.get("content"), text]))}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def with_calls_written(messages: Sequence[Json]) -> list[Json]:
    """Calls as the assistant's text, and what tools answered as the user's, in one message with what the user
    says next: many templates want the two to take turns."""
    written: list[Json] = []
    is_answering = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            message = {"role": "user", "content": text}
        if is_answering and message["role"] == "user":
            between = "\n" if is_result else "\n\n"
            written[-1]["content"] += between + (message["content"] or "")
        else:
            written.append(_without_calls(message) if message.get("tool_calls") else message)
        is_answering = is_result
    return written


def _without_calls(message: Json) -> Json:
    calls = [_json({"name": call["name"], "arguments": call["arguments"]}) for call in message["tool_calls"]]
    texts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {**message, "tool_calls": [], "content": "\n".join(filter(None, [message.get("content"), *texts]))}


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
