"""The ticket: an admitted request on its way from the web to a worker, through Redis. The request's clock.

Written by admission, read by the worker, the reaper and settlement. Its form carries a version, so that web and worker
can be upgraded one by one; what a reader does not understand, it refuses. The prompt travels beside the header, as it
leaves Redis when a worker takes the ticket.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import orjson

from inference.engine.types import (
    AdapterVector,
    Decoding,
    Embedding,
    Pooling,
    SamplingParams,
    Speculation,
    ThoughtBound,
    effective,
)

VERSION = 1
PROMPT_TYPE = "i"  # 32 bits, the byte order of the machine: web and worker are both little-endian


class TicketError(Exception):
    """Bytes that are no ticket of this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What a worker needs to serve a request, and whoever ends it to settle it. Times are Unix seconds."""

    request_id: str
    tenant_id: int
    key_id: int
    quota_key_id: int
    """The key whose quota and rates count: the first of a rotation."""
    pool: str
    model_id: int
    model_name: str
    model_digest: str
    num_prompt_tokens: int
    max_tokens: int
    route: str
    created_at: float
    queue_deadline_at: float
    deadline_at: float
    reserved_tokens: int
    """Held on the monthly quota."""
    entered_tokens: int
    """Taken from the tokens a minute."""
    stream: bool = False
    return_tokens: bool = False
    """The events carry token ids beside the text."""
    clamped: bool = False
    """The quota left less than was asked."""
    parent_id: str = ""
    """The batch that this request is a part of."""
    cache_key: str | None = None
    keep_alive_seconds: float | None = None
    """How long the model is to stay loaded for this request's sake; None: as its settings say."""
    stop: tuple[str, ...] = ()
    adapters: AdapterVector = ()
    adapter_names: tuple[str, ...] = ()
    """What the tenant calls each of the adapters."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs of an alias that was asked for and the adapter that stands for it."""
    prefix_cache: bool = True
    is_batch: bool = False
    """A line of a batch: it waits behind interactive work, and its end is kept until the batch has it."""
    shares_prompt: bool = False
    """The prompt is another's of the same request, which pays for it: this one is charged its output alone."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    decoding: Decoding = field(default_factory=Decoding)
    embedding: Embedding | None = None
    """Vectors of the prompt's inputs are wanted, and no answer."""
    prompt: tuple[int, ...] = ()
    """Empty for whoever only ends the request."""

    @property
    def charged_prompt_tokens(self) -> int:
        return 0 if self.shares_prompt else self.num_prompt_tokens

    @property
    def group(self) -> str:
        """Of the model's sequences that a step can carry together: those of one adapter vector."""
        vector = repr(effective(self.adapters)).encode()
        return f"{self.model_id}:{zlib.crc32(vector):08x}"

    def header(self) -> bytes:
        """Everything but the prompt, as JSON."""
        values: dict[str, Any] = {name: getattr(self, name) for name in HEADER_NAMES}
        for name in YOUNG:
            if values[name] == YOUNG[name]:
                del values[name]  # readers of before it was there know nothing of it
        values["v"] = VERSION
        values["sampling"] = _differences(self.sampling, DEFAULTS)
        if decoding := _differences(self.decoding, DECODING_DEFAULTS):
            values["decoding"] = decoding  # absent, too, it has its defaults
        if self.embedding:
            values["embedding"] = self.embedding
        return orjson.dumps(values)

    def prompt_bytes(self) -> bytes:
        return array(PROMPT_TYPE, self.prompt).tobytes()

    @staticmethod
    def parse(header: bytes, prompt: bytes = b"") -> Ticket:
        """Raises TicketError for anything that `header` and `prompt_bytes` did not write."""
        try:
            values = orjson.loads(header)
        except orjson.JSONDecodeError as error:
            raise TicketError("a ticket must be JSON") from error
        if not isinstance(values, dict) or values.pop("v", None) != VERSION:
            raise TicketError(f"a ticket must be an object of version {VERSION}")
        for name in YOUNG:
            values.setdefault(name, YOUNG[name])
        values.setdefault("decoding", {})
        values.setdefault("embedding", None)
        if set(values) != HEADER_SET:
            raise TicketError(f"fields of the ticket are not those of version {VERSION}: {set(values) ^ HEADER_SET}")
        for name, kind in HEADER_TYPES.items():
            if type(values[name]) not in kind:
                raise TicketError(f"{name} of the ticket has the wrong type")
        values["stop"] = _strings(values["stop"])
        values["adapter_names"] = _strings(values["adapter_names"])
        values["adapters"] = _adapters(values["adapters"])
        values["aliases"] = _pairs(values["aliases"])
        values["sampling"] = _sampling(values["sampling"])
        values["decoding"] = _decoding(values["decoding"])
        values["embedding"] = _embedding(values["embedding"])
        return Ticket(**values, prompt=_prompt(prompt, values["num_prompt_tokens"]))


def adapter_scales(names: Sequence[str], adapters: AdapterVector) -> list[list[str | float]]:
    """Pairs of name and scale, as receipts keep them."""
    return [[name, scale] for name, (_, scale) in zip(names, adapters, strict=False)]


