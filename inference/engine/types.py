"""The forms that enter and leave the engine: a request in, events out, a receipt at the end.

Plain frozen data on the step's clock. Nothing here knows a tenant, a URL, a task queue or a database row.
Times are monotonic seconds unless a name says otherwise; token ids are vocabulary indices of the served model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

AdapterVector = tuple[tuple[str, float], ...]
"""Adapters active for a sequence as (adapter digest, scale) pairs; () is the base model."""


def effective(adapters: AdapterVector) -> AdapterVector:
    """What a vector does, in one form: sorted, and without the scales 0, which change nothing."""
    return tuple(sorted((digest, scale) for digest, scale in adapters if scale != 0.0))


DEFAULT_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""The order in which llama.cpp's server chains its samplers by default."""
KNOWN_SAMPLERS = (*DEFAULT_SAMPLERS, "infill")
"""infill: for fill-in-the-middle, ends the answer where all its continuations together are less likely than its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtBound:
    """So many tokens of thoughts at most; then `end_tokens` come, and the answer goes on.

    start, end: the tags around them, as text. end_tokens: the tag behind them. is_open: the prompt ends within
    thoughts; else the answer may begin with the tag before them.
    """

    num_tokens: int
    start: str
    end: str
    end_tokens: tuple[int, ...]
    is_open: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Names and defaults are llama.cpp's; ranges are checked before they come here."""

    temperature: float = 0.8
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_keep: int = 0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS
    seed: int | None = None
    """None draws a fresh seed; the seed used is in the receipt."""
    grammar: str | None = None
    """GBNF that the answer must follow; checked before it comes here (inference/structured)."""
    shown_tokens: tuple[int, ...] = ()
    """Control tokens whose text is part of the answer: marks of a tool call, which are otherwise not seen."""
    num_probs: int = 0
    """Most probable tokens to report beside each one that is chosen; 0 reports nothing."""
    post_sampling_probs: bool = False
    """Report probabilities as the samplers left them, not as the model gave them."""
    thoughts: ThoughtBound | None = None
    """None leaves it to the model when its thoughts end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """Bounds on the drafts of one sequence. They change how fast tokens come, never which.

    num_min: a draft shorter than this is thrown away. num_max: the longest draft of a step; 0 drafts nothing.
    min_probability: a draft model stops guessing below this.
    """

    num_min: int = 0
    num_max: int = 16
    min_probability: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How a sequence is run, beside how its tokens are chosen.

    context_shift: go on where the slot's context is full, without num_discard of the tokens behind the first
    num_keep. num_keep: -1 is the whole prompt. num_discard: 0 is half of what is not kept. slot_id: the slot to wait
    for, None is any; every cache_scope has its own numbers, 0 to n_slots - 1. speculation: None leaves it to the
    model's settings. max_decode_seconds: end with the first line break that comes after so much time of generating.
    min_indent: end where a line behind the first has something else than a blank or tab before so many of these.
    """

    context_shift: bool = False
    num_keep: int = 0
    num_discard: int = 0
    slot_id: int | None = None
    speculation: Speculation | None = None
    max_decode_seconds: float | None = None
    min_indent: int = 0


class Pooling(StrEnum):
    """How the vectors of an input's tokens become one; llama.cpp's words."""

    NONE = "none"
    """They stay as they are, one for each token."""
    MEAN = "mean"
    CLS = "cls"
    """The first token's."""
    LAST = "last"


