"""OpenAI's bodies, with llama.cpp's sampling fields beside them. Fields that nobody knows are ignored: clients send new
ones. Those that are known and wrong are refused, and so is what a client must not believe to have been done.

Parsed once, at the door (async_view.parse); what goes inward is a GenerateOrder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Annotated, Any, Literal, Self

from django.conf import settings
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from accounts.trail.refusals import Refusal
from inference.api.chat_schemas import MAX_TOOLS, Description, Messages, Name, TemplateFields
from inference.api.errors import wrong_field
from inference.api.llamacpp.schemas import (
    MAX_TOKENS,
    Biases,
    BiasesById,
    Hard,
    Pieces,
    PromptFields,
    SamplingFields,
    Text,
    TextPrompt,
)
from inference.api.native.schemas import AdapterBody
from inference.api.openai.tolerance import known_messages, known_tools
from inference.catalog.adapters import MAX_VECTOR
from inference.chat.prompt import ChatPrompt
from inference.intake.grammars import form_from, grammar_from
from inference.orders import Wanted
from inference.structured import JsonForm

MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
MAX_BEST_OF = 128
MAX_PROMPTS = 128
MAX_ANSWERS = 128
"""Prompts times answers to each; few of them are admitted at once (parts.py)."""
MAX_SUFFIX_CHARACTERS = 1 << 16
LENIENT = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)

Probability = Annotated[float, Field(ge=0, le=1)]
Label = Annotated[str, Field(max_length=1000)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
EitherBias = Annotated[
    Annotated[Biases, Tag("pairs")] | Annotated[BiasesById, Tag("by_id")],
    Discriminator(lambda value: "pairs" if isinstance(value, list) else "by_id"),
]


Effort = Annotated[str, Field(max_length=32, pattern=r"^[a-z]+$")]


def effort_variables(effort: str | None) -> dict[str, Any]:
    """How much the model is to think, for the template, under the names that templates use."""
    if effort is None:
        return {}
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}


class StreamOptions(BaseModel):
    """Of streams alone."""

    model_config = LENIENT

    include_usage: bool | None = Field(None, description="A last chunk without choices says what was used.")


class JsonSchemaFormat(BaseModel):
    """strict or not, the answer follows the schema."""

    model_config = LENIENT

    name: Annotated[str, Field(max_length=64)] | None = None
    description: Description | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = LENIENT

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    object_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="llama.cpp's: a schema for a json_object."
    )

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise wrong_field("response_format.json_schema", "type json_schema needs one, with a name and a schema")
        return self

    def wanted_schema(self) -> dict[str, Any] | None:
        """None where any text will do."""
        match self.type:
            case "text":
                return None
            case "json_object":
                return {"type": "object"} if self.object_schema is None else self.object_schema
        given = self.json_schema.json_schema if self.json_schema else None
        return {"type": "object"} if given is None else given

    @property
    def place(self) -> str:
        return "response_format.schema" if self.type == "json_object" else "response_format.json_schema.schema"


class NamedFunction(BaseModel):
    model_config = LENIENT

    name: Name


class NamedTool(BaseModel):
    """The one tool that must be called."""

    model_config = LENIENT

    type: Literal["function"]
    function: NamedFunction


class OpenAIFields(SamplingFields):
    """What both routes that generate have in common."""

    model_config = LENIENT

    stream_options: StreamOptions | None = None
    n: Annotated[int, Hard(1, MAX_ANSWERS)] | None = Field(None, description="Answers to each prompt.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy; absent is the setting DEFAULT_TEMPERATURE."
    )
    top_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: EitherBias | None = Field(None, description="An object of token ids and biases, or pairs of them.")
    seed: Annotated[int, Hard(-(1 << 63), (1 << 63) - 1)] | None = Field(
        None, description="The same seed gives the same answer; 32 bits of it count, and -1 draws one."
    )
    context_shift: bool | None = Field(
        None, description="true: go on where the context is full, without the oldest tokens behind the first ones."
    )
    adapters: Annotated[list[AdapterBody], Field(max_length=MAX_VECTOR)] | None = Field(
        None, description="LoRA adapters by name; absent is the tenant's default, [] is none."
    )

    prompt_cache_key: Label | None = Field(None, description="As session; so are the next two.")
    safety_identifier: Label | None = None
    user: Label | None = None

    @model_validator(mode="after")
    def _says_it_once(self) -> Self:
        if self.adapters is not None and self.lora is not None:
            raise wrong_field("adapters", "give either adapters or lora, not both")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def response_schema(self) -> tuple[dict[str, Any] | None, str]:
        """A JSON Schema that the answer follows, and the field that it comes from."""
        return self.json_schema, "json_schema"

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        return self.response_schema[0]

    def wanted_adapters(self) -> Wanted | None:
        if self.adapters is None:
            return super().wanted_adapters()
        return tuple((each.name, each.scale) for each in self.adapters)

    @property
    def session_name(self) -> str:
        return self.session or self.prompt_cache_key or self.safety_identifier or self.user or ""

    @property
    def shifts_context(self) -> bool:
        return self.context_shift is True

    def given_sampling(self) -> dict[str, Any]:
        given = super().given_sampling()
        given.setdefault("temperature", settings.CONFIG.default_temperature)
        if "seed" in given:
            given["seed"] %= 1 << 32
        return given

    def answer_form(self) -> JsonForm | None:
        """Of an answer in a schema. Raises Refusal."""
        self.answer_grammar()
        return form_from(self.answer_schema)

    def answer_grammar(self) -> str | None:
        """Raises Refusal, which names the field as this dialect does."""
        schema, place = self.response_schema
        try:
            return grammar_from(self.grammar, schema)
        except Refusal as refusal:
            if refusal.extra.get("field") != "json_schema":
                raise
            message = refusal.message.replace("'json_schema'", f"'{place}'", 1)
            raise Refusal(refusal.code, message, **{**refusal.extra, "field": place}) from refusal


class ChatFields(OpenAIFields, ABC):
    """What the next turn of a conversation is asked with, on any route."""

    model_config = LENIENT

    top_logprobs: Annotated[int, Hard(0, MAX_TOP_LOGPROBS)] | None = Field(
        None, description="Most probable tokens to report beside each one, where tokens are reported."
    )
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most. Absent is true.")
    reasoning_format: Literal["none", "auto", "deepseek"] | None = Field(
        None, description="none: thoughts stay in the content; else they are told apart."
    )
    thinking_budget_tokens: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="Tokens of thoughts: longer ones are ended, and the answer goes on. -1: the model ends them."
    )
    reasoning_budget_tokens: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="Another name of thinking_budget_tokens, which goes before it."
    )

    @property
    @abstractmethod
    def reports_logprobs(self) -> bool: ...

    @property
    @abstractmethod
    def choice(self) -> str:
        """none, auto or required."""

    @property
    @abstractmethod
    def named_tool(self) -> str | None:
        """The one that must be called."""

    @property
    def max_thought(self) -> int | None:
        """Tokens of thoughts; None leaves it to the model."""
        given = (self.thinking_budget_tokens, self.reasoning_budget_tokens)
        wanted = next((each for each in given if each is not None), -1)
        return None if wanted < 0 else wanted

    @property
    def must_call(self) -> bool:
        return self.choice == "required" or self.named_tool is not None

    @property
    def num_probs(self) -> int:
        """One at least, or the chosen token's own would not be reported."""
        return max(1, self.top_logprobs or 0) if self.reports_logprobs else 0

    def check_choice(self, tool_names: Collection[str]) -> None:
        """Raises Refusal for a choice that no answer can keep."""
        if self.must_call and not tool_names:
            raise wrong_field("tool_choice", "asks for a call, and there are no tools")
        if self.named_tool is not None and self.named_tool not in tool_names:
            raise wrong_field("tool_choice", "names a function that is not among the tools")
        if self.must_call and self.grammar:
            raise wrong_field("tool_choice", "asks for a call, and the answer is to follow a grammar")


