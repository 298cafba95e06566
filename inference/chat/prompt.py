"""A conversation as every dialect hands it inward, and what is known of a template. Data alone.

Whoever builds a ChatPrompt has bounded it (inference/api/chat_schemas.py does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

MAX_TEMPLATE_BYTES = 128 << 10
RESERVED_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
    }
)
"""Names of a template's world that a request must not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """What the model asked for in an earlier turn."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn. role is system, user, assistant or tool: templates write it between the signs of special tokens."""

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation that admission renders and tokenizes. Nothing in it becomes a special token."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """As OpenAI writes them: {"type": "function", "function": {...}}."""
    add_generation_prompt: bool = True
    """Ends with the beginning of the assistant's turn."""
    continue_final_message: bool = False
    """The last message is the assistant's and goes on: nothing comes after its text."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More names for the template, such as enable_thinking."""

    @property
    def num_characters(self) -> int:
        """Of what was said; calls and tools are bounded where they come in."""
        return sum(len(each.content or "") + len(each.reasoning_content or "") for each in self.messages)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A template that was checked, and what it was seen to do (inference/chat/probing.py)."""

    source: str = field(repr=False)
    digest: str
    has_system: bool
    """Shows a system message; else its text goes into the first user message."""
    has_tools: bool
    """Shows the tools of a request."""
    has_tool_calls: bool
    """Shows what the assistant called in earlier turns."""
    has_thinking: bool
    """enable_thinking changes the prompt, or it writes <think> itself."""
    typed_content: bool = False
    """Content must be a list of parts."""
    text_arguments: bool = False
    """The arguments of a call must be JSON in a string."""
    text_beside_calls: bool = False
    """A message with calls must have a content, if an empty one."""

    def facts(self) -> dict[str, Any]:
        """Everything but the source, for the registry's row."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "source"}

    @classmethod
    def of(cls, source: str, facts: Mapping[str, Any]) -> ChatTemplate | None:
        """The template with what was found out about it, or None where that was another text, or nothing good."""
        known = {item.name for item in fields(cls)} - {"source"}
        if facts.get("digest") != digest_of(source) or facts.get("error"):
            return None
        return cls(source=source, **{name: value for name, value in facts.items() if name in known})


def digest_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()