BESIDE = {"prompt", "sampling", "decoding", "embedding"}
"""Fields that are written in a way of their own."""
HEADER_NAMES = tuple(item.name for item in fields(Ticket) if item.name not in BESIDE)
YOUNG: dict[str, Any] = {
    "return_tokens": False,
    "is_batch": False,
    "shares_prompt": False,
    "keep_alive_seconds": None,
    "aliases": (),
}
"""What the first tickets of this version did not have, and what its absence means."""
HEADER_SET = {*HEADER_NAMES, "sampling", "decoding", "embedding"}
HEADER_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(["request_id", "pool", "model_name", "model_digest", "route", "parent_id"], (str,)),
    **dict.fromkeys(["tenant_id", "key_id", "quota_key_id", "model_id", "num_prompt_tokens", "max_tokens"], (int,)),
    **dict.fromkeys(["reserved_tokens", "entered_tokens"], (int,)),
    **dict.fromkeys(["created_at", "queue_deadline_at", "deadline_at"], (float, int)),
    **dict.fromkeys(["stream", "clamped", "prefix_cache", "return_tokens", "shares_prompt"], (bool,)),
    "keep_alive_seconds": (float, int, type(None)),
    "cache_key": (str, type(None)),
    "stop": (list,),
    "adapters": (list,),
    "adapter_names": (list,),
    "aliases": (list, tuple),
    "sampling": (dict,),
    "decoding": (dict,),
    "embedding": (dict, type(None)),
}
DEFAULTS = {item.name: getattr(SamplingParams(), item.name) for item in fields(SamplingParams)}
DECODING_DEFAULTS = {item.name: getattr(Decoding(), item.name) for item in fields(Decoding)}
SPECULATION_DEFAULTS = {item.name: getattr(Speculation(), item.name) for item in fields(Speculation)}
OPTIONAL: dict[str, type] = {"seed": int, "grammar": str, "slot_id": int, "max_decode_seconds": float}
"""The types of those whose default is None."""


def _differences(params: object, defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = ((name, getattr(params, name)) for name in defaults)
    return {name: value for name, value in values if value != defaults[name]}


def _sampling(values: dict[str, Any]) -> SamplingParams:
    for name, value in values.items():
        if name == "logit_bias" and isinstance(value, list):
            values[name] = tuple((int(token), -math.inf if bias is None else float(bias)) for token, bias in value)
        elif name == "shown_tokens" and isinstance(value, list):
            values[name] = _whole_numbers(value)
        elif name == "thoughts" and isinstance(value, dict):
            values[name] = _thoughts(value)
        else:
            values[name] = _parameter(name, value, DEFAULTS)
    return SamplingParams(**values)


def _thoughts(values: dict[str, Any]) -> ThoughtBound:
    kinds = {name: type(value) for name, value in values.items()}
    if kinds != {"num_tokens": int, "start": str, "end": str, "end_tokens": list, "is_open": bool}:
        raise TicketError("how the ticket bounds thoughts is not readable")
    return ThoughtBound(**{**values, "end_tokens": _whole_numbers(values["end_tokens"])})


def _decoding(values: dict[str, Any]) -> Decoding:
    for name, value in values.items():
        if name == "speculation" and isinstance(value, dict):
            bounds = {key: _parameter(key, bound, SPECULATION_DEFAULTS) for key, bound in value.items()}
            values[name] = Speculation(**bounds)
        else:
            values[name] = _parameter(name, value, DECODING_DEFAULTS)
    return Decoding(**values)


def _embedding(values: dict[str, Any] | None) -> Embedding | None:
    if values is None:
        return None
    try:
        lengths, pooling = _whole_numbers(values.pop("lengths")), Pooling(values.pop("pooling"))
        if not all(value is None or type(value) is int for value in values.values()):
            raise TypeError("a whole number was expected")
        return Embedding(lengths=lengths, pooling=pooling, **values)
    except (KeyError, TypeError, ValueError) as error:
        raise TicketError(f"what the ticket wants embedded is not readable: {error}") from error


def _parameter(name: str, value: Any, defaults: Mapping[str, Any]) -> Any:
    """A value of the type of its default. Raises TicketError for another, or a name that is not known."""
    default = defaults.get(name, ...)
    if isinstance(default, tuple):
        return _strings(value)
    kind = OPTIONAL.get(name) if default is None else type(default)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TicketError(f"parameter {name} of the ticket is unknown or has the wrong type")
    return value


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TicketError("a list of strings was expected in the ticket")
    return tuple(value)


def _whole_numbers(value: list[Any]) -> tuple[int, ...]:
    if not all(type(item) is int for item in value):
        raise TicketError("a list of whole numbers was expected in the ticket")
    return tuple(value)


def _adapters(value: list[Any]) -> AdapterVector:
    try:
        return tuple((str(digest), float(scale)) for digest, scale in value)
    except (TypeError, ValueError) as error:
        raise TicketError("adapters of the ticket must be pairs of digest and scale") from error


def _pairs(value: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    try:
        return tuple((str(alias), str(name)) for alias, name in value)
    except (TypeError, ValueError) as error:
        raise TicketError("aliases of the ticket must be pairs of names") from error


def _prompt(data: bytes, number: int) -> tuple[int, ...]:
    if not data:
        return ()
    tokens = array(PROMPT_TYPE)
    if len(data) != number * tokens.itemsize:
        raise TicketError("the prompt of the ticket does not have the length that its header says")
    tokens.frombytes(data)
    return tuple(tokens)