EUCLIDEAN = 2
MAX_NORM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Vectors of texts, wanted in the place of an answer.

    lengths: of the inputs in tokens, 1..n_ctx each, which the prompt has one behind the other. normalize, as llama.cpp
    counts: -1 leaves pooled vectors as they are, 0 scales the largest number to 32760, p from 1 on makes their p-norm
    1; vectors of single tokens are never scaled. dimensions: only so many first numbers of each are wanted.
    """

    lengths: tuple[int, ...]
    pooling: Pooling
    normalize: int = EUCLIDEAN
    dimensions: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate, or inputs to embed.

    prompt: 1..n_ctx-1 token ids. max_tokens: 0 computes the prompt alone; generation also ends at the slot's context
    limit, unless decoding.context_shift. embedding: no text is wanted but vectors; of the other fields only adapters
    and deadline matter then.
    stop: strings that end generation and are not part of the text. deadline: monotonic seconds. cache_scope: whose
    computed tokens may be reused, and may reuse these; None shares with nobody. cache_prompt: whether it reuses any.
    is_patient: nobody waits for it; it stands back while others have no first token.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    decoding: Decoding = field(default_factory=Decoding)
    stop: tuple[str, ...] = ()
    deadline: float | None = None
    adapters: AdapterVector = ()
    cache_scope: str | None = None
    cache_prompt: bool = True
    embedding: Embedding | None = None
    is_patient: bool = False


class FinishReason(StrEnum):
    EOS = "eos"
    STOP = "stop"
    """A stop string was generated."""
    LENGTH = "length"
    """max_tokens, or the slot's context, is used up; or all is computed where no text is wanted."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was really computed for one sequence; of its prompt, all but the cached_tokens.

    completion_tokens counts every token that was sampled and committed, those of a stop string and of a held-back
    character included. batch_sequences sums, over the num_steps executed plans that carried this sequence, how many
    sequences each carried; batch_sequences / num_steps is the mean batch size. decode_steps and
    decode_batch_sequences are the same over the plans in which this sequence was generating. drafted_tokens were
    verified, accepted_tokens of them were right. is_truncated: the context was full, and was shifted or ended the
    answer. held_tokens: what the slot held at the end. slot_id: the number of the slot in its cache_scope. num_parks:
    how often it made room for another, parked_seconds: for how long in all; decode_seconds has these in it.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_steps: int = 0
    batch_sequences: int = 0
    decode_steps: int = 0
    decode_batch_sequences: int = 0
    is_truncated: bool = False
    held_tokens: int = 0
    num_parks: int = 0
    parked_seconds: float = 0.0
    slot_id: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The sequence has a slot, by its number in the cache_scope; the slot has num_cached tokens of its prompt, and the
    next ones are in the next step."""

    request_id: str
    slot_id: int
    num_cached: int = 0


@dataclass(frozen=True, slots=True)
class TokenProbs:
    """A token, its natural log-probability (-inf for 0), the bytes of its text (b"" for control tokens), and, of one
    that was chosen, the most probable ones in its place, best first."""

    token: int
    logprob: float
    piece: bytes = b""
    top: tuple[TokenProbs, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is final: whole characters, and no prefix of a stop string. tokens may be empty while text is held.

    probs: one for each of tokens where the request asked for them, else empty.
    """

    request_id: str
    text: str
    tokens: tuple[int, ...] = ()
    probs: tuple[TokenProbs, ...] = ()


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors of one input, by its place in Embedding.lengths. data: 32-bit floats, little-endian, num_vectors of
    the same length one behind the other; one where they are pooled, else one a token."""

    request_id: str
    index: int
    num_vectors: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence, always sent exactly once. error is set where reason is ERROR."""

    request_id: str
    reason: FinishReason
    receipt: Receipt
    stop_word: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Parked:
    """The sequence has made room for another; it goes on when a slot is free."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """The sequence goes on where it was parked."""

    request_id: str
    seconds: float


TokenEvent = Started | Delta | Embedded | Parked | Resumed | Finished

EventSink = Callable[[Sequence[TokenEvent]], None]
"""Called on the engine's thread once per step with that step's events in order. It must not block or raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotTask:
    """What a slot computes, or computed last, in tokens: num_processed of the prompt's num_prompt beside the
    num_cached; num_decoded were generated, num_remaining may be, or might have been."""

    request_id: str
    num_prompt: int
    num_cached: int
    num_processed: int
    num_decoded: int
    num_remaining: int


@dataclass(frozen=True, slots=True)
class SlotReport:
    """A slot that is busy or holds something. number: what its scope calls it. request_id: what runs in it now. task:
    the same, or what ran in it last, if what it holds comes from that. adapters: what its tokens were computed with."""

    slot_id: int
    scope: str | None
    number: int
    request_id: str | None = None
    num_held: int = 0
    task: SlotTask | None = None
    adapters: AdapterVector = ()


class EngineError(Exception):
    """A request that the engine cannot take; `code` is stable, the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
