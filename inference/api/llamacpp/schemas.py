"""llama.cpp's bodies. Soft bounds clamp and hard ones refuse, as upstream; null is absent; unknown fields are refused.

Parsed once, at the door (async_view.parse); what goes inward is a GenerateOrder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, RootModel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from inference.adapters import MAX_VECTOR
from inference.api.native.schemas import MAX_LOGIT_BIASES, MAX_PROMPT_CHARACTERS, MAX_STOPS, ModelName, Stop
from inference.engine.types import SamplingParams
from inference.models import MAX_SCALE
from inference.orders import Wanted

MAX_PROMPTS = 16
MAX_TOKENS = 1 << 20
RANDOM_SEEDS = frozenset({-1, 0xFFFFFFFF})
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class _Bounds(ABC):
    """An annotation of a number: what is done with one that lies outside of them."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.bounded, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "minimum": self.low, "maximum": self.high}

    @abstractmethod
    def bounded(self, value: float) -> float: ...


class Hard(_Bounds):
    """It is refused, in upstream's words."""

    def bounded(self, value: float) -> float:
        if not self.low <= value <= self.high:
            raise PydanticCustomError(
                "out_of_range", "Value must be between {low} and {high}", {"low": self.low, "high": self.high}
            )
        return value


class Soft(_Bounds):
    """It is moved to the nearer bound."""

    def bounded(self, value: float) -> float:
        return min(max(value, self.low), self.high)


TokenId = Annotated[int, Hard(0, (1 << 31) - 1)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKENS)]
Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
TokenBias = tuple[TokenId, Annotated[float, Hard(-1000, 1000)] | Literal[False]]
Sampler = Literal["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
Biases = Annotated[list[TokenBias], Field(max_length=MAX_LOGIT_BIASES)]
BiasesById = Annotated[
    dict[
        Annotated[str, Field(pattern=r"^[0-9]{1,9}$", max_length=9)],
        Annotated[float, Hard(-1000, 1000)] | Literal[False],
    ],
    Field(max_length=MAX_LOGIT_BIASES),
]


class LoraBody(BaseModel):
    """One adapter; the id is its position in `GET /lora-adapters`."""

    model_config = STRICT

    id: TokenId
    scale: Annotated[float, Hard(-MAX_SCALE, MAX_SCALE)] = 0.0


class LoraVectorBody(RootModel[Annotated[list[LoraBody], Field(max_length=MAX_VECTOR)]]):
    """POST /lora-adapters: the tenant's default; adapters that are not listed have scale 0."""

    def wanted(self) -> Wanted:
        return tuple((each.id, each.scale) for each in self.root)


class CompletionBody(BaseModel):
    """POST /completion."""

    model_config = STRICT

    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    model: ModelName | None = None
    n_predict: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="-1: up to the context and the plan."
    )
    max_tokens: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(None, description="An alias of n_predict.")
    max_completion_tokens: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="An alias of n_predict."
    )
    stream: bool | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Hard(-1, 0xFFFFFFFF)] | None = Field(None, description="-1 draws one.")
    temperature: Annotated[float, Soft(0, 100)] | None = None
    dynatemp_range: Annotated[float, Soft(0, 100)] | None = None
    dynatemp_exponent: Annotated[float, Soft(0, 100)] | None = None
    top_k: Annotated[int, Soft(0, 1_000_000)] | None = None
    top_p: Annotated[float, Soft(0, 1)] | None = None
    min_p: Annotated[float, Soft(0, 1)] | None = None
    typical_p: Annotated[float, Soft(0, 1)] | None = None
    top_n_sigma: Annotated[float, Soft(-1, 100)] | None = None
    xtc_probability: Annotated[float, Soft(0, 1)] | None = None
    xtc_threshold: Annotated[float, Soft(0, 1)] | None = None
    min_keep: Annotated[int, Soft(0, 1_000_000)] | None = None
    repeat_last_n: Annotated[int, Hard(-1, MAX_TOKENS)] | None = None
    repeat_penalty: Annotated[float, Hard(0.000001, 100)] | None = None
    presence_penalty: Annotated[float, Soft(-100, 100)] | None = None
    frequency_penalty: Annotated[float, Soft(-100, 100)] | None = None
    dry_multiplier: Annotated[float, Hard(0, 100)] | None = None
    dry_base: Annotated[float, Hard(0, 100)] | None = None
    dry_allowed_length: Annotated[int, Hard(0, MAX_TOKENS)] | None = None
    dry_penalty_last_n: Annotated[int, Hard(-1, MAX_TOKENS)] | None = None
    dry_sequence_breakers: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    mirostat: Annotated[int, Hard(0, 2)] | None = None
    mirostat_tau: Annotated[float, Soft(0, 100)] | None = None
    mirostat_eta: Annotated[float, Soft(0, 100)] | None = None
    samplers: Annotated[list[Sampler], Field(max_length=16)] | None = None
    logit_bias: Biases | BiasesById | None = Field(None, description="Token ids with a bias; false is never.")
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    cache: bool | None = Field(None, description="Answer an identical earlier request from the completion cache.")
    lora: Annotated[list[LoraBody], Field(max_length=MAX_VECTOR)] | None = Field(
        None, description="Absent is the tenant's default, [] is none."
    )
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    id_slot: Annotated[int, Hard(-1, -1)] | None = Field(None, description="The server chooses: -1 alone.")
    n_probs: Annotated[int, Hard(0, 0)] | None = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.is_array:
            return [tuple(each for each in self.prompt if isinstance(each, int))]
        return [each if isinstance(each, str) else tuple(each) for each in self.prompt if not isinstance(each, int)]

    @property
    def is_array(self) -> bool:
        """The answer is an array, too."""
        return isinstance(self.prompt, list) and not all(isinstance(each, int) for each in self.prompt)

    @property
    def wanted_tokens(self) -> int:
        """-1: as many as may be."""
        given = (self.n_predict, self.max_tokens, self.max_completion_tokens)
        return next((each for each in given if each is not None), -1)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def wanted_adapters(self) -> Wanted | None:
        """None where the request says nothing of adapters."""
        return None if self.lora is None else tuple((each.id, each.scale) for each in self.lora)

    def sampling(self) -> SamplingParams:
        """llama.cpp's defaults where nothing is said."""
        given = {name: value for name in SAMPLING_NAMES if (value := getattr(self, name)) is not None}
        if given.get("seed") in RANDOM_SEEDS:
            del given["seed"]
        for name in ("dry_sequence_breakers", "samplers"):
            if name in given:
                given[name] = tuple(given[name])
        if self.logit_bias is not None:
            given["logit_bias"] = _biases(self.logit_bias)
        return SamplingParams(**given)


