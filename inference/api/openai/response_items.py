"""Items of OpenAI's responses: what a conversation is made of there, and the messages that a model is shown. Pure.

Bounded where they come in, as api/chat_schemas.py bounds messages. An item has one form, sent or stored: what a request
says shortly (a text, a message without a type) is written out before it is looked at.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from inference.api.chat_schemas import (
    MAX_CALLS,
    MAX_JSON_CHARACTERS,
    MAX_MESSAGES,
    MAX_PARTS,
    AssistantMessage,
    CallBody,
    CalledFunction,
    CalledName,
    CallId,
    Content,
    MessageBody,
    SystemMessage,
    ToolMessage,
    UserMessage,
    arguments_of,
)
from inference.api.errors import wrong_field

LENIENT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)
TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}
"""Types of parts, and the field that has their text."""
KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
MAX_ITEMS = 2 * MAX_MESSAGES
"""Of a stored conversation: a turn of the assistant may be several items and is one message."""
ItemId = Annotated[str, Field(max_length=128)]


class TextPart(BaseModel):
    """A part of a content, whatever its sender calls it."""

    model_config = LENIENT

    text: Content


Texts = Annotated[list[TextPart], Field(max_length=MAX_PARTS)]


def written_out(value: Any) -> Any:
    """Parts of a content as TextParts. Raises PydanticCustomError for one that is no text."""
    if isinstance(value, str):
        return [{"text": value}]
    return [_part(each, number) for number, each in enumerate(value)] if isinstance(value, list) else value


def _part(part: Any, number: int) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        return part
    if kind not in TEXT_PARTS:
        raise PydanticCustomError(
            "unsupported_part",
            "Part {number} is of type {kind}: this server takes text alone",
            {"number": number, "kind": kind[:40]},
        )
    return {"text": part.get(TEXT_PARTS[kind])}


def _text(parts: Sequence[TextPart]) -> str:
    """Parts are lines of one text, as in chats."""
    return "\n".join(part.text for part in parts)


class Item(BaseModel, ABC):
    """What all have in common. `status` and the like, which clients send back, have no meaning here."""

    model_config = LENIENT

    id: ItemId | None = None

    @abstractmethod
    def stored(self, item_id: str) -> dict[str, Any]:
        """As OpenAI lists it. item_id: for one that came without."""


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["user", "system", "developer", "assistant"]
    content: Texts

    @field_validator("content", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        return written_out(value)

    @property
    def text(self) -> str:
        return _text(self.content)

    def stored(self, item_id: str) -> dict[str, Any]:
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self.role == "assistant" else {}
        kind = "output_text" if self.role == "assistant" else "input_text"
        content = [{"type": kind, "text": part.text, **more} for part in self.content]
        return {
            "id": self.id or f"msg_{item_id}",
            "type": "message",
            "status": "completed",
            "role": self.role,
            "content": content,
        }


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: CallId
    name: CalledName
    arguments: Annotated[str, Field(max_length=MAX_JSON_CHARACTERS)] = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, value: str) -> str:
        arguments_of(value)
        return value

    def call(self) -> CallBody:
        return CallBody(id=self.call_id, function=CalledFunction(name=self.name, arguments=self.arguments))

    def stored(self, item_id: str) -> dict[str, Any]:
        return {
            "id": self.id or f"fc_{item_id}",
            "type": "function_call",
            "status": "completed",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class FunctionCallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: CallId
    output: Texts

    @field_validator("output", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        return written_out(value)

    @property
    def text(self) -> str:
        return _text(self.output)

    def stored(self, item_id: str) -> dict[str, Any]:
        return {
            "id": self.id or f"fco_{item_id}",
            "type": "function_call_output",
            "status": "completed",
            "call_id": self.call_id,
            "output": self.text,
        }


class ReasoningItem(Item):
    """What the model thought, as an earlier response told it; a summary or an encrypted content says nothing here."""

    type: Literal["reasoning"]
    content: Texts | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        return written_out(value)

    @property
    def text(self) -> str:
        return _text(self.content or ())

    def stored(self, item_id: str) -> dict[str, Any]:
        content = [{"type": "reasoning_text", "text": part.text} for part in self.content or ()]
        return {
            "id": self.id or f"rs_{item_id}",
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": content,
        }


class ReferenceItem(BaseModel):
    """In the place of an item of a response that is stored."""

    model_config = LENIENT

    type: Literal["item_reference"]
    id: ItemId


AnyItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem, Field(discriminator="type")
]
GivenItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ReferenceItem,
    Field(discriminator="type"),
]
Items = Annotated[list[GivenItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class StoredItems(BaseModel):
    """Items that an earlier response was made of."""

    model_config = LENIENT

    items: Annotated[list[AnyItem], Field(max_length=MAX_ITEMS)]


def known_items(value: Any) -> Any:
    """`input` written out. Raises PydanticCustomError for an item of a type that nobody serves here."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        raise PydanticCustomError("input_type", "Value must be a text or an array of items")
    return [_known(item, place) for place, item in enumerate(value)]


