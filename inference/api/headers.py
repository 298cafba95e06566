"""Headers that every answer of every dialect carries, and what the request's door left in its ASGI scope.

Pure but for reading the scope: `llmsite.request_id` and `llmsite.log` are written by llmsite/guard.py.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from django.http import HttpRequest, HttpResponseBase

from accounts.limits.precedence import MAX_LIMIT

UNLIMITED = str(MAX_LIMIT)
"""Stands for "no limit" in x-ratelimit-limit-*: the headers are always there and always whole numbers."""


class Rate(Protocol):
    """As much of accounts.limits.throttling.RateState as the headers say."""

    @property
    def limit(self) -> int | None: ...

    @property
    def remaining(self) -> int | None: ...

    @property
    def reset_seconds(self) -> float | None: ...


def request_id_of(request: HttpRequest) -> str:
    """The guard's id; where no guard stands in front (Django's test client) one made here, once."""
    scope: dict[str, Any] = getattr(request, "scope", None) or request.META
    found: str | None = scope.get("llmsite.request_id")
    if found is None:
        found = scope["llmsite.request_id"] = str(uuid.uuid4())
    return found


def log_fields(request: HttpRequest) -> dict[str, Any]:
    """What is put here ends up in the request's log line. Never a prompt, never a key."""
    scope: dict[str, Any] = getattr(request, "scope", None) or request.META
    fields: dict[str, Any] = scope.setdefault("llmsite.log", {})
    return fields


def rate_headers(kind: str, rate: Rate | None) -> dict[str, str]:
    """x-ratelimit-{limit,remaining,reset}-{requests,tokens}. A rate of None is one that nothing bounds."""
    if rate is None or rate.limit is None:
        limit, remaining, reset = UNLIMITED, UNLIMITED, "0s"
    else:
        limit, remaining = str(rate.limit), str(max(0, rate.remaining or 0))
        reset = duration(rate.reset_seconds or 0)
    return {
        f"x-ratelimit-limit-{kind}": limit,
        f"x-ratelimit-remaining-{kind}": remaining,
        f"x-ratelimit-reset-{kind}": reset,
    }


def anthropic_rate_headers(kind: str, rate: Rate | None, *, now: datetime | None = None) -> dict[str, str]:
    """anthropic-ratelimit-{requests,tokens}-{limit,remaining,reset}, where a reset is a moment. None as above."""
    moment = now or datetime.now(UTC)
    if rate is None or rate.limit is None:
        limit, remaining = UNLIMITED, UNLIMITED
    else:
        limit, remaining = str(rate.limit), str(max(0, rate.remaining or 0))
        moment += timedelta(seconds=math.ceil(rate.reset_seconds or 0))
    return {
        f"anthropic-ratelimit-{kind}-limit": limit,
        f"anthropic-ratelimit-{kind}-remaining": remaining,
        f"anthropic-ratelimit-{kind}-reset": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def duration(seconds: float) -> str:
    """As OpenAI writes resets: 12ms, 1s, 6m0s, 1h2m3s. Rounded up: who waits that long has waited enough."""
    milliseconds = max(0, -int(-seconds * 1000 // 1))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    whole = -(-milliseconds // 1000)
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    text = f"{rest}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def usage_headers(prompt_tokens: int, completion_tokens: int) -> dict[str, str]:
    return {
        "X-Usage-Prompt-Tokens": str(prompt_tokens),
        "X-Usage-Completion-Tokens": str(completion_tokens),
        "X-Usage-Total-Tokens": str(prompt_tokens + completion_tokens),
    }


def server_timing(seconds: Mapping[str, float]) -> str:
    """https://www.w3.org/TR/server-timing/: durations in milliseconds."""
    return ", ".join(f"{name};dur={value * 1000:.1f}" for name, value in seconds.items())


def add_headers(response: HttpResponseBase, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        response.headers[name] = value
