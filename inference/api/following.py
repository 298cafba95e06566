"""A request that has been admitted, seen from the event loop: its events, its end, and its cancel. For every dialect.

One StreamReader per event loop serves all requests of the process; nothing here holds a thread while it waits.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings

from accounts.trail.refusals import Refusal
from inference.api import cancelling
from inference.engine.types import TokenProbs
from inference.transport.completion_cache import Completion
from inference.transport.stream import SlowFollower, StreamEvent, StreamReader

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length", "cancelled": "cancelled"}
"""From the engine's word to the one that clients know; every other end is an error."""

_readers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, StreamReader] = weakref.WeakKeyDictionary()


def reader() -> StreamReader:
    """The reader of the running loop; it connects at its first `follow`."""
    loop = asyncio.get_running_loop()
    found = _readers.get(loop)
    if found is None:
        found = _readers[loop] = StreamReader(settings.REDIS_URL)
    return found


async def close_reader() -> None:
    found = _readers.pop(asyncio.get_running_loop(), None)
    if found is not None:
        await found.stop()


@dataclass(slots=True)
class Ending:
    """How a request ended. `receipt`: the fields of engine.types.Receipt, or nothing where nothing was computed."""

    reason: str
    stop_word: str | None = None
    error: str | None = None
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def finish_reason(self) -> str | None:
        """None where the request failed."""
        return None if self.error else FINISH_REASONS.get(self.reason)

    @property
    def prompt_tokens(self) -> int:
        return int(self.receipt.get("prompt_tokens", 0))

    @property
    def completion_tokens(self) -> int:
        return int(self.receipt.get("completion_tokens", 0))

    def seconds(self) -> dict[str, float]:
        """For Server-Timing."""
        return {name: float(self.receipt.get(f"{name}_seconds", 0.0)) for name in ("queue", "prefill", "decode")}


def ending_of(event: StreamEvent) -> Ending:
    data = event.data
    return Ending(data["reason"], data.get("stop_word"), data.get("error"), data.get("receipt") or {})


def ending_of_cached(found: Completion) -> Ending:
    """As the request ended that was computed."""
    reason = found.finish_reason if found.finish_reason in FINISH_REASONS else "stop"
    receipt = {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens}
    return Ending(reason, found.stop_word, receipt=receipt)


LOST = ("worker_lost", "The worker died during this request; nothing is charged.", 1)
STOPPING = ("service_unavailable", "The worker is stopping; nothing is charged.", 2)
CANCELLED = ("request_cancelled", "The request was cancelled.", None)
NOT_TAKEN = ("validation_error", "The model does not take these parameters; nothing is charged.", None)
UNTIL_THEN = "What was generated until then is charged."
FAILURES: dict[str, tuple[str, str, float | None]] = {
    "worker_lost": LOST,
    "request_lost": LOST,
    "engine_crashed": LOST,
    "worker_stopping": STOPPING,
    "engine_stopped": STOPPING,
    "queue_full": STOPPING,
    "queue_timeout": ("queue_timeout", "No slot became free in time; nothing is charged.", 5),
    "deadline": ("generation_timeout", "The request did not end within its time.", None),
    "cancelled": CANCELLED,
    "key_revoked": ("key_revoked", f"This API key was revoked during the request. {UNTIL_THEN}", None),
    "key_expired": ("expired_api_key", f"This API key expired during the request. {UNTIL_THEN}", None),
    "tenant_suspended": ("tenant_suspended", f"The tenant was suspended during the request. {UNTIL_THEN}", None),
    "model_withdrawn": ("model_withdrawn", f"The tenant lost this model during the request. {UNTIL_THEN}", None),
    "adapter_withdrawn": (
        "adapter_withdrawn",
        f"The tenant lost an adapter of this request during it. {UNTIL_THEN}",
        None,
    ),
    "quota_exhausted": (
        "quota_exhausted",
        f"The quota was lowered during the request and does not cover it any more. {UNTIL_THEN}",
        None,
    ),
    "llm_unavailable": ("llm_unavailable", "The model cannot be loaded; nothing is charged.", 30),
    "model_does_not_fit": (
        "model_does_not_fit",
        "The model needs more memory than this server has for it; nothing is charged. Its operator can help.",
        None,
    ),
    "adapter_not_loaded": ("adapter_not_found", "An adapter was removed before its turn; nothing is charged.", None),
    "adapter_file_invalid": ("llm_unavailable", "An adapter cannot be loaded; nothing is charged.", 30),
    "adapters_not_supported": NOT_TAKEN,
    "embeddings_not_supported": (
        "capability_not_supported",
        "The operator has switched embeddings off; nothing is charged.",
        None,
    ),
    "invalid_request": NOT_TAKEN,
    "invalid_sampling": NOT_TAKEN,
    "invalid_token": NOT_TAKEN,
    "invalid_grammar": ("invalid_grammar", "The model cannot follow this grammar; nothing is charged.", None),
    "grammar_dead_end": (
        "grammar_dead_end",
        "No token is left that the grammar allows: logit_bias bans what it needs, or the vocabulary lacks it. Nothing "
        "is charged but what was streamed.",
        None,
    ),
    "grammar_too_slow": (
        "invalid_grammar",
        "This grammar takes too long to follow. Nothing is charged but what was streamed.",
        None,
    ),
}
"""From the worker's and the engine's words to the refusal that a client reads: code, message, seconds to wait."""


