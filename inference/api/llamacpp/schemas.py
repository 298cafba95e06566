"""llama.cpp's bodies. Soft bounds clamp and hard ones refuse, as upstream; null is absent. Unknown fields are ignored
as upstream does; only what a client must not believe to have been done is refused.

Parsed once, at the door (async_view.parse); what goes inward is a GenerateOrder.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    RootModel,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from inference.api.errors import wrong_field
from inference.api.keep_alive import KeepAlive
from inference.api.native.schemas import (
    MAX_GRAMMAR_CHARACTERS,
    MAX_LOGIT_BIASES,
    MAX_PROMPT_CHARACTERS,
    MAX_STOPS,
    ModelName,
    SessionName,
    Stop,
)
from inference.api.sse import KEEP_ALIVE_SECONDS
from inference.catalog.adapters import MAX_VECTOR
from inference.chat.prompt import ChatPrompt
from inference.engine.drafting import MAX_DRAFT
from inference.engine.types import KNOWN_SAMPLERS, Decoding, SamplingParams, Speculation
from inference.intake.grammars import form_from, grammar_from
from inference.models import MAX_SCALE
from inference.orders import GenerateOrder, Wanted

MAX_PROMPTS = 16
MAX_ANSWERS = 32
"""Prompts times completions of each. OpenAI's dialect has bounds of its own."""
MAX_PIECES = 256
"""Strings in one prompt that mixes them with token ids."""
MAX_TOKENS = 1 << 20
MAX_PROBS = 100
MAX_RESPONSE_FIELDS = 64
MAX_SAMPLERS = 32
MAX_INDENT = 65_536
MAX_PIECED_TOKENS = 1 << 17
MAX_SLOT_ID = 4095
MAX_MILLISECONDS = 86_400_000
NO_DRAFTS = Speculation(num_max=0)
RANDOM_SEEDS = frozenset({-1, 0xFFFFFFFF})
FORM = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, frozen=True)


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
Pieces = Annotated[list[TokenId | Text], Field(max_length=MAX_TOKENS)]
"""One prompt of strings and token ids."""
Piece = str | tuple[str | int, ...]
ResponseField = Annotated[str, Field(max_length=200)]
Bias = Annotated[float, Hard(-1000, 1000)] | Literal[False]
TokenBias = tuple[TokenId, Bias]
SamplerName = Annotated[str, Field(max_length=64)]
Biases = Annotated[list[TokenBias], Field(max_length=MAX_LOGIT_BIASES)]
BiasesById = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$", max_length=9)], Bias],
    Field(max_length=MAX_LOGIT_BIASES),
]
BiasedText = Annotated[str, Field(max_length=256)]
MixedBiases = Annotated[list[tuple[TokenId | BiasedText, Bias]], Field(max_length=MAX_LOGIT_BIASES)]
MixedBiasesByName = Annotated[dict[BiasedText, Bias], Field(max_length=MAX_LOGIT_BIASES)]
_IS_ID = re.compile(r"[0-9]{1,9}")


class LoraBody(BaseModel):
    """One adapter; the id is its position in `GET /lora-adapters`."""

    model_config = FORM

    id: TokenId
    scale: Annotated[float, Hard(-MAX_SCALE, MAX_SCALE)] = 0.0


class LoraVectorBody(RootModel[Annotated[list[LoraBody], Field(max_length=MAX_VECTOR)]]):
    """POST /lora-adapters: the tenant's default; adapters that are not listed have scale 0."""

    def wanted(self) -> Wanted:
        return tuple((each.id, each.scale) for each in self.root)


class SpeculativeBody(BaseModel):
    """Bounds on drafts; they change how fast tokens come, never which."""

    model_config = FORM

    n_min: Annotated[int, Soft(0, MAX_DRAFT)] | None = None
    n_max: Annotated[int, Soft(0, MAX_DRAFT)] | None = None
    p_min: Annotated[float, Soft(0, 1)] | None = None


class StreamOptions(BaseModel):
    """Of OpenAI's dialect; the last event has all counts here, asked for or not."""

    model_config = FORM

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextPrompt(BaseModel):
    """Upstream's form for prompts with media: a text is all that is taken of it."""

    model_config = FORM

    prompt_string: Text
    multimodal_data: Annotated[list[Text], Field(max_length=0)] | None = Field(None, description="No media is taken.")


