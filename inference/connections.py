"""One Redis client per process for the request's clock: tickets, streams, heartbeats, the completion cache.

Synchronous commands go through `redis_client()`, which threads share. The event loop of the web process has its own
connections in stream.py. A command is tried twice, at once, so that a restarted server costs no request.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import redis
from django.conf import settings
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.retry import Retry

SOCKET_TIMEOUT_SECONDS = 5.0
LUA = Path(__file__).with_name("lua")

RedisClient = redis.Redis


def connect(url: str, *, socket_timeout: float | None = SOCKET_TIMEOUT_SECONDS) -> RedisClient:
    """A client that speaks bytes; its pool grows with the threads that use it at once."""
    return redis.Redis.from_url(
        url,
        socket_timeout=socket_timeout,
        socket_connect_timeout=2.0,
        retry=Retry(NoBackoff(), 1),
        retry_on_error=[redis.ConnectionError],
        decode_responses=False,
    )


@lru_cache(maxsize=1)
def redis_client() -> RedisClient:
    """The client of this process."""
    return connect(settings.REDIS_URL)


def script(client: RedisClient, name: str) -> Script:
    """A script of the lua folder, sent by its hash; redis-py loads it where the server does not know it yet."""
    return client.register_script((LUA / f"{name}.lua").read_text())
