"""Idempotency keys: who answers first, and what the others are given. Redis behind Lua, called from any thread.

A record belongs to a tenant, a route and a key, and lives IDEMPOTENCY_HOURS. Knows no HTTP but a status, headers and a
body. Where Redis has lost its memory a key is new again: that request is computed and charged once more.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

import orjson
import redis
from django.conf import settings

from accounts import redis_client
from accounts.trail.refusals import Refusal
from inference.transport.lua import script

KEY = re.compile(r"[\x21-\x7e]{1,255}")
PATIENCE_SECONDS = 10.0
"""A request with a key goes on for so long without a reader: its client may be about to ask again."""
MODEL = ":model"
"""Beside the headers of an answer, and the name of none."""
CLAIM_SECONDS_MORE = 120.0
"""A claim without a ticket is void this long after its request must have ended."""


class State(StrEnum):
    """What a claim found: see lua/idem_claim.lua."""

    FIRST = "first"
    RUNNING = "running"
    WAITING = "waiting"
    ANSWERED = "answered"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Answer:
    """One that was given before, to the byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    model: str = ""
    """Whoever is given it must be allowed to use this; empty in records of before it was kept."""


@dataclass(frozen=True, slots=True)
class Claim:
    """state says what to do; request_id is the request that answers, where there is one."""

    state: State
    request_id: str = ""
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where the answer to one key is kept."""

    tenant_id: int
    record: str
    fingerprint: str


def place_of(tenant_id: int, route: str, key: str, body: bytes) -> Place:
    """Two bodies are the same if they are the same JSON. Raises Refusal for a key that is none."""
    if not KEY.fullmatch(key):
        raise Refusal("bad_request", "An Idempotency-Key has 1 to 255 visible ASCII characters, and no blank.")
    name = hashlib.sha256(f"{route}\n{key}".encode()).hexdigest()[:40]
    return Place(tenant_id, f"idem:{tenant_id}:{name}", hashlib.sha256(_canonical(body)).hexdigest())


def _canonical(body: bytes) -> bytes:
    try:
        return orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return body  # it will be refused for that


class Records:
    """All idempotency records of an installation. Every method is one round trip and raises redis.RedisError."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._claim = script(client, "idem_claim")
        self._keep = script(client, "idem_keep")
        self._release = script(client, "idem_release")

    def claim(self, place: Place, request_id: str, web: str) -> Claim:
        """Of any number that claim at once one is FIRST. Raises Refusal for a key that was used with another body."""
        stale = settings.CONFIG.generation_timeout_seconds + CLAIM_SECONDS_MORE
        args: list[Any] = [place.fingerprint, request_id, web, ttl_seconds(), stale]
        word, *rest = self._claim(keys=[place.record], args=args)
        if word == b"conflict":
            raise Refusal(
                "idempotency_key_conflict",
                "This Idempotency-Key was used with another body. Use a new key for a new request.",
            )
        state = State(word.decode())
        found = rest[0].decode() if rest else ""
        return Claim(state, found, _unpack(*rest[1:]) if state is State.ANSWERED else None)

    def keep(self, place: Place, request_id: str, answer: Answer) -> bool:
        """Whoever claims the key from now on is given this. False where another has answered."""
        most = settings.CONFIG.idempotent_answers_mb << 20
        args: list[Any] = [request_id, answer.status, _pack(answer), zlib.compress(answer.body, 1)]
        names = [place.record, f"kept:{place.tenant_id}:order", f"kept:{place.tenant_id}:sizes"]
        return bool(self._keep(keys=names, args=[*args, ttl_seconds(), most, settings.CONFIG.stream_kept_seconds]))

    def release(self, place: Place, request_id: str) -> bool:
        """There is no answer: the key may be used again, if nothing is charged. False where it may not."""
        return bool(self._release(keys=[place.record], args=[request_id, 0]))

    def lose(self, place: Place, request_id: str) -> bool:
        """Something may have been charged and there is no answer to keep."""
        return bool(self._release(keys=[place.record], args=[request_id, 1]))


def _unpack(status: bytes, headers: bytes, body: bytes) -> Answer:
    values: dict[str, str] = orjson.loads(headers)
    model = values.pop(MODEL, "")
    return Answer(int(status), values, zlib.decompress(body), model)


def _pack(answer: Answer) -> bytes:
    return orjson.dumps({**answer.headers, MODEL: answer.model} if answer.model else answer.headers)


def ttl_seconds() -> int:
    return int(settings.CONFIG.idempotency_hours * 3600)


@lru_cache(maxsize=1)
def records() -> Records:
    """Those on this process's client."""
    return Records(redis_client.client())