Prompts = Annotated[list[Text | Pieces | TextPrompt], Field(max_length=MAX_PROMPTS)]
"""Of this dialect."""


class SamplingFields(BaseModel):
    """How to generate, in llama.cpp's words; OpenAI's dialect takes them beside its own."""

    model_config = FORM

    model: ModelName | None = None
    n_predict: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="-1: up to the context and the plan; 0: compute the prompt alone."
    )
    max_tokens: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(None, description="An alias of n_predict.")
    max_completion_tokens: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="An alias of n_predict."
    )
    n_keep: Annotated[int, Hard(-1, MAX_TOKENS)] | None = Field(
        None, description="Tokens of the prompt that a context shift keeps; -1 is all of them."
    )
    n_discard: Annotated[int, Hard(0, MAX_TOKENS)] | None = Field(
        None, description="Tokens that a context shift drops; 0 is half of what it need not keep."
    )
    context_shift: bool | None = Field(
        None, description="With an explicit n_predict: go on where the context is full, as the model is set up to."
    )
    t_max_predict_ms: Annotated[int, Hard(-1, MAX_MILLISECONDS)] | None = Field(
        None, description="End after so much time of generating; up to 0 is no limit."
    )
    stream: bool | None = None
    background: bool | None = Field(
        None, description="true: go on without a reader; unless it streams, the answer is 202 and fetched later."
    )
    sse_ping_interval: Annotated[int, Hard(-1, 3600)] | None = Field(
        None, description="Seconds between comments that keep a stream alive; never more than 10."
    )
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
    samplers: Annotated[list[SamplerName], Field(max_length=MAX_SAMPLERS)] | SamplerName | None = Field(
        None, description="Names, or a text of their letters; those that nobody knows are left out."
    )
    logit_bias: Biases | BiasesById | None = Field(None, description="Token ids with a bias; false is never.")
    ignore_eos: bool | None = None
    post_sampling_probs: bool | None = Field(None, description="Probabilities as the samplers left them.")
    grammar: Annotated[str, Field(max_length=MAX_GRAMMAR_CHARACTERS)] | None = Field(
        None, description="GBNF that the answer follows."
    )
    json_schema: dict[str, Any] | None = Field(None, description="JSON Schema that the answer follows; not both.")
    cache_prompt: bool | None = None
    keep_alive: KeepAlive = None
    session: SessionName | None = Field(
        None, description="What belongs together: where an alias is on trial, one version answers all of it."
    )
    cache: bool | None = Field(None, description="Answer an identical earlier request from the completion cache.")
    lora: Annotated[list[LoraBody], Field(max_length=MAX_VECTOR)] | None = Field(
        None, description="Absent is the tenant's default, [] is none."
    )
    speculative: SpeculativeBody | Literal[False] | None = Field(None, description="false: no drafts.")
    speculative_n_min: Annotated[int, Soft(0, MAX_DRAFT)] | None = Field(None, alias="speculative.n_min")
    speculative_n_max: Annotated[int, Soft(0, MAX_DRAFT)] | None = Field(None, alias="speculative.n_max")
    speculative_p_min: Annotated[float, Soft(0, 1)] | None = Field(None, alias="speculative.p_min")
    n: Annotated[int, Hard(1, MAX_PROMPTS)] | None = Field(None, description="Completions of each prompt.")
    id_slot: Annotated[int, Hard(-1, MAX_SLOT_ID)] | None = Field(None, description="-1: the server chooses.")

    @property
    def wanted_tokens(self) -> int:
        """-1: as many as may be."""
        given = (self.n_predict, self.max_tokens, self.max_completion_tokens)
        return next((each for each in given if each is not None), -1)

    @property
    def num_completions(self) -> int:
        return self.n or 1

    @property
    def num_probs(self) -> int:
        """Each dialect has its own words for it."""
        return 0

    @property
    def keep_alive_seconds(self) -> float:
        wanted = self.sse_ping_interval or 0
        return min(wanted, KEEP_ALIVE_SECONDS) if wanted > 0 else KEEP_ALIVE_SECONDS

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def session_name(self) -> str:
        """As the dialect's clients name what belongs together, or "" ."""
        return self.session or ""

    def wanted_adapters(self) -> Wanted | None:
        """None where the request says nothing of adapters."""
        return None if self.lora is None else tuple((each.id, each.scale) for each in self.lora)

    @property
    def shifts_context(self) -> bool:
        """Where the answer is bounded."""
        return self.context_shift is not False

    def order(
        self, prompt: ChatPrompt | tuple[int, ...], *, all_or_nothing: bool, is_batch: bool = False
    ) -> GenerateOrder:
        """What is asked for. is_batch: other orders of the same request have other prompts. Raises Refusal."""
        wanted = self.wanted_tokens
        return GenerateOrder(
            prompt=prompt,
            model=self.model,
            max_tokens=None if wanted < 0 else wanted,
            sampling=self.sampling(),
            form=form_from(self.answer_schema),
            decoding=self.decoding(),
            stop=self.stops(),
            adapters=self.wanted_adapters(),
            stream=bool(self.stream),
            use_cache=bool(self.cache),
            cache_prompt=self.cache_prompt is not False,
            keep_alive_seconds=self.keep_alive,
            session=self.session_name,
            all_or_nothing=all_or_nothing,
            is_batch=is_batch,
        )

    def decoding(self) -> Decoding:
        """The context is shifted for an explicit n_predict alone, so that no answer is endless."""
        milliseconds = self.t_max_predict_ms or 0
        return Decoding(
            context_shift=self.wanted_tokens >= 0 and self.shifts_context,
            num_keep=self.n_keep or 0,
            num_discard=self.n_discard or 0,
            slot_id=None if self.id_slot in (None, -1) else self.id_slot,
            speculation=self.speculation(),
            max_decode_seconds=milliseconds / 1000 if milliseconds > 0 else None,
        )

    def speculation(self) -> Speculation | None:
        """None leaves it to the model's settings. A dotted field goes before the one in the object."""
        if self.speculative is False:
            return NO_DRAFTS
        nested = self.speculative or SpeculativeBody()
        given = {
            "num_min": _first(self.speculative_n_min, nested.n_min),
            "num_max": _first(self.speculative_n_max, nested.n_max),
            "min_probability": _first(self.speculative_p_min, nested.p_min),
        }
        named = {name: value for name, value in given.items() if value is not None}
        return Speculation(**named) if named else None

    def sampling(self) -> SamplingParams:
        """llama.cpp's defaults where nothing is said. Raises Refusal for a grammar that cannot be followed."""
        return SamplingParams(**self.given_sampling(), num_probs=self.num_probs, grammar=self.answer_grammar())

    def given_sampling(self) -> dict[str, Any]:
        given = {name: value for name in SAMPLING_NAMES if (value := getattr(self, name, None)) is not None}
        if given.get("seed") in RANDOM_SEEDS:
            del given["seed"]
        if "dry_sequence_breakers" in given:
            given["dry_sequence_breakers"] = tuple(given["dry_sequence_breakers"])
        if "samplers" in given:
            given["samplers"] = samplers_of(given["samplers"])
        if self.logit_bias is not None:
            given["logit_bias"] = tuple((token, bias) for token, bias in self.biases() if isinstance(token, int))
        return given

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """A JSON Schema that the answer follows."""
        return self.json_schema

    def biases(self) -> list[tuple[int | str, float]]:
        """Of token ids; in llama.cpp's own dialect of texts, too. Names of an object that are numbers are ids, as
        upstream. -inf is never."""
        given: Any = self.logit_bias or ()
        if isinstance(given, dict):
            given = [(int(name) if _IS_ID.fullmatch(name) else name, bias) for name, bias in given.items()]
        return [(token, -math.inf if bias is False else float(bias)) for token, bias in given]

    def answer_grammar(self) -> str | None:
        return grammar_from(self.grammar, self.answer_schema)


