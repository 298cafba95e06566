"""Conversations as OpenAI writes them, in any dialect's body. Every number, string and array is bounded.

Parsed once, at the door (async_view.parse); what goes inward is a ChatPrompt.
"""

from __future__ import annotations

import json
import re
from math import inf, isfinite
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from accounts.trail.refusals import Refusal
from inference.chat.prompt import RESERVED_NAMES, ChatPrompt, Message, ToolCall
from inference.chat.user_text import without_surrogates

MAX_MESSAGES = 4096
MAX_CONTENT_CHARACTERS = 1_000_000
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_CALLS = 64
MAX_JSON_CHARACTERS = 256 << 10
MAX_JSON_DEPTH = 32
MAX_JSON_VALUES = 20_000
MAX_VARIABLES = 32
MAX_NUMBER = 1 << 63
MAX_FLOAT_BITS = 1023
MAX_NAME = 128
SURROGATE = re.compile("[\ud800-\udfff]")
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def bounded_json(value: dict[str, Any]) -> dict[str, Any]:
    """An object of bounded depth and size."""
    num_values, num_characters = 0, 0
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        num_values += len(level)
        num_characters += sum(map(_checked_length, level))
        level = [item for each in level for item in _items(each)]
        if num_values > MAX_JSON_VALUES or num_characters > MAX_JSON_CHARACTERS:
            raise ValueError(f"has more than {MAX_JSON_VALUES} values or {MAX_JSON_CHARACTERS} characters")
        if not level:
            return value
    raise ValueError(f"is nested deeper than {MAX_JSON_DEPTH} levels")


def _checked_length(value: Any) -> int:
    """Characters that the value itself has. Raises ValueError for numbers and texts that no other JSON could hold."""
    is_held = abs(value) < MAX_NUMBER if isinstance(value, int) else not isinstance(value, float) or isfinite(value)
    if not is_held:
        raise ValueError("has a number that is too large")
    texts = list(value) if isinstance(value, dict) else [value] if isinstance(value, str) else []
    if any(SURROGATE.search(text) for text in texts):
        raise ValueError("has a text that is not Unicode")
    return sum(map(len, texts))


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def said_json(value: dict[str, Any]) -> dict[str, Any]:
    """As bounded_json, of what a model has written: a conversation does not end with a whole number that is larger than
    others write, or half a character. The number becomes a float, and the half U+FFFD."""
    return bounded_json(_tamed(value, MAX_JSON_DEPTH))


def _tamed(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        return float(value) if value.bit_length() < MAX_FLOAT_BITS else inf
    if depth and isinstance(value, dict):
        return {without_surrogates(name): _tamed(each, depth - 1) for name, each in value.items()}
    return [_tamed(each, depth - 1) for each in value] if depth and isinstance(value, list) else value


Content = Annotated[str, Field(max_length=MAX_CONTENT_CHARACTERS)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME, pattern=r"^[A-Za-z0-9_.-]+$")]
CallId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
JsonObject = Annotated[dict[str, Any], AfterValidator(bounded_json)]
Speaker = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s<|\\/>]+$")]
"""Who says it, as OpenAI takes it."""
CalledName = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
"""Of a tool that a model has called: it may have made the name up."""
Description = Annotated[str, Field(max_length=1 << 16)]
"""Of a tool or a form: those of agents are long."""
SaidObject = Annotated[dict[str, Any], AfterValidator(said_json)]


class TextPart(BaseModel):
    """A part of a content. Only text is served."""

    model_config = STRICT

    type: Literal["text"]
    text: Content


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]


def text_of(content: str | list[TextPart] | None) -> str | None:
    """Parts are lines of one text."""
    return "\n".join(part.text for part in content) if isinstance(content, list) else content


class SystemMessage(BaseModel):
    model_config = STRICT

    role: Literal["system", "developer"]
    content: Content | Parts
    name: Speaker | None = None

    def message(self) -> Message:
        return Message(role="system", content=text_of(self.content), name=self.name)


class UserMessage(BaseModel):
    model_config = STRICT

    role: Literal["user"]
    content: Content | Parts
    name: Speaker | None = None

    def message(self) -> Message:
        return Message(role="user", content=text_of(self.content), name=self.name)


