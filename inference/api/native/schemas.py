"""The native dialect's bodies. Every number, string and array is bounded; unknown fields are refused.

Parsed once, at the door (async_view.parse); what goes inward is a GenerateOrder.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from django.conf import settings
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from inference.api.chat_schemas import Messages, TemplateFields
from inference.api.keep_alive import KeepAlive
from inference.catalog.adapters import MAX_VECTOR
from inference.chat.prompt import ChatPrompt
from inference.engine.drafting import MAX_DRAFT
from inference.engine.types import Decoding, SamplingParams, Speculation
from inference.intake.grammars import grammar_from
from inference.models import MAX_SCALE
from inference.orders import Wanted

MAX_PROMPT_CHARACTERS = 1_000_000
MAX_BATCH_PROMPTS = 64
MAX_STOPS = 16
MAX_LOGIT_BIASES = 1024
MAX_GRAMMAR_CHARACTERS = 1 << 20
"""Far more than a grammar may have: one that is a little too large gets its own, clearer refusal."""
MAX_PROBS = 20
"""Each is some 30 bytes a token in the stream, which Redis keeps for minutes."""

Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
SessionName = Annotated[str, Field(min_length=1, max_length=256)]
TokenBias = tuple[Annotated[int, Field(ge=0, le=1 << 24)], Annotated[float, Field(ge=-100, le=100)]]


class AdapterBody(BaseModel):
    """One adapter of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] | None = Field(
        None, description="Absent is the adapter's own; 0 is no adapter."
    )


class SpeculativeBody(BaseModel):
    """Bounds on guessed tokens. They change how fast the answer comes, never what it is."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    n_min: int = Field(0, ge=0, le=MAX_DRAFT, description="Shorter drafts are thrown away.")
    n_max: int = Field(
        16, ge=0, le=MAX_DRAFT, description="Guesses of a step at most, up to what the model is served with; 0 is none."
    )
    p_min: float = Field(0.0, ge=0, le=1, description="A draft model stops guessing below this probability.")


class SamplingBody(BaseModel):
    """What the routes of this dialect have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    model: ModelName | None = Field(None, description="A name or alias of `GET /v1/models`; absent is the default.")
    adapters: list[AdapterBody] | None = Field(
        None, max_length=MAX_VECTOR, description="LoRA adapters; absent is the tenant's default, [] is none."
    )
    cache: bool = Field(True, description="Answer an identical earlier request from the completion cache.")
    cache_prompt: bool = Field(True, description="Reuse what the engine still holds of the tenant's earlier prompts.")
    keep_alive: KeepAlive = None
    session: SessionName | None = Field(
        None, description="What belongs together: where an alias is on trial, one version answers all of it."
    )
    context_shift: bool = Field(
        False, description="Go on where the context is full, without the oldest tokens behind the first ones."
    )
    max_new_tokens: int | None = Field(None, ge=1, le=1 << 20, description="Output bound in tokens.")
    temperature: float | None = Field(None, ge=0, le=5, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="0 is off.")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10, description="1 is off.")
    repeat_last_n: int | None = Field(None, ge=-1, le=1 << 20, description="0 is off, -1 the whole context.")
    presence_penalty: float | None = Field(None, ge=-10, le=10)
    frequency_penalty: float | None = Field(None, ge=-10, le=10)
    logit_bias: list[TokenBias] | None = Field(
        None, max_length=MAX_LOGIT_BIASES, description="Pairs of token id and bias."
    )
    ignore_eos: bool | None = Field(None, description="Generate past the end-of-text token.")
    seed: int | None = Field(None, ge=0, lt=1 << 32, description="The same seed gives the same text.")
    stop: list[Stop] | None = Field(None, max_length=MAX_STOPS, description="Texts that end the output.")
    grammar: str | None = Field(
        None, max_length=MAX_GRAMMAR_CHARACTERS, description="GBNF that the output follows; its first rule is `root`."
    )
    json_schema: dict[str, Any] | None = Field(
        None, description="JSON Schema of the output: it is valid JSON, properties in declared order; {} is any JSON."
    )
    n_probs: int | None = Field(
        None, ge=0, le=MAX_PROBS, description="Most probable tokens to report beside each one of the output."
    )
    post_sampling_probs: bool | None = Field(
        None, description="Probabilities as sampling left them, not as the model gave them."
    )
    speculative: SpeculativeBody | Literal[False] | None = Field(
        None, description="Speculative decoding; absent is as the model is served, false is none."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.grammar and self.json_schema is not None:
            raise PydanticCustomError("grammar_and_schema", "give either grammar or json_schema, not both")
        return self

    def wanted_adapters(self) -> Wanted | None:
        """None where the request says nothing of adapters."""
        return None if self.adapters is None else tuple((each.name, each.scale) for each in self.adapters)

    def decoding(self) -> Decoding:
        return Decoding(context_shift=self.context_shift, speculation=self._speculation())

    def _speculation(self) -> Speculation | None:
        if self.speculative is None:
            return None
        if not self.speculative:
            return Speculation(num_max=0)
        asked = self.speculative
        return Speculation(num_min=asked.n_min, num_max=asked.n_max, min_probability=asked.p_min)

    def sampling(self) -> SamplingParams:
        """llama.cpp's defaults where nothing is said, but for the temperature, which is a setting.

        Raises Refusal for a grammar or a schema that is wrong.
        """
        given: dict[str, Any] = {name: value for name in SAMPLING_NAMES if (value := getattr(self, name)) is not None}
        given.setdefault("temperature", settings.CONFIG.default_temperature)
        if "logit_bias" in given:
            given["logit_bias"] = tuple(given["logit_bias"])
        return SamplingParams(
            **given, grammar=grammar_from(self.grammar, self.json_schema), num_probs=self.n_probs or 0
        )


SAMPLING_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "repeat_last_n",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "ignore_eos",
    "post_sampling_probs",
    "seed",
)