class PromptFields(SamplingFields):
    """One prompt or several, as OpenAI's completions and llama.cpp's both write them."""

    model_config = FORM

    most_prompts: ClassVar[int] = MAX_PROMPTS
    most_answers: ClassVar[int] = MAX_ANSWERS

    prompt: Text | TextPrompt | Pieces | Prompts = Field(
        description="A text, token ids, texts and token ids in one array; or an array of such prompts."
    )

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_kind(cls, value: Any) -> Any:
        """One sentence instead of one for each kind that it could have been."""
        if not (_is_prompt(value) or (isinstance(value, list) and all(map(_is_prompt, value)))):
            raise PydanticCustomError(
                "prompt_kind", "Value must be a text, an array of token ids and texts, or an array of such prompts"
            )
        return value

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        prompts = self.prompts()
        most, most_answers = self.most_prompts, self.most_answers
        if not 1 <= len(prompts) * self.num_completions <= most_answers or len(prompts) > most:
            raise wrong_field("prompt", f"1 to {most} prompts in one request, and {most_answers} answers at most")
        mixed = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if any(sum(isinstance(each, str) for each in prompt) > MAX_PIECES for prompt in mixed):
            raise wrong_field("prompt", f"A prompt has {MAX_PIECES} texts at most")
        return self

    def prompts(self) -> list[Piece]:
        """Each a text, or texts and token ids that follow each other."""
        if not isinstance(self.prompt, list):
            return [_piece(self.prompt)]
        nested = [each for each in self.prompt if not isinstance(each, int)]
        if len(nested) < len(self.prompt):
            return [tuple(each for each in self.prompt if isinstance(each, int | str))]
        return [_piece(each) for each in nested]