def arguments_of(text: str) -> dict[str, Any]:
    """What a call's text says. Raises ValueError."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError("arguments are a JSON object in a string") from error
    if not isinstance(found, dict):
        raise ValueError("arguments are a JSON object in a string")
    return said_json(found)


class CalledFunction(BaseModel):
    """arguments is JSON in a string, as models write it, or the object itself."""

    model_config = STRICT

    name: CalledName
    arguments: Annotated[str, Field(max_length=MAX_JSON_CHARACTERS)] | SaidObject = Field("{}", validate_default=True)

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, value: str | dict[str, Any]) -> dict[str, Any]:
        return arguments_of(value) if isinstance(value, str) else value


class CallBody(BaseModel):
    model_config = STRICT

    id: CallId | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def call(self) -> ToolCall:
        assert isinstance(self.function.arguments, dict)
        return ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class AssistantMessage(BaseModel):
    """A content, calls of tools, or both. A refusal, of a conversation that began elsewhere, is its content."""

    model_config = STRICT

    role: Literal["assistant"]
    content: Content | Parts | None = None
    reasoning_content: Content | None = None
    name: Speaker | None = None
    tool_calls: Annotated[list[CallBody], Field(max_length=MAX_CALLS)] | None = None
    refusal: Content | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.text is None and not self.tool_calls:
            raise ValueError("a message of the assistant has a content or tool_calls")
        return self

    @property
    def text(self) -> str | None:
        return text_of(self.content) if self.content is not None else self.refusal

    def message(self) -> Message:
        return Message(
            role="assistant",
            content=self.text,
            reasoning_content=self.reasoning_content,
            name=self.name,
            tool_calls=tuple(each.call() for each in self.tool_calls or ()),
        )


class ToolMessage(BaseModel):
    """What a tool answered."""

    model_config = STRICT

    role: Literal["tool"]
    content: Content | Parts
    tool_call_id: CallId | None = None
    name: CalledName | None = None

    def message(self) -> Message:
        return Message(role="tool", content=text_of(self.content), tool_call_id=self.tool_call_id, name=self.name)


MessageBody = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[MessageBody], Field(min_length=1, max_length=MAX_MESSAGES)]


class FunctionBody(BaseModel):
    model_config = STRICT

    name: Name
    description: Description | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class ToolBody(BaseModel):
    """A tool as OpenAI writes it."""

    model_config = STRICT

    type: Literal["function"]
    function: FunctionBody

    def tool(self) -> dict[str, Any]:
        """What a template is given: nothing that was not said."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


Tools = Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)]


class TemplateFields(BaseModel):
    """What a body may say of how its conversation becomes a prompt."""

    model_config = STRICT

    tools: Tools | None = Field(None, description="Tools that the model may call.")
    chat_template_kwargs: Annotated[JsonObject, Field(max_length=MAX_VARIABLES)] | None = Field(
        None, description='Variables of the template, such as {"enable_thinking": false}.'
    )
    add_generation_prompt: bool | None = Field(
        None, description="End with the beginning of the assistant's turn. Absent: unless the assistant's text goes on."
    )
    continue_final_message: bool | None = Field(
        None, description="Go on with the last message, the assistant's. Absent: if it is the assistant's."
    )
    chat_template: Any = Field(None, description="Refused: the operator chooses the template.")

    def chat_prompt(self, messages: list[MessageBody]) -> ChatPrompt:
        """Raises Refusal for what contradicts itself or is not a request's to choose."""
        if self.chat_template is not None:
            raise Refusal("bad_request", "chat_template is the operator's to choose: a request cannot bring its own.")
        continues = self._continues(messages)
        return ChatPrompt(
            messages=tuple(each.message() for each in messages),
            tools=tuple(each.tool() for each in self.tools or ()),
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
            variables=self._variables(),
        )

    def _continues(self, messages: list[MessageBody]) -> bool:
        if self.continue_final_message and self.add_generation_prompt:
            raise Refusal("bad_request", "add_generation_prompt and continue_final_message cannot both be true.")
        last = messages[-1]
        can = isinstance(last, AssistantMessage) and last.text is not None and not last.tool_calls
        if not self.continue_final_message:
            return can and self.continue_final_message is None and self.add_generation_prompt is None
        if not can or len(messages) < 2:
            raise Refusal(
                "bad_request", "continue_final_message needs a last message of the assistant with text, after others."
            )
        return True

    def _variables(self) -> dict[str, Any]:
        given = self.chat_template_kwargs or {}
        for name in given:
            if name in RESERVED_NAMES or not _VARIABLE.fullmatch(name):
                raise Refusal("bad_request", f"chat_template_kwargs: {name[:64]!r} cannot be set by a request.")
        return given