class ChatBody(ChatFields, TemplateFields):
    """POST /v1/chat/completions."""

    model_config = LENIENT

    messages: Messages
    logprobs: bool | None = Field(None, description="Report the log-probability of each token.")
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=4)] | None = None
    reasoning_effort: Effort | None = Field(
        None, description="none: the template is told not to let the model think; else it is told the word."
    )
    functions: Annotated[list[Any], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Refused: send tools."
    )

    @field_validator("messages", mode="before")
    @classmethod
    def _known_messages(cls, value: Any) -> Any:
        return known_messages(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _known_tools(cls, value: Any) -> Any:
        return known_tools(value)

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _is_choice(cls, value: Any) -> Any:
        """One sentence instead of one for each form."""
        if value is None or isinstance(value, dict) or value in ("none", "auto", "required"):
            return value
        raise PydanticCustomError("tool_choice", "Value must be none, auto, required, or a function by its name")

    @model_validator(mode="after")
    def _asks_for_what_goes_together(self) -> Self:
        if self.functions:
            raise wrong_field("functions", "not supported: send tools")
        if self.top_logprobs and not self.logprobs:
            raise wrong_field("top_logprobs", "needs logprobs: true")
        if self.response_format and self.response_format.type != "text" and self.json_schema is not None:
            raise wrong_field("response_format", "give either response_format or json_schema, not both")
        self.check_choice([tool.function.name for tool in self.tools or ()])
        return self

    @property
    def reports_logprobs(self) -> bool:
        return bool(self.logprobs)

    @property
    def choice(self) -> str:
        return self.tool_choice if isinstance(self.tool_choice, str) else "auto"

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def response_schema(self) -> tuple[dict[str, Any] | None, str]:
        wanted = self.response_format.wanted_schema() if self.response_format else None
        if self.response_format is None or wanted is None:
            return super().response_schema
        return wanted, self.response_format.place

    def prompt(self) -> ChatPrompt:
        """Raises Refusal."""
        return self.chat_prompt(self.messages)

    def _variables(self) -> dict[str, Any]:
        return {**effort_variables(self.reasoning_effort), **super()._variables()}


class CompletionsBody(OpenAIFields, PromptFields):
    """POST /v1/completions."""

    model_config = LENIENT
    most_prompts = MAX_PROMPTS
    most_answers = MAX_ANSWERS

    prompt: Text | TextPrompt | Pieces | Annotated[list[Text | Pieces | TextPrompt], Field(max_length=MAX_PROMPTS)] = (
        Field(description="A text, token ids, texts and token ids in one array; or an array of such prompts.")
    )

    logprobs: Annotated[int, Hard(0, MAX_COMPLETION_LOGPROBS)] | None = Field(
        None, description="Most probable tokens to report beside each one, whose own is reported too."
    )
    best_of: Annotated[int, Hard(1, MAX_BEST_OF)] | None = Field(None, description="Refused unless it is n.")
    echo: bool | None = Field(None, description="true is refused.")
    suffix: Annotated[str, Field(max_length=MAX_SUFFIX_CHARACTERS)] | None = Field(
        None, description="Refused unless it is empty: see /infill."
    )

    @field_validator("echo")
    @classmethod
    def _is_not_echoed(cls, value: bool | None) -> bool | None:
        if value:
            raise PydanticCustomError("unsupported", "Not supported: put the prompt before the answer yourself")
        return value

    @field_validator("suffix")
    @classmethod
    def _has_no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise PydanticCustomError("unsupported", "Not supported here: use /infill")
        return value

    @model_validator(mode="after")
    def _wants_what_it_gets(self) -> Self:
        if self.best_of is not None and self.best_of != self.num_completions:
            raise wrong_field("best_of", "is not supported unless it is n: ask for n answers and choose")
        return self

    @property
    def num_probs(self) -> int:
        return 0 if self.logprobs is None else max(1, self.logprobs)


# Answers, for the OpenAPI document


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorReply(BaseModel):
    """Every error of this dialect."""

    error: OpenAIError


class CachedTokens(BaseModel):
    cached_tokens: int = Field(description="Of the prompt, held from earlier requests.")


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Likely(BaseModel):
    token: str = Field(description="A part of a character is written as `bytes:\\xe2`.")
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    reasoning_content: str | None = Field(None, description="What the model thought before.")
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Completion(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: CompletionUsage
    timings: dict[str, float] | None = Field(None, description="llama.cpp's, of an answer that is the only one.")


class ChatCompletion(Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    index: int
    delta: dict[str, Any]
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(BaseModel):
    """A server-sent event; behind the last one comes `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatDelta]
    usage: CompletionUsage | None = Field(None, description="With stream_options.include_usage.")


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(Completion):
    """Events of streams have the same form."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class InputTokensReply(BaseModel):
    """Of a conversation that is not answered, on any route."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class ModelReply(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    status: dict[str, Any] = Field(description="value: loaded, loading, waiting, unloaded, failed; and its progress.")
    meta: dict[str, Any]
