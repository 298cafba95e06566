"""The minute's limits: requests a minute, tokens a minute, requests and streams at once. All counts are in Redis.

Called by admission's threads (blocking), and `leave` by settlement. Requests a minute count attempts, refused ones too;
tokens and places are taken together or not at all, for tenant and key, by one script. Without Redis the answers follow
the plan's redis_outage_policy, else that of the settings, and never are a 500.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import redis
from django.conf import settings
from django_ratelimit.core import get_usage
from redis.commands.core import Script

from accounts.identity.principals import Principal
from accounts.redis_client import client
from accounts.trail.refusals import Refusal

logger = logging.getLogger(__name__)

MINUTE = 60
FAILURES_PER_MINUTE = 100
"""Well-formed keys that do not exist or do not match, from one address."""
LOGINS_PER_MINUTE = 10
"""Passwords that did not match, at the console, from one address."""
LOGINS_OF_A_NAME_PER_MINUTE = 60
"""And for one name from anywhere: more, for whoever guesses keeps the owner of the name waiting as well."""
NOTED_LOGINS_PER_MINUTE = 120
"""Failed sign-ins that the audit log has a row for, whoever fails."""
ANONYMOUS_PER_MINUTE = 600
"""Requests without a key from one address, to what is public and costs work."""
OPEN_POLICY_REQUESTS_PER_MINUTE = 60
"""What a key may do in one process while Redis is away and the policy is `open`."""
LUA = Path(__file__).with_name("lua")
PREFIX = "accounts"


@dataclass(frozen=True, slots=True)
class RateState:
    """One limit as the x-ratelimit headers show it; all None where there is no limit."""

    limit: int | None = None
    remaining: int | None = None
    reset_seconds: float | None = None
    """Until all of it is there again."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What `enter` took: `leave` gives it back."""

    tokens: RateState


def count_request(principal: Principal, request: Any) -> RateState:
    """Counts one attempt; returns the tightest window. Raises Refusal: rate_limit_exceeded, service_unavailable.

    The requests a minute of a plan are a right of each key, as a role's are in the testing guide. Where the operator
    set the limit for a tenant, its keys share that number. A key's own limit narrows both. So one or two windows are
    counted: the tenant's if it has an override; the key's if it has its own limit or the tenant has no override.
    Windows are fixed (one minute, offset per key), so up to twice the limit may pass around an edge.
    """
    windows = [
        _use_window(request, group, who, limit, increment=True, policy=principal.outage_policy)
        for group, who, limit in _windows(principal)
        if limit is not None
    ]
    refused = [window for window in windows if window.is_over]
    if refused:
        raise _too_many_requests(max(refused, key=lambda window: window.seconds_left))
    return _tightest([window.state for window in windows])


def peek_requests(principal: Principal, request: Any) -> RateState:
    """As count_request, without counting or refusing. Raises Refusal service_unavailable."""
    windows = [
        _use_window(request, group, who, limit, increment=False, policy=principal.outage_policy).state
        for group, who, limit in _windows(principal)
        if limit is not None
    ]
    return _tightest(windows)


def count_failure(address: str) -> None:
    """Counts a key that failed. Raises Refusal rate_limit_exceeded for an address that fails too often.

    Only failures come here, so the keys of others behind the same address are not hurt. Without Redis nothing is
    counted: the caller refuses the key anyway.
    """
    retry_after = _over("failed-key:", address or "unknown", FAILURES_PER_MINUTE)
    if retry_after:
        raise Refusal(
            "rate_limit_exceeded",
            f"Too many invalid API keys from this address. Try again in {retry_after} s.",
            retry_after=retry_after,
            limit="failed_keys_per_minute",
            value=FAILURES_PER_MINUTE,
        )


def count_anonymous(address: str) -> None:
    """Counts a request without a key. Raises Refusal rate_limit_exceeded. Without Redis nothing is counted."""
    retry_after = _over("anonymous:", address or "unknown", ANONYMOUS_PER_MINUTE)
    if retry_after:
        raise Refusal(
            "rate_limit_exceeded",
            f"More than {ANONYMOUS_PER_MINUTE} requests a minute without a key from this address. "
            f"Try again in {retry_after} s.",
            retry_after=retry_after,
            limit="anonymous_requests_per_minute",
            value=ANONYMOUS_PER_MINUTE,
        )