class SamplingBody(SamplingFields):
    """What the routes of this dialect that generate have in common."""

    model_config = FORM

    logit_bias: MixedBiases | MixedBiasesByName | None = Field(  # type: ignore[assignment]
        None, description="Token ids, or texts for each of their tokens, with a bias; false is never."
    )
    n_indent: Annotated[int, Hard(0, MAX_INDENT)] | None = Field(
        None, description="A line behind the first that is indented by fewer blanks ends the answer."
    )
    chat_template: Any = Field(None, description="Refused: the operator chooses the template.")
    grammar_lazy: bool | None = Field(None, description="true is refused: a grammar holds from the first token on.")
    stream_options: StreamOptions | None = None
    return_progress: bool | None = Field(
        None, description="In streams: an event when the prompt is begun and one when it is computed."
    )
    n_probs: Annotated[int, Hard(0, MAX_PROBS)] | None = Field(
        None, description="Most probable tokens to report beside each one that is chosen."
    )
    logprobs: Annotated[int, Hard(0, MAX_PROBS)] | None = Field(None, description="An alias of n_probs.")
    n_cmpl: Annotated[int, Hard(1, MAX_PROMPTS)] | None = Field(None, description="Completions of each prompt.")
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    response_fields: Annotated[list[ResponseField], Field(max_length=MAX_RESPONSE_FIELDS)] | None = Field(
        None, description="Of a whole answer these fields alone; `a/b` is field b of object a."
    )
    verbose: bool | None = Field(None, description="Taken, and without effect.")

    @field_validator("chat_template")
    @classmethod
    def _brings_no_template(cls, value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError("unsupported", "Not supported: the operator chooses the template")
        return value

    @field_validator("grammar_lazy")
    @classmethod
    def _is_not_lazy(cls, value: bool | None) -> bool | None:
        if value:
            raise PydanticCustomError("unsupported", "Not supported: a grammar holds from the first token on")
        return value

    @property
    def num_completions(self) -> int:
        return self.n_cmpl or self.n or 1

    @property
    def num_probs(self) -> int:
        return self.n_probs or self.logprobs or 0

    def order(
        self, prompt: ChatPrompt | tuple[int, ...], *, all_or_nothing: bool, is_batch: bool = False
    ) -> GenerateOrder:
        """With the ids of tokens where they are wanted; what the completion cache keeps has none."""
        found = super().order(prompt, all_or_nothing=all_or_nothing, is_batch=is_batch)
        has_ids = bool(self.stream or self.return_tokens)
        return replace(found, return_tokens=has_ids, use_cache=found.use_cache and not self.return_tokens)

    def decoding(self) -> Decoding:
        return replace(super().decoding(), min_indent=self.n_indent or 0)

    def biased_texts(self) -> list[tuple[str, float]]:
        """Those of logit_bias that are no token ids."""
        return [(token, bias) for token, bias in self.biases() if isinstance(token, str)]


class CompletionBody(SamplingBody, PromptFields):
    """POST /completion."""

    model_config = FORM


def _is_prompt(value: Any) -> bool:
    """By its JSON types alone."""
    if isinstance(value, list):
        return {type(each) for each in value} <= {int, str}
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("prompt_string"), str))


