"""Anthropic's bodies, with the sampling fields of OpenAI's and llama.cpp's dialects beside them. Unknown fields are
ignored: clients send new ones. Those that are known and wrong are refused.

Parsed once, at the door (async_view.parse); what goes inward is a GenerateOrder.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from inference.api.anthropic.blocks import LENIENT, Texts, Turns, continues, kind_of, messages_of, one_of, text_of
from inference.api.chat_schemas import MAX_TOOLS, Description, JsonObject, Name
from inference.api.errors import wrong_field
from inference.api.llamacpp.schemas import MAX_TOKENS
from inference.api.native.schemas import MAX_STOPS, ModelName, Stop
from inference.api.openai.schemas import OpenAIFields
from inference.chat.prompt import ChatPrompt

MIN_THINKING_TOKENS = 1024


class ClientTool(BaseModel):
    """A tool that the client runs."""

    model_config = LENIENT

    type: Literal["custom"] | None = None
    name: Name
    description: Description | None = None
    input_schema: JsonObject = Field(description="A JSON schema.")

    def tool(self) -> dict[str, Any]:
        """As templates are given tools: in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": function}


def _has_no_type(value: Any) -> bool:
    return not isinstance(value, dict) or value.get("type") is None


Tool = Annotated[
    ClientTool,
    one_of(
        "custom",
        otherwise="Value must be a tool of the client's own: this server runs none itself",
        kind_of=lambda value: "(custom)" if _has_no_type(value) else kind_of(value),
    ),
]
"""One without a type is the client's own."""


class ToolChoice(BaseModel):
    """auto and none leave the model free; any and tool force a call, which follows its tool's schema."""

    model_config = LENIENT

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOn(BaseModel):
    """budget_tokens: thoughts that are longer are ended, and the answer goes on."""

    model_config = LENIENT

    type: Literal["enabled"]
    budget_tokens: Annotated[int, Field(ge=MIN_THINKING_TOKENS, le=MAX_TOKENS)]


class OtherThinking(BaseModel):
    """adaptive is on: the model decides how much."""

    model_config = LENIENT

    type: Literal["adaptive", "between_tools", "disabled"]


Thinking = Annotated[
    Annotated[ThinkingOn, Tag("(enabled)")]
    | Annotated[OtherThinking, Tag("(adaptive)")]
    | Annotated[OtherThinking, Tag("(between_tools)")]
    | Annotated[OtherThinking, Tag("(disabled)")],
    Discriminator(kind_of),
    one_of(
        "enabled",
        "adaptive",
        "between_tools",
        "disabled",
        otherwise="Value must have a type: enabled, adaptive or disabled",
    ),
]


class JsonFormat(BaseModel):
    model_config = LENIENT

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(BaseModel):
    """effort is ignored."""

    model_config = LENIENT

    format: JsonFormat | None = None


class Metadata(BaseModel):
    """Who asks is what the key says; the user's id tells what belongs together."""

    model_config = LENIENT

    user_id: Annotated[str, Field(max_length=256)] | None = None


class Conversation(BaseModel):
    """What both endpoints have in common."""

    model_config = LENIENT

    model: ModelName | None = Field(None, description="A name, an alias or `model:adapter`; absent is the default.")
    messages: Turns
    system: Texts | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Absent: no thoughts, where the model can be told so.")

    @model_validator(mode="after")
    def _names_tools_that_are_there(self) -> Self:
        names = [tool.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise wrong_field("tools", "two have the same name")
        if self.must_call and not names:
            raise wrong_field("tool_choice", "asks for a call, and there are no tools")
        if self.tool_choice and self.tool_choice.type == "tool" and self.tool_choice.name not in names:
            raise wrong_field("tool_choice.name", "names no tool of the request")
        return self

    @property
    def must_call(self) -> bool:
        return self.tool_choice is not None and self.tool_choice.type in ("any", "tool")

    @property
    def choice(self) -> str:
        """As plan_tools knows it."""
        kind = self.tool_choice.type if self.tool_choice else "auto"
        return {"any": "required", "tool": "required"}.get(kind, kind)

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice.name if self.tool_choice and self.tool_choice.type == "tool" else None

    @property
    def parallel(self) -> bool:
        return not (self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def prompt(self) -> ChatPrompt:
        """Raises Refusal."""
        goes_on = continues(self.messages)
        return ChatPrompt(
            messages=messages_of(text_of(self.system or ""), self.messages),
            tools=() if self.choice == "none" else tuple(tool.tool() for tool in self.tools or ()),
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            variables={"enable_thinking": self.thinking is not None and self.thinking.type != "disabled"},
        )


class CountTokensBody(Conversation):
    """POST /v1/messages/count_tokens."""


class MessagesBody(Conversation, OpenAIFields):
    """POST /v1/messages."""

    model_config = LENIENT

    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = Field(description="0 computes the prompt alone.")
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="0 is greedy; absent is the setting DEFAULT_TEMPERATURE."
    )
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    output_config: OutputConfig | None = Field(None, description="format: a JSON schema that the answer follows.")
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _asks_for_what_goes_together(self) -> Self:
        if self.num_completions > 1:
            raise wrong_field("n", "there is one answer to a request")
        if isinstance(self.thinking, ThinkingOn) and self.thinking.budget_tokens >= self.max_tokens:
            raise wrong_field("thinking.budget_tokens", "must be less than max_tokens")
        if self.output_format is not None and self.json_schema is not None:
            raise wrong_field("output_config.format", "give either output_config.format or json_schema, not both")
        if self.must_call and self.grammar:
            raise wrong_field("tool_choice", "asks for a call, and the answer is to follow a grammar")
        return self

    @property
    def output_format(self) -> JsonFormat | None:
        return self.output_config.format if self.output_config else None

    @property
    def wanted_tokens(self) -> int:
        return self.max_tokens

    @property
    def max_thought(self) -> int | None:
        """Tokens of thoughts; None leaves it to the model."""
        return self.thinking.budget_tokens if isinstance(self.thinking, ThinkingOn) else None

    @property
    def response_schema(self) -> tuple[dict[str, Any] | None, str]:
        if self.output_format is None:
            return super().response_schema
        return self.output_format.json_schema, "output_config.format.schema"

    @property
    def session_name(self) -> str:
        return super().session_name or (self.metadata.user_id if self.metadata else None) or ""

    def stops(self) -> tuple[str, ...]:
        return (*(self.stop_sequences or ()), *super().stops())


# Answers, for the OpenAPI document


class AnthropicError(BaseModel):
    type: str
    message: str
    details: dict[str, Any] = Field(description="error_code: the native API's code.")


class AnthropicErrorReply(BaseModel):
    """Every error of this dialect."""

    type: Literal["error"]
    error: AnthropicError
    request_id: str


class MessageUsage(BaseModel):
    input_tokens: int = Field(description="Of the prompt, without those that were held from earlier requests.")
    cache_creation_input_tokens: int
    cache_read_input_tokens: int = Field(description="Of the prompt, held from earlier requests.")
    output_tokens: int


class MessageReply(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]] = Field(description="Blocks of type thinking, text or tool_use.")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """A server-sent event, under the name of its type."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class TokenCount(BaseModel):
    input_tokens: int