def count_failed_login(address: str, name: str) -> None:
    """Counts a password that did not match. Without Redis nothing is counted."""
    for group, who, limit in _login_windows(address, name):
        _over(group, who, limit)


def login_wait(address: str, name: str) -> int:
    """Seconds until this address, or anybody with this name, may try a password again; 0: now."""
    return max(_over(group, who, limit, increment=False) for group, who, limit in _login_windows(address, name))


def may_note_login() -> bool:
    """Whether one more failed sign-in of this minute is worth a row of the audit log, whoever fails."""
    return not _over("noted-login:", "all", NOTED_LOGINS_PER_MINUTE)


def _login_windows(address: str, name: str) -> list[tuple[str, str, int]]:
    return [
        ("login-address:", address or "unknown", LOGINS_PER_MINUTE),
        ("login-name:", name.casefold()[:150], LOGINS_OF_A_NAME_PER_MINUTE),
    ]


def _over(group: str, who: str, limit: int, *, increment: bool = True) -> int:
    """Counts one more than `limit`, or looks whether one more would be: the seconds until the window ends, else 0."""
    try:
        usage = get_usage(
            None, group=group, key=lambda _group, _request: who, rate=(limit, MINUTE), increment=increment
        )
    except (redis.RedisError, OSError) as error:
        logger.warning("%s was not counted: %s", group.rstrip(":"), error)
        return 0
    if usage is None or usage["count"] + (not increment) <= limit:
        return 0
    return max(1, int(usage["time_left"]))


# Requests a minute


@dataclass(frozen=True, slots=True)
class _Window:
    group: str
    limit: int
    count: int
    seconds_left: int

    @property
    def is_over(self) -> bool:
        return self.count > self.limit or self.limit == 0

    @property
    def state(self) -> RateState:
        return RateState(self.limit, max(0, self.limit - self.count), float(self.seconds_left))


def _windows(principal: Principal) -> list[tuple[str, str, int | None]]:
    """(group, who, limit) of the windows that bind this key; group names end with a colon (see django-ratelimit)."""
    name = "requests_per_minute"
    is_shared = name in principal.tenant_overrides
    key = ("key:", str(principal.quota_key_id), principal.limit(name))
    if not is_shared:
        return [key]
    tenant = ("tenant:", str(principal.tenant_id), principal.tenant_limits.requests_per_minute)
    return [tenant] if principal.key_limits.requests_per_minute is None else [tenant, key]


def _use_window(request: Any, group: str, who: str, limit: int | None, *, increment: bool, policy: str = "") -> _Window:
    """One window of django-ratelimit, which counts first and compares then, and lets errors of Redis through."""
    assert limit is not None
    try:
        usage = get_usage(
            request, group=group, key=lambda _group, _request: who, rate=(limit, MINUTE), increment=increment
        )
    except (redis.RedisError, OSError) as error:
        return _window_without_redis(group, who, limit, error, policy)
    if usage is None:  # RATELIMIT_ENABLE is off
        return _Window(group, limit, 0 if limit else 1, MINUTE)
    if usage["time_left"] < 0 and not usage["count"]:
        # the cache gave no answer; -1 alone only means that the clock ticked at the edge of a window
        return _window_without_redis(group, who, limit, None, policy)
    return _Window(group, limit, usage["count"], max(1, usage["time_left"]))


def _window_without_redis(group: str, who: str, limit: int, error: BaseException | None, policy: str) -> _Window:
    if (policy or settings.CONFIG.redis_outage_policy) == "closed":
        raise _unavailable() from error
    allowance = min(limit, OPEN_POLICY_REQUESTS_PER_MINUTE)
    return _Window(group, allowance, LOCAL_COUNTS.count(f"{group}{who}"), LOCAL_COUNTS.seconds_left())


