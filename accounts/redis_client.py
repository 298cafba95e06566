"""The Redis client that a process shares between its threads. No key names here; both clocks import it.

A server that hangs must not hold the threads of admission: every command has a time limit. A command that found a
broken connection is sent once more on a new one, so a restarted server costs no request. One that timed out is not: it
is only late, and would run twice.
"""

from __future__ import annotations

import os
from functools import lru_cache

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.retry import Retry

SOCKET_TIMEOUT_SECONDS = 2.0
CONNECT_TIMEOUT_SECONDS = 0.5
MAX_CONNECTIONS = 256


def client() -> redis.Redis:
    """The client of this process; a forked child gets its own. Speaks bytes."""
    return _client(settings.REDIS_URL, os.getpid())


def connect(url: str, *, socket_timeout: float = SOCKET_TIMEOUT_SECONDS) -> redis.Redis:
    """A client with a pool of its own. Threads wait for nothing: beyond MAX_CONNECTIONS it raises ConnectionError."""
    return redis.Redis.from_url(
        url,
        socket_timeout=socket_timeout,
        socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
        max_connections=MAX_CONNECTIONS,
        health_check_interval=15,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


@lru_cache(maxsize=2)
def _client(url: str, _process_id: int) -> redis.Redis:
    return connect(url)