class GenerateBody(SamplingBody, TemplateFields):
    """POST /v1/generate. Either a prompt, which is text as it is, or messages for the model's chat template."""

    prompt: Prompt | None = None
    messages: Messages | None = None
    stream: bool = Field(False, description="Send server-sent events instead of one JSON object.")
    background: bool = Field(
        False, description="Go on without a reader; unless it streams, the answer is 202 and fetched later."
    )

    @model_validator(mode="after")
    def _says_it_once(self) -> GenerateBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        if self.messages is None and (given := self.model_fields_set & TemplateFields.model_fields.keys()):
            raise ValueError(f"{', '.join(sorted(given))}: only with messages")
        return self

    def prompt_or_chat(self) -> str | ChatPrompt:
        return self.prompt if self.prompt is not None else self.chat_prompt(self.messages or [])


class GenerateBatchBody(SamplingBody):
    """POST /v1/generate/batch."""

    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_BATCH_PROMPTS)


# Answers, for the OpenAPI document


class LikelyToken(BaseModel):
    """A token and its natural log-probability, null where the probability is 0."""

    id: int
    text: str = Field(description="Parts of a character that several tokens make up are U+FFFD.")
    bytes: list[int]
    logprob: float | None


class TokenProbability(LikelyToken):
    """A token of the output, and the most probable ones in its place, best first."""

    top: list[LikelyToken]


class GenerateReply(BaseModel):
    """Usage and id are in headers: X-Request-ID, X-Usage-*."""

    model: str
    output: str
    cached: bool
    probs: list[TokenProbability] | None = Field(None, description="Where n_probs asks for them.")


class GenerateEvent(BaseModel):
    """A server-sent event. `data` is JSON: {"text"} of delta, and its "probs"; id, finish_reason and usage of finished;
    ErrorReply."""

    id: str | None = None
    event: Literal["delta", "finished", "error"]
    data: str


class BatchResult(BaseModel):
    output: str
    cached: bool
    prompt_tokens: int
    completion_tokens: int
    probs: list[TokenProbability] | None = None


class GenerateBatchReply(BaseModel):
    model: str
    results: list[BatchResult]


class ErrorReply(BaseModel):
    """Every error of this dialect."""

    code: str
    message: str
    extra: dict[str, Any] | None = None
    request_id: str


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class RequestReply(BaseModel):
    """A receipt, or the state of a request that has not ended."""

    id: str
    status: str
    model: str | None = None
    finish_reason: str | None = None
    error_code: str | None = None
    usage: Usage | None = None
    receipt: dict[str, Any] | None = None
    answer: dict[str, Any] | list[Any] | None = Field(
        None, description="Of a background request that has ended: what it would have been answered with, an error too."
    )


class AcceptedReply(BaseModel):
    """A request that goes on in the background. Links are addresses of this server."""

    id: str
    status: str
    links: dict[str, str]
    cost: str | None = Field(None, description="In the currency of GET /v1/me/usage, once it is settled.")
    code: str | None = Field(None, description="Of a refused request, with the limit that bound.")
    message: str | None = None
    limit: str | None = None
    of: str | None = None
    value: int | None = None
    frees_at: str | None = None


class CancelReply(BaseModel):
    id: str
    status: str


class MeReply(BaseModel):
    key: dict[str, Any]
    tenant: dict[str, Any]
    limits: dict[str, Any]


class UsageReply(BaseModel):
    """The union of the documented and the coded shape of the service that this route comes from."""

    quota_used: int
    quota_monthly: int | None
    quota_reset_at: str | None
    rpm_limit: int | None
    rpm_remaining: int | None
    api_key: str
    role: str
    total_requests: int
    total_prompt_tokens: int
    total_completion_tokens: int
    first_request_at: str | None
    last_request_at: str | None
    alerts: list[dict[str, Any]] = Field(description="Parts of this period's quotas that were reached.")
    currency: str
    window: dict[str, Any] = Field(description="What was used from one day to another, by `group_by`.")


class ModelsReply(BaseModel):
    object: str
    data: list[dict[str, Any]]
    has_more: bool
    first_id: str | None
    last_id: str | None
    default_model: str | None
    models: list[dict[str, Any]]
    deployment_capabilities: dict[str, bool]


class HealthReply(BaseModel):
    status: str


class ReadyReply(BaseModel):
    status: str
    db: str
    redis: str
    workers: int
    model_load_mode: str
    require_model_ready: bool
    model_loaded: bool
    llm: str = Field(description="ok, or what the default model is: loading, waiting, unloaded, failed, ...")
    progress: float | None = Field(description="Of the load that goes on: 0 to 1.")


class ModelzReply(BaseModel):
    status: str
    model_load_mode: str
    model_loaded: bool
    model_error: str | None
    llm: str