class LocalCounts:
    """Attempts of this clock minute in this process: the bound of the `open` policy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minute = 0
        self._counts: dict[str, int] = {}

    def count(self, who: str) -> int:
        minute = int(time.time()) // MINUTE
        with self._lock:
            if minute != self._minute:
                self._minute, self._counts = minute, {}
            self._counts[who] = self._counts.get(who, 0) + 1
            return self._counts[who]

    def seconds_left(self) -> int:
        return MINUTE - int(time.time()) % MINUTE


LOCAL_COUNTS = LocalCounts()


def _too_many_requests(window: _Window) -> Refusal:
    whose = "this tenant" if window.group.startswith("tenant") else "this API key"
    if window.limit == 0:
        return Refusal(
            "rate_limit_exceeded", f"No requests are allowed for {whose}.", limit="requests_per_minute", value=0
        )
    return Refusal(
        "rate_limit_exceeded",
        f"More than {window.limit} requests a minute for {whose}. Try again in {window.seconds_left} s.",
        retry_after=window.seconds_left,
        limit="requests_per_minute",
        of=window.group.rstrip(":"),
        value=window.limit,
    )


def _tightest(states: list[RateState]) -> RateState:
    return min(states, key=lambda state: state.remaining or 0, default=RateState())


# Tokens a minute and requests at once


def enter(principal: Principal, request_id: str, *, tokens: int, ttl_seconds: float, stream: bool = False) -> Admission:
    """Takes a place, for a stream one among those, too, and `tokens` from the buckets of tenant and key, or nothing.

    Buckets hold a minute's tokens and refill continuously. A place that is never left frees itself after `ttl_seconds`.
    Raises Refusal: rate_limit_exceeded (tokens), too_many_concurrent_requests, too_many_concurrent_streams,
    service_unavailable without Redis. Idempotent by request id while the request has its place.
    """
    return _enter(principal, request_id, tokens, ttl_seconds, stream, takes=True)


def would_enter(principal: Principal, *, tokens: int, stream: bool = False) -> Admission:
    """As `enter` at this moment, and takes nothing. Raises the same Refusal."""
    return _enter(principal, "?", tokens, 1, stream, takes=False)


def _enter(
    principal: Principal, request_id: str, tokens: int, ttl_seconds: float, stream: bool, *, takes: bool
) -> Admission:
    pair = (principal.tenant_limits, principal.key_limits)
    names = ("tokens_per_minute", "concurrent_requests", "concurrent_streams")
    limits = [_text(getattr(whose, name)) for name in names for whose in pair]
    arguments = [request_id, tokens, math.ceil(ttl_seconds), *limits, int(stream), int(not takes)]
    verdict, whose, value, available, wait_seconds = _run(
        "enter", _keys(principal.tenant_id, principal.quota_key_id), arguments
    )
    if verdict == b"tokens":
        raise _too_many_tokens(whose.decode(), int(value), tokens, int(available), float(wait_seconds))
    if verdict == b"places":
        raise _too_many_at_once(whose.decode(), int(value))
    if verdict == b"streams":
        raise _too_many_streams(whose.decode(), int(value))
    return Admission(_bucket_state(value, available, wait_seconds))


def peek_tokens(principal: Principal) -> RateState:
    """The tighter bucket as it is now. Raises Refusal service_unavailable."""
    limits, key_limits = principal.tenant_limits, principal.key_limits
    arguments = ["", 0, 1, _text(limits.tokens_per_minute), _text(key_limits.tokens_per_minute), *[""] * 6]
    _, _, value, available, wait_seconds = _run("enter", _keys(principal.tenant_id, principal.quota_key_id), arguments)
    return _bucket_state(value, available, wait_seconds)


@dataclass(frozen=True, slots=True)
class Places:
    """Requests and streams that are running or waiting."""

    requests: int
    streams: int


def peek_places(principal: Principal) -> tuple[Places, Places]:
    """Of the tenant and of the key. One round trip. Raises Refusal service_unavailable."""
    now = time.time()
    try:
        with client().pipeline(transaction=False) as pipe:
            for key in _keys(principal.tenant_id, principal.quota_key_id)[2:]:
                pipe.zcount(key, now, "+inf")
            requests, of_key, streams, streams_of_key = pipe.execute()
    except redis.RedisError as error:
        raise _unavailable() from error
    return Places(requests, streams), Places(of_key, streams_of_key)


def leave(tenant_id: int, quota_key_id: int, request_id: str, *, unused_tokens: int = 0) -> bool:
    """Frees the place and gives unused tokens back. False where it was left before, or its time had run out.

    Never raises: without Redis the place frees itself by its expiry and the buckets refill.
    """
    try:
        left = _script("leave")(keys=_keys(tenant_id, quota_key_id), args=[request_id, unused_tokens], client=client())
    except redis.RedisError as error:
        logger.warning("the place of request %s frees itself later: %s", request_id, error)
        return False
    return bool(left)


def give_back_tokens(tenant_id: int, quota_key_id: int, tokens: int) -> None:
    """What `enter` took for requests that came to no place of their own. Never raises: the buckets refill."""
    if tokens:
        leave(tenant_id, quota_key_id, "", unused_tokens=tokens)


def leave_command(tenant_id: int, quota_key_id: int, request_id: str, unused_tokens: int) -> list[Any]:
    """`leave` as a command for a pipeline of the caller's. EVAL: a server that was restarted knows no hashes."""
    keys = _keys(tenant_id, quota_key_id)
    return ["EVAL", _script("leave").script, len(keys), *keys, request_id, unused_tokens]