def _known(item: Any, place: int) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None and ("role" in item or "id" in item):
        return {**item, "type": "message" if "role" in item else "item_reference"}
    if isinstance(kind, str) and kind not in KINDS:
        raise PydanticCustomError(
            "unsupported_item",
            "Item {place} is of type {kind}: this server takes {kinds}",
            {"place": place, "kind": kind[:40], "kinds": ", ".join(KINDS)},
        )
    return item


# To messages


def messages_of(items: Iterable[AnyItem], instructions: str | None) -> list[MessageBody]:
    """What the model is shown. Items of the assistant that follow each other are one turn of it.

    Raises Refusal for the output of a call that nobody made, and for more calls in a turn than may be.
    """
    messages: list[MessageBody] = []
    turn = _Turn()
    call_ids: set[str] = set()
    for item in items:
        if isinstance(item, FunctionCallItem):
            call_ids.add(item.call_id)
        if turn.takes(item):
            continue
        messages += turn.messages()
        turn = _Turn()
        if isinstance(item, FunctionCallOutputItem):
            if item.call_id not in call_ids:
                raise wrong_field("input", f"No tool call found for function call output with call_id {item.call_id}")
            messages.append(ToolMessage(role="tool", content=item.text, tool_call_id=item.call_id))
        elif isinstance(item, MessageItem):
            messages.append(_said(item))
    messages += turn.messages()
    return _with_instructions(messages, instructions)


class _Turn:
    """A turn of the assistant: what it thought, said and called."""

    def __init__(self) -> None:
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._calls: list[CallBody] = []
        self._is_begun = False

    def takes(self, item: AnyItem) -> bool:
        """Whether the item is part of it."""
        match item:
            case ReasoningItem():
                self._thoughts.append(item.text)
            case FunctionCallItem():
                self._calls.append(item.call())
            case MessageItem(role="assistant"):
                self._texts.append(item.text)
            case _:
                return False
        self._is_begun = True
        return True

    def messages(self) -> list[MessageBody]:
        if not self._is_begun:
            return []
        if len(self._calls) > MAX_CALLS:
            raise wrong_field("input", f"a turn has {MAX_CALLS} calls at most")
        content = "".join(self._texts)
        thoughts = "\n".join(filter(None, self._thoughts))
        message = AssistantMessage(
            role="assistant",
            content=content if content or not self._calls else None,
            reasoning_content=thoughts or None,
            tool_calls=self._calls or None,
        )
        return [message]


def _said(item: MessageItem) -> MessageBody:
    if item.role == "user":
        return UserMessage(role="user", content=item.text)
    return SystemMessage(role="system", content=item.text)


def _with_instructions(messages: list[MessageBody], instructions: str | None) -> list[MessageBody]:
    """Templates know one system message, the first: those at the beginning become one."""
    number = next((place for place, each in enumerate(messages) if not isinstance(each, SystemMessage)), len(messages))
    if instructions is None:
        return messages
    texts = [instructions, *(str(each.content) for each in messages[:number])]
    return [SystemMessage(role="system", content="\n\n".join(texts)), *messages[number:]]


def without_oldest(items: Sequence[AnyItem], number: int) -> list[AnyItem]:
    """The conversation without so many of its first items. What the system says stays, and no output of a call is left
    whose call is gone.
    """
    kept = [item for place, item in enumerate(items) if place >= number or _is_of_the_system(item)]
    called = {item.call_id for item in kept if isinstance(item, FunctionCallItem)}
    return [item for item in kept if not isinstance(item, FunctionCallOutputItem) or item.call_id in called]


def _is_of_the_system(item: AnyItem) -> bool:
    return isinstance(item, MessageItem) and item.role in ("system", "developer")
