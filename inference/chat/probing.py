"""What a template can do, found out by rendering small conversations with it. In the registry's child alone."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from typing import Any

from inference.chat.prompt import digest_of
from inference.chat.rendering import rendered, text_of
from inference.chat.sandbox import TemplateError, compiled
from inference.chat.user_text import SpecialTokens

NO_TOKENS = SpecialTokens({})
SYSTEM, USER, ANSWER, AGAIN = "probe-of-system", "probe-of-user", "probe-of-answer", "probe-of-more"
TOOL, ARGUMENT, RESULT = "probe_of_tool", "probe-of-argument", "probe-of-result"
CALL_ID = "probe0001"
"""Nine letters and digits, which is what Mistral's templates ask for."""
PYTHON_OBJECT = repr({"word": ARGUMENT})
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "A word."}},
                "required": ["word"],
            },
        },
    }
]
_USER = {"role": "user", "content": USER}
_CALL = {"id": CALL_ID, "name": TOOL, "arguments": {"word": ARGUMENT}}
_CALLING = [
    _USER,
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "content": RESULT, "name": TOOL, "tool_call_id": CALL_ID},
]


def examine(source: str) -> dict[str, Any]:
    """The facts of a ChatTemplate. Raises TemplateError for one that cannot show what a user says."""
    compiled(source)
    typed = _content_form(source)
    found: dict[str, Any] = {"digest": digest_of(source), "typed_content": typed, "has_system": True}
    found["has_system"] = SYSTEM in _try(source, found, {"messages": [{"role": "system", "content": SYSTEM}, _USER]})
    talk = [_USER, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": AGAIN}]
    if missing := [text for text in (USER, ANSWER, AGAIN) if text not in _write(source, found, {"messages": talk})]:
        raise TemplateError("chat_template_failed", f"It leaves out what was said ({missing[0]}).")
    found["has_tools"] = TOOL in _try(source, found, {"messages": [_USER], "tools": TOOLS})
    found.update(_call_form(source, found))
    found["has_thinking"] = _has_thinking(source, found)
    return found


def _content_form(source: str) -> bool:
    """Whether content must be a list of parts: where plain text is not shown and a list is."""
    plain = _try(source, {}, {"messages": [_USER]})
    if USER in plain and "'type'" not in plain:
        return False
    if USER in _try(source, {"typed_content": True}, {"messages": [_USER]}):
        return True
    _write(source, {}, {"messages": [_USER]})  # its own error says most
    raise TemplateError("chat_template_failed", "It does not write what the user says.")


def _call_form(source: str, found: dict[str, Any]) -> dict[str, Any]:
    """The first form of a call that is written whole, and with nothing of Python's in it."""
    usual = _try(source, found, {"messages": [_USER], "tools": TOOLS}).count("None")
    for in_text, beside in product((False, True), repeat=2):
        forms = {"text_arguments": in_text, "text_beside_calls": beside}
        text = _try(source, {**found, **forms}, {"messages": _CALLING, "tools": TOOLS})
        is_whole = all(each in text for each in (USER, TOOL, ARGUMENT, RESULT))
        if is_whole and PYTHON_OBJECT not in text and text.count("None") <= usual:
            return {"has_tool_calls": True, **forms}
    return {"has_tool_calls": False}


def _has_thinking(source: str, found: dict[str, Any]) -> bool:
    texts = {text for text in _thinking_and_not(source, found) if text}
    return len(texts) > 1 or any("<think>" in text for text in texts) or "</think>" in source


def _thinking_and_not(source: str, found: dict[str, Any]) -> Iterator[str]:
    for value in (True, False):
        yield _try(source, found, {"messages": [_USER], "variables": {"enable_thinking": value}})


def _try(source: str, traits: dict[str, Any], prompt: dict[str, Any]) -> str:
    """What it writes, or nothing where it refuses or breaks."""
    try:
        return _write(source, traits, prompt)
    except TemplateError:
        return ""


def _write(source: str, traits: dict[str, Any], prompt: dict[str, Any]) -> str:
    now = datetime(2024, 7, 26, tzinfo=UTC)
    return text_of(rendered(source, prompt, traits, NO_TOKENS, now=now, bos_token="<bos>", eos_token="<eos>"))