def running(tenant_id: int) -> int:
    """Requests of the tenant that have a place now; 0 without Redis."""
    try:
        return int(client().zcount(f"{PREFIX}:places:tenant:{tenant_id}", time.time(), "+inf"))
    except redis.RedisError as error:
        logger.warning("running requests were not counted: %s", error)
        return 0


def running_of(kind: Literal["tenant", "key"], ids: Sequence[int]) -> dict[int, int]:
    """Requests that have a place now, by tenants or by the first keys of rotations. One round trip; raises
    redis.RedisError."""
    now = time.time()
    with client().pipeline(transaction=False) as pipe:
        for each in ids:
            pipe.zcount(f"{PREFIX}:places:{kind}:{each}", now, "+inf")
        return dict(zip(ids, pipe.execute(), strict=True))


def _keys(tenant_id: int, quota_key_id: int) -> list[str]:
    return [
        f"{PREFIX}:tokens:tenant:{tenant_id}",
        f"{PREFIX}:tokens:key:{quota_key_id}",
        f"{PREFIX}:places:tenant:{tenant_id}",
        f"{PREFIX}:places:key:{quota_key_id}",
        f"{PREFIX}:streams:tenant:{tenant_id}",
        f"{PREFIX}:streams:key:{quota_key_id}",
    ]


def _run(name: str, keys: list[str], arguments: list[Any]) -> list[Any]:
    try:
        reply: list[Any] = _script(name)(keys=keys, args=arguments, client=client())
    except redis.RedisError as error:
        raise _unavailable() from error
    return reply


@lru_cache(maxsize=4)
def _script(name: str) -> Script:
    return Script(client(), (LUA / f"{name}.lua").read_text())


def _text(limit: int | None) -> str:
    return "" if limit is None else str(limit)


def _bucket_state(value: bytes, available: bytes, wait_seconds: bytes) -> RateState:
    return RateState() if value == b"" else RateState(int(value), int(available), float(wait_seconds))


def _too_many_tokens(whose: str, value: int, tokens: int, available: int, wait_seconds: float) -> Refusal:
    facts: dict[str, Any] = {
        "limit": "tokens_per_minute",
        "of": whose,
        "value": value,
        "needed": tokens,
        "available": available,
    }
    if tokens > value:
        return Refusal(
            "rate_limit_exceeded",
            f"The request may take {tokens} tokens, more than the {value} a minute of this {whose}: ask for fewer.",
            **facts,
        )
    retry_after = max(1, math.ceil(wait_seconds))
    return Refusal(
        "rate_limit_exceeded",
        f"The request may take {tokens} tokens and {available} of the {value} a minute of this {whose} are left. "
        f"Try again in {retry_after} s.",
        retry_after=retry_after,
        **facts,
    )


def _too_many_at_once(whose: str, value: int) -> Refusal:
    return Refusal(
        "too_many_concurrent_requests",
        f"This {whose} may have {value} requests at once, and has.",
        retry_after=1 if value else None,
        limit="concurrent_requests",
        of=whose,
        value=value,
    )


def _too_many_streams(whose: str, value: int) -> Refusal:
    return Refusal(
        "too_many_concurrent_streams",
        f"This {whose} may have {value} streams at once, and has. Without `stream` it can be asked now.",
        retry_after=1 if value else None,
        limit="concurrent_streams",
        of=whose,
        value=value,
    )


def _unavailable() -> Refusal:
    return Refusal("service_unavailable", "Limits cannot be checked at the moment.", retry_after=2)
