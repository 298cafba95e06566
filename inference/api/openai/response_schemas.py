"""The body of OpenAI's responses, and their answers for the OpenAPI document.

A response is a chat completion in other clothes: what goes inward is the same GenerateOrder. Fields that nobody knows
are ignored, as in the other bodies of this dialect; what a client must not believe to have been done is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from inference.api.chat_schemas import (
    MAX_TOOLS,
    Content,
    Description,
    FunctionBody,
    JsonObject,
    Name,
    TemplateFields,
    ToolBody,
)
from inference.api.errors import wrong_field
from inference.api.llamacpp.schemas import MAX_TOKENS, Hard
from inference.api.openai.response_items import Items, known_items
from inference.api.openai.schemas import LENIENT, ChatFields, Effort, effort_variables

MAX_INCLUDES = 32
MAX_PAIRS = 16
LOGPROBS = "message.output_text.logprobs"

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=MAX_PAIRS)
]
Label = Annotated[str, Field(max_length=512)]
ResponseId = Annotated[str, Field(min_length=1, max_length=128)]


class FunctionTool(BaseModel):
    """A function that the model may call."""

    model_config = LENIENT

    type: Literal["function"]
    name: Name
    description: Description | None = None
    parameters: JsonObject | None = Field(None, description="A JSON schema.")
    strict: bool | None = None

    def tool(self) -> dict[str, Any]:
        """As a chat completion has it."""
        function = FunctionBody(name=self.name, description=self.description, parameters=self.parameters)
        return ToolBody(type="function", function=function).tool()

    def told(self) -> dict[str, Any]:
        """As the response repeats it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": bool(self.strict),
        }


class FunctionChoice(BaseModel):
    """The one tool that must be called."""

    model_config = LENIENT

    type: Literal["function"]
    name: Name


class TextFormat(BaseModel):
    """The form of the answer."""

    model_config = LENIENT

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Description | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise wrong_field("text.format.schema", "type json_schema needs one")
        return self

    def told(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name or "",
            "description": self.description,
            "schema": self.json_schema,
            "strict": bool(self.strict),
        }


class TextConfig(BaseModel):
    model_config = LENIENT

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Without effect.")


class ReasoningConfig(BaseModel):
    """How much the model thinks, where its chat template knows a word for it."""

    model_config = LENIENT

    effort: Effort | None = Field(
        None, description="none: the template is told not to let the model think; else it is told the word."
    )
    summary: Annotated[str, Field(max_length=32)] | None = Field(None, description="Without effect.")

    def variables(self) -> dict[str, Any]:
        return effort_variables(self.effort)


class ResponsesBody(ChatFields, TemplateFields):
    """POST /v1/responses."""

    model_config = LENIENT

    input: Items | None = Field(None, description="A text, or the items of a conversation.")
    instructions: Content | None = Field(None, description="What the system says, this time alone.")
    previous_response_id: ResponseId | None = Field(
        None, description="Of a stored response, whose conversation goes on."
    )
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = Field(  # type: ignore[assignment]
        None, description="Functions that the model may call."
    )
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    text: TextConfig | None = None
    max_output_tokens: Annotated[int, Hard(1, MAX_TOKENS)] | None = Field(
        None, description="Thoughts included. Absent: up to the context and the plan."
    )
    max_tool_calls: Annotated[int, Hard(0, MAX_TOKENS)] | None = Field(None, description="Of hosted tools: none here.")
    reasoning: ReasoningConfig | None = None
    include: Annotated[list[Label], Field(max_length=MAX_INCLUDES)] | None = Field(
        None, description=f"`{LOGPROBS}` reports log-probabilities; the others have no meaning here."
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="auto: a conversation that does not fit loses its oldest items."
    )
    store: bool | None = Field(None, description="Absent is true; where the tenant keeps no responses, false.")
    metadata: Metadata | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    background: bool | None = Field(None, description="true is refused.")
    conversation: Any = Field(None, description="Refused: use previous_response_id.")
    prompt: Any = Field(None, description="Refused: prompts are not kept here.")

    @field_validator("input", mode="before")
    @classmethod
    def _known_items(cls, value: Any) -> Any:
        return None if value is None else known_items(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _are_functions(cls, value: Any) -> Any:
        for place, tool in enumerate(value if isinstance(value, list) else ()):
            kind = tool.get("type") if isinstance(tool, dict) else None
            if isinstance(kind, str) and kind != "function":
                raise PydanticCustomError(
                    "unsupported_tool",
                    "Tool {place} is of type {kind}: this server takes functions alone, which the client runs",
                    {"place": place, "kind": kind[:40]},
                )
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _is_choice(cls, value: Any) -> Any:
        """One sentence instead of one for each form."""
        kind = value.get("type", "function") if isinstance(value, dict) else None
        if value is None or kind == "function" or value in ("none", "auto", "required"):
            return value
        raise PydanticCustomError("tool_choice", "Value must be none, auto, required, or a function by its name")

    @field_validator("background", "conversation", "prompt")
    @classmethod
    def _is_not_served(cls, value: Any, info: Any) -> Any:
        if not value:
            return value
        words = {
            "background": "Not supported: send the request without it, and stream the answer",
            "conversation": "Not supported: use previous_response_id, or send the items",
            "prompt": "Not supported: prompts are not kept here, send instructions and input",
        }
        raise PydanticCustomError("unsupported", words[info.field_name])

    @model_validator(mode="after")
    def _asks_for_what_goes_together(self) -> Self:
        if self.input is None and self.previous_response_id is None:
            raise wrong_field("input", "Value is missing")
        if self.num_completions != 1:
            raise wrong_field("n", "a response is one answer")
        if self._schema is not None and self.json_schema is not None:
            raise wrong_field("text.format", "give either text.format or json_schema, not both")
        self.check_choice([tool.name for tool in self.tools or ()])
        return self

    @property
    def wanted_tokens(self) -> int:
        return super().wanted_tokens if self.max_output_tokens is None else self.max_output_tokens

    @property
    def wants_store(self) -> bool:
        return self.store is not False

    @property
    def reports_logprobs(self) -> bool:
        """Not beside tools: of their tokens not all are those of a text."""
        is_asked = bool(self.top_logprobs) or LOGPROBS in (self.include or ())
        return is_asked and (not self.tools or self.choice == "none")

    @property
    def choice(self) -> str:
        return self.tool_choice if isinstance(self.tool_choice, str) else "auto"

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice.name if isinstance(self.tool_choice, FunctionChoice) else None

    @property
    def response_schema(self) -> tuple[dict[str, Any] | None, str]:
        return super().response_schema if self._schema is None else (self._schema, "text.format.schema")

    @property
    def _schema(self) -> dict[str, Any] | None:
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema

    def _variables(self) -> dict[str, Any]:
        of_reasoning = self.reasoning.variables() if self.reasoning else {}
        return {**of_reasoning, **super()._variables()}


# Answers, for the OpenAPI document


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Held from earlier requests.")
    cache_write_tokens: int = Field(description="0: holding tokens costs nothing.")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Of what the model thought, as its text is tokenized.")


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseReply(BaseModel):
    """A response; what was asked is repeated in it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]] = Field(description="Items of type reasoning, message and function_call.")
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool = Field(description="Whether it can be retrieved, and gone on from.")
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseEvent(BaseModel):
    """A server-sent event, named by its type."""

    type: str = Field(description="response.created, response.output_text.delta, response.completed, ...")
    sequence_number: int


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(BaseModel):
    """The newest first, unless `order` is asc."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
