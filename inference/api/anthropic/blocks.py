"""Turns of a conversation as Anthropic writes them, in blocks, and what they are to a chat template. Pure.

Fields that nobody knows are ignored, blocks that cannot be shown to a model are refused. Tags in parentheses tell forms
apart; they are no part of a field's path (errors.dotted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from inference.api.chat_schemas import (
    MAX_CONTENT_CHARACTERS,
    MAX_MESSAGES,
    MAX_PARTS,
    CalledName,
    CallId,
    Content,
    SaidObject,
)
from inference.api.errors import wrong_field
from inference.chat.prompt import Message, ToolCall

LENIENT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)
Opaque = Annotated[str, Field(max_length=MAX_CONTENT_CHARACTERS)]


def _form(value: Any) -> str:
    """A content is a text, or blocks."""
    return "(text)" if isinstance(value, str) else "(blocks)"


def kind_of(value: Any) -> str | None:
    """The tag of a block, or of whatever says its type."""
    return f"({value['type']})" if isinstance(value, dict) and isinstance(value.get("type"), str) else None


def _role(value: Any) -> str | None:
    return f"({value['role']})" if isinstance(value, dict) and isinstance(value.get("role"), str) else None


def one_of(*kinds: str, otherwise: str, kind_of: Callable[[Any], str | None] = kind_of) -> BeforeValidator:
    """Refuses other kinds in words of ours, at the value's own place."""
    tags = frozenset(f"({kind})" for kind in kinds)

    def check(value: Any) -> Any:
        if kind_of(value) not in tags:
            raise PydanticCustomError("unsupported", otherwise)
        return value

    return BeforeValidator(check)


def _blocks(*kinds: str) -> BeforeValidator:
    words = " or ".join(kinds)
    return one_of(
        *kinds, otherwise=f"Value must be a block of type {words}: images, documents and the like are not supported"
    )


class TextBlock(BaseModel):
    model_config = LENIENT

    type: Literal["text"]
    text: Content


class ThinkingBlock(BaseModel):
    """What the model thought in an earlier turn. Its signature is not looked at: a template shows thoughts or not."""

    model_config = LENIENT

    type: Literal["thinking"]
    thinking: Content
    signature: Opaque | None = None


class RedactedThinkingBlock(BaseModel):
    """Taken and dropped: no model here writes them."""

    model_config = LENIENT

    type: Literal["redacted_thinking"]
    data: Opaque = ""


class ToolUseBlock(BaseModel):
    model_config = LENIENT

    type: Literal["tool_use"]
    id: CallId
    name: CalledName
    input: SaidObject


OnlyText = Annotated[TextBlock, _blocks("text")]
Texts = Annotated[
    Annotated[Content, Tag("(text)")]
    | Annotated[Annotated[list[OnlyText], Field(max_length=MAX_PARTS)], Tag("(blocks)")],
    Discriminator(_form),
]


class ToolResultBlock(BaseModel):
    """What a tool answered."""

    model_config = LENIENT

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """Templates have no word for a failure: it is said."""
        text = text_of(self.content or "")
        return f"Error: {text}" if self.is_error else text


UserBlock = Annotated[
    Annotated[TextBlock, Tag("(text)")] | Annotated[ToolResultBlock, Tag("(tool_result)")],
    Discriminator(kind_of),
    _blocks("text", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ThinkingBlock, Tag("(thinking)")]
    | Annotated[RedactedThinkingBlock, Tag("(redacted_thinking)")]
    | Annotated[ToolUseBlock, Tag("(tool_use)")],
    Discriminator(kind_of),
    _blocks("text", "thinking", "redacted_thinking", "tool_use"),
]
Block = TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock


class UserTurn(BaseModel):
    model_config = LENIENT

    role: Literal["user"]
    content: Annotated[
        Annotated[Content, Tag("(text)")]
        | Annotated[Annotated[list[UserBlock], Field(min_length=1, max_length=MAX_PARTS)], Tag("(blocks)")],
        Discriminator(_form),
    ]


class AssistantTurn(BaseModel):
    model_config = LENIENT

    role: Literal["assistant"]
    content: Annotated[
        Annotated[Content, Tag("(text)")]
        | Annotated[Annotated[list[AssistantBlock], Field(max_length=MAX_PARTS)], Tag("(blocks)")],
        Discriminator(_form),
    ]


class SystemTurn(BaseModel):
    """A word of the operator's in the middle of a conversation, where the model's template takes one."""

    model_config = LENIENT

    role: Literal["system"]
    content: Texts


Turn = Annotated[
    Annotated[UserTurn, Tag("(user)")]
    | Annotated[AssistantTurn, Tag("(assistant)")]
    | Annotated[SystemTurn, Tag("(system)")],
    Discriminator(_role),
    one_of(
        "user",
        "assistant",
        "system",
        otherwise="Value must be a message whose role is user or assistant",
        kind_of=_role,
    ),
]
Turns = Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES)]


def text_of(content: str | Sequence[Block]) -> str:
    """Blocks are lines of one text."""
    if isinstance(content, str):
        return content
    return "\n".join(block.text for block in content if isinstance(block, TextBlock))


def messages_of(system: str, turns: Sequence[UserTurn | AssistantTurn | SystemTurn]) -> tuple[Message, ...]:
    """Neighbouring turns of one role are one. Raises Refusal for a result of a call that was not made."""
    found = [Message(role="system", content=system)] if system else []
    names: dict[str, str] = {}
    for role, same in groupby(enumerate(turns), key=lambda each: each[1].role):
        blocks = [(f"messages.{place}.content", block) for place, turn in same for block in _blocks_of(turn.content)]
        if role == "assistant":
            found.append(_answer([block for _, block in blocks]))
            names.update((call.id or "", call.name) for call in found[-1].tool_calls)
        elif role == "user":
            found += _user_messages(blocks, names)
        else:
            found.append(Message(role="system", content=text_of([block for _, block in blocks])))
    return tuple(found)


def continues(turns: Sequence[UserTurn | AssistantTurn | SystemTurn]) -> bool:
    """Whether the answer goes on with the last turn. Raises Refusal where that turn waits for its tools."""
    last = turns[-1]
    if not isinstance(last, AssistantTurn):
        return False
    blocks = _blocks_of(last.content)
    if any(isinstance(block, ToolUseBlock) for block in blocks):
        raise wrong_field("messages", "the last one has a tool_use, and no tool_result stands behind it")
    return any(isinstance(block, TextBlock) for block in blocks)


def _blocks_of(content: str | Sequence[Block]) -> Sequence[Block]:
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else content


def _answer(blocks: Iterable[Block]) -> Message:
    """An earlier turn of the assistant's."""
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                calls.append(ToolCall(id=block.id, name=block.name, arguments=block.input))
    content = "\n".join(texts) if texts or not calls else None
    return Message(
        role="assistant", content=content, reasoning_content="\n".join(thoughts) or None, tool_calls=tuple(calls)
    )


def _user_messages(blocks: Iterable[tuple[str, Block]], names: Mapping[str, str]) -> Iterator[Message]:
    """In their order: a result of a tool is a message of its own, texts beside each other are one."""
    for is_text, same in groupby(blocks, key=lambda each: isinstance(each[1], TextBlock)):
        if is_text:
            yield Message(role="user", content=text_of([block for _, block in same]))
            continue
        for place, block in same:
            assert isinstance(block, ToolResultBlock)
            if block.tool_use_id not in names:
                raise wrong_field(place, f"no tool_use before has the id {block.tool_use_id}")
            name = names[block.tool_use_id]
            yield Message(role="tool", content=block.text, tool_call_id=block.tool_use_id, name=name)