def failure(ending: Ending) -> Refusal:
    """Why a request that was admitted has no answer."""
    word = ending.error or ending.reason
    if word not in FAILURES:
        return Refusal("generation_failed", "The model failed on this request; nothing is charged.", reason=word[:64])
    code, message, retry_after = FAILURES[word]
    return Refusal(code, message, retry_after=retry_after)


@dataclass(slots=True)
class Collected:
    """A whole answer."""

    text: str
    ending: Ending
    tokens: list[int] = field(default_factory=list)
    """Empty unless the ticket asks for them."""
    probs: list[TokenProbs] = field(default_factory=list)
    """One for each generated token, in their order, where the ticket's sampling.num_probs asks for them, else empty."""
    vectors: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Where no text was wanted: by the place of the input, (num_vectors, data) as in engine.types.Embedded."""


async def collect(request_id: str) -> Collected:
    """Wait for the end of a request. Raises Refusal where it has no answer."""
    parts: list[str] = []
    tokens: list[int] = []
    probs: list[TokenProbs] = []
    vectors: dict[int, tuple[int, bytes]] = {}
    async with reader().follow(request_id) as events:
        async for event in events:
            if event.kind == "delta":
                parts.append(event.data["text"])
                tokens += event.data.get("tokens", ())
                probs += event.probs()
            elif event.kind == "vectors":
                vectors |= event.vectors()
            elif event.kind == "finished":
                ending = ending_of(event)
                if ending.finish_reason is None or ending.finish_reason == "cancelled":
                    raise failure(ending)
                return Collected("".join(parts), ending, tokens, probs, vectors)
    raise failure(Ending("error", error="request_lost"))


def events_of_cached(found: Completion) -> tuple[StreamEvent, Ending, str]:
    """An answer from the completion cache as a stream has it: its one delta, its end, and the id of the end."""
    delta = StreamEvent("0-1", {"t": "delta", "text": found.output, "n": found.completion_tokens})
    return delta, ending_of_cached(found), "0-2"


async def follow(request_id: str, *, is_replay: bool = False) -> AsyncGenerator[StreamEvent]:
    """The start, deltas and the end. is_replay: much may be there already.

    Raises Refusal if the stream breaks off, or if its reader here was too slow: then that reader has left it, as no
    Refusal is taken for a client that goes.
    """
    last_id = "0"
    try:
        if is_replay:
            async for event in reader().past(request_id):
                yield event
                if event.kind == "finished":
                    return
                last_id = event.id
        async with reader().follow(request_id, last_id) as events:
            async for event in events:
                yield event
                if event.kind == "finished":
                    return
    except SlowFollower as error:
        cancelling.leave_soon(request_id)
        raise Refusal("client_too_slow", "The events were not read in time.") from error
    raise failure(Ending("error", error="request_lost"))
