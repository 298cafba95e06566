"""From a ChatPrompt in JSON to the variables of a template, in the forms that Hugging Face's templates expect.

Templates differ in small things; what a template was seen to want (ChatTemplate) decides. Pure, in the rendering child.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from inference.chat.tool_text import with_calls_written, with_tools_listed
from inference.chat.user_text import Marker

Json = dict[str, Any]


def variables(prompt: Mapping[str, Any], traits: Mapping[str, Any], marker: Marker) -> tuple[Json, str]:
    """The template's variables, and the text that goes on behind what it writes: a last message to be continued."""
    messages = list(prompt["messages"])
    tail = ""
    if prompt.get("continue_final_message"):
        tail = marker.text(messages.pop()["content"] or "")
    tools = prompt.get("tools") or []
    if not traits.get("has_tool_calls", True):
        messages = with_calls_written(messages)
    if tools and not traits.get("has_tools", True):
        messages, tools = with_tools_listed(messages, tools), []
    if not traits.get("has_system", True):
        messages = fold_system(messages)
    named: Json = {
        **marker.value(prompt.get("variables") or {}),
        "messages": [_message(each, traits, marker) for each in messages],
        "tools": marker.value(tools) or None,
        "documents": None,
        "add_generation_prompt": bool(
            prompt.get("add_generation_prompt", True) or prompt.get("continue_final_message")
        ),
        "continue_final_message": False,
    }
    return named, tail


def fold_system(messages: list[Json]) -> list[Json]:
    """For templates without a system role: its text begins the next message of the user."""
    folded: list[Json] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"] or "")
        elif message["role"] == "user" and waiting:
            folded.append({**message, "content": "\n\n".join([*waiting, message["content"] or ""])})
            waiting = []
        else:
            folded.append(message)
    return [*folded, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else folded


def _message(message: Json, traits: Mapping[str, Any], marker: Marker) -> Json:
    found: Json = {"role": message["role"]}
    calls = message.get("tool_calls")
    content = message.get("content")
    if content is None and (not calls or traits.get("text_beside_calls")):
        content = ""
    if content is not None:
        content = marker.text(content)
        found["content"] = [{"type": "text", "text": content}] if traits.get("typed_content") else content
    else:
        found["content"] = None
    for name in ("reasoning_content", "name", "tool_call_id"):
        if message.get(name) is not None:
            found[name] = marker.text(message[name])
    if calls:
        found["tool_calls"] = [_call(call, traits, marker) for call in calls]
    return found


def _call(call: Json, traits: Mapping[str, Any], marker: Marker) -> Json:
    arguments = marker.value(call["arguments"])
    if traits.get("text_arguments"):
        arguments = marker.text(json.dumps(call["arguments"], ensure_ascii=False))
    found = {"type": "function", "function": {"name": marker.text(call["name"]), "arguments": arguments}}
    return found if call.get("id") is None else {**found, "id": marker.text(call["id"])}
