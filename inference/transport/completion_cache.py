"""Completions that were computed before, for identical requests of the same tenant. Redis alone; any thread.

Bounded per value and per tenant, since the server keeps everything else too. A cache that fails is a miss.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

import orjson
import redis
from django.conf import settings

from accounts import redis_client
from inference import metrics
from inference.chat.thinking import Opening
from inference.engine.types import AdapterVector, Decoding, SamplingParams
from inference.transport.lua import script

logger = logging.getLogger(__name__)

MAX_VALUE_BYTES = 64 * 1024
MAX_ENTRIES_PER_TENANT = 2000
_sampling_values = attrgetter(*(item.name for item in fields(SamplingParams)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What is kept of an answer."""

    output: str
    finish_reason: str
    stop_word: str | None
    prompt_tokens: int
    completion_tokens: int


def key(
    *,
    tenant_id: int,
    model_digest: str,
    adapters: AdapterVector,
    prompt: str | tuple[int, ...],
    max_tokens: int | None,
    sampling: SamplingParams,
    opening: Opening | None,
    max_thought: int | None,
    decoding: Decoding,
    stop: tuple[str, ...],
    n_ctx: int,
    max_output: int | None,
) -> str:
    """Everything that the answer depends on, as one hash. A text and its own tokens are two keys: that costs a miss."""
    shift = decoding.context_shift and (decoding.num_keep, decoding.num_discard)
    is_bounded = sampling.grammar is not None or max_thought is not None
    thoughts = (astuple(opening), max_thought) if opening and is_bounded else None
    ends = stop, decoding.min_indent, decoding.max_decode_seconds
    parts = [model_digest, adapters, prompt, max_tokens, _sampling_values(sampling), thoughts, shift, ends]
    parts += [n_ctx, max_output]
    return f"{tenant_id}:{hashlib.sha256(orjson.dumps(parts)).hexdigest()}"


class CompletionCache:
    """`ttl_seconds` 0 switches it off."""

    def __init__(self, client: redis.Redis, ttl_seconds: int) -> None:
        self._client = client
        self._ttl_seconds = ttl_seconds
        self._get = script(client, "cache_get")
        self._put = script(client, "cache_put")
        metrics.CACHE_ENABLED.set(int(self.is_on))

    @property
    def is_on(self) -> bool:
        return self._ttl_seconds > 0

    def get(self, cache_key: str, *, model_id: str, kind: str = "single") -> Completion | None:
        """One round trip. kind: single or batch, a label of the metrics."""
        if not self.is_on:
            return None
        started = time.perf_counter()
        try:
            body = self._get(keys=_names(cache_key))
        except redis.RedisError as error:
            logger.warning("the completion cache does not answer: %s", error)
            return None
        metrics.CACHE_SECONDS.labels(model_id, kind).observe(time.perf_counter() - started)
        found = _parsed(body) if body else None
        (metrics.CACHE_HITS if found else metrics.CACHE_MISSES).labels(model_id, kind).inc()
        return found

    def put_command(self, cache_key: str, completion: Completion) -> list[Any] | None:
        """A command for the pipeline that also publishes the end, or None where it is not to be kept.

        EVAL with the whole script: a server that was restarted since has forgotten its hash.
        """
        body = orjson.dumps(completion)
        if not self.is_on or not completion.output or len(body) > MAX_VALUE_BYTES:
            return None
        return ["EVAL", self._put.script, 2, *_names(cache_key), body, self._ttl_seconds, MAX_ENTRIES_PER_TENANT]

    def put(self, cache_key: str, completion: Completion) -> None:
        """Keep it now; `put_command` saves the round trip."""
        if command := self.put_command(cache_key, completion):
            self._client.execute_command(*command)  # type: ignore[no-untyped-call]


def _parsed(body: bytes) -> Completion | None:
    """None for what another version has kept."""
    try:
        return Completion(**orjson.loads(body))
    except (TypeError, ValueError) as error:
        logger.warning("a kept completion is not readable: %s", error)
        return None


def _names(cache_key: str) -> list[str]:
    return [f"completion:{cache_key}", f"completions:{cache_key.partition(':')[0]}"]


@lru_cache(maxsize=1)
def completion_cache() -> CompletionCache:
    """The cache on this process's client."""
    return CompletionCache(redis_client.client(), settings.CONFIG.completion_cache_ttl_seconds)