def _biases(given: list[Any] | dict[str, Any]) -> tuple[tuple[int, float], ...]:
    pairs = given.items() if isinstance(given, dict) else given
    return tuple((int(token), -math.inf if bias is False else float(bias)) for token, bias in pairs)


SAMPLING_NAMES = tuple(name for name in SamplingParams.__dataclass_fields__ if name != "logit_bias")


class TokenizeBody(BaseModel):
    """POST /tokenize. Texts of users never become special tokens, so parse_special is taken and has no effect."""

    model_config = STRICT

    content: Text
    model: ModelName | None = None
    add_special: bool = False
    parse_special: bool = False


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = STRICT

    tokens: TokenIds
    model: ModelName | None = None


# Answers, for the OpenAPI document


class LlamaError(BaseModel):
    code: int
    message: str
    type: str
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class LlamaErrorReply(BaseModel):
    """Every error of this dialect."""

    error: LlamaError


class CompletionReply(BaseModel):
    """One result, or the last event of a stream. For an array of prompts the answer is an array of these."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    generation_settings: dict[str, Any]
    has_new_line: bool
    truncated: bool
    stop_type: Literal["none", "eos", "limit", "word"]
    stopping_word: str
    timings: dict[str, float]


class TokenizeReply(BaseModel):
    tokens: list[int]


class DetokenizeReply(BaseModel):
    content: str


class LoraReply(BaseModel):
    id: int
    path: str
    scale: float
    task_name: str
    prompt_prefix: str


class SuccessReply(BaseModel):
    success: bool


class PropsReply(BaseModel):
    default_generation_settings: dict[str, Any]
    total_slots: int
    model_alias: str
    chat_template: str
    build_info: str