def _piece(prompt: str | TextPrompt | list[int | str]) -> Piece:
    if isinstance(prompt, TextPrompt):
        return prompt.prompt_string
    return prompt if isinstance(prompt, str) else tuple(prompt)


class ExtraChunk(BaseModel):
    """A part of another file."""

    model_config = FORM

    text: Text
    filename: Annotated[str, Field(max_length=1000)] = "tmp"


class InfillBody(SamplingBody):
    """POST /infill: what belongs between a prefix and a suffix."""

    input_prefix: Text | Pieces
    input_suffix: Text | Pieces
    input_extra: Annotated[list[ExtraChunk], Field(max_length=MAX_PIECES)] | None = None
    prompt: Text = Field("", description="How the middle begins.")


def samplers_of(given: list[str] | str) -> tuple[str, ...]:
    """As llama.cpp reads them: names in several spellings, or one text of a letter for each; unknown ones are left
    out. common_sampler_types_from_names and _from_chars of common/sampling.cpp."""
    if isinstance(given, str):
        return tuple(SAMPLER_LETTERS[letter] for letter in given if letter in SAMPLER_LETTERS)
    names = (SAMPLER_ALIASES.get(name, name) for name in given)
    return tuple(name for name in names if name in KNOWN_SAMPLERS)


SAMPLER_LETTERS = {
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
    "i": "infill",
}
SAMPLER_ALIASES = {
    "top-n-sigma": "top_n_sigma",
    "top-k": "top_k",
    "typical_p": "typ_p",
    "typical-p": "typ_p",
    "typical": "typ_p",
    "typ-p": "typ_p",
    "typ": "typ_p",
    "top-p": "top_p",
    "nucleus": "top_p",
    "min-p": "min_p",
    "temp": "temperature",
}


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


SAMPLING_NAMES = tuple(
    name for name in SamplingParams.__dataclass_fields__ if name not in {"logit_bias", "grammar", "num_probs"}
)


class TokenizeBody(BaseModel):
    """POST /tokenize. Texts of users never become special tokens, so parse_special has no effect."""

    model_config = FORM

    content: Text
    model: ModelName | None = None
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = Field(
        None, description=f"Each token with its text; bytes where that is none. Of {MAX_PIECED_TOKENS} tokens at most."
    )


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = FORM

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
    prompt: str
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
    completion_probabilities: list[dict[str, Any]] | None = Field(None, description="With n_probs.")


class CompletionEvent(BaseModel):
    """One event of a stream, but for the last of each index, which is a CompletionReply without content."""

    index: int
    content: str
    tokens: list[int]
    stop: Literal[False]
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int
    timings: dict[str, float] | None = Field(None, description="With timings_per_token.")
    prompt_progress: dict[str, int] | None = Field(None, description="With return_progress.")
    completion_probabilities: list[dict[str, Any]] | None = Field(None, description="With n_probs.")


class TokenPiece(BaseModel):
    id: int
    piece: str | list[int] = Field(description="Its text, or its bytes where they are no text.")


class TokenizeReply(BaseModel):
    tokens: list[int] | list[TokenPiece]


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
    model_path: str
    model_ftype: str
    modalities: dict[str, bool]
    endpoint_slots: bool
    endpoint_props: bool
    endpoint_metrics: bool
    webui: bool
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str
    is_sleeping: bool = Field(description="It is in no memory now: its next request loads it.")
    context_shift: bool
    abilities: dict[str, bool | str] | None = Field(
        description="What the model's memory can do: trim, copy, shift, save; true, or why not. null: it is not loaded."
    )
