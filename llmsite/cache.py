"""Django's Redis cache on a database that it shares with tickets and streams, in as few round trips as can be.

Only django-ratelimit uses it. `clear` would be FLUSHDB, which would drop every waiting request: it refuses.
Django makes one cache for each thread, so nothing here needs a lock.
"""

from __future__ import annotations

import time
from typing import Any, NoReturn

from django.core.cache.backends.redis import RedisCache, RedisCacheClient

MAX_REMEMBERED = 4096
INCREMENT = """
local value = redis.call('INCRBY', KEYS[1], ARGV[1])
if value == tonumber(ARGV[1]) then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
end
return value
"""
"""A counter that the server has lost, as by a restart, starts anew with its time to live."""


class CountingClient(RedisCacheClient):
    """One client for all calls, where Django makes one for each; and a counter that is there is not added again.

    django-ratelimit counts by `add`, then `incr`: SET, EXISTS and INCR. Here a key that this thread has added, or
    found, is remembered while it lives, and the two are one round trip.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared: Any = None
        self._increment: Any = None
        self._remembered: dict[str, tuple[float, int]] = {}

    def get_client(self, key: Any = None, *, write: bool = False) -> Any:
        """There is one server, so reading and writing are one pool."""
        if self._shared is None:
            self._shared = super().get_client(key, write=True)
            self._increment = self._shared.register_script(INCREMENT)
        return self._shared

    def add(self, key: Any, value: Any, timeout: Any) -> bool:
        if self._seconds_to_live(key) is not None:
            return False
        until = time.monotonic() + (timeout or 0)
        added = bool(super().add(key, value, timeout))
        if timeout:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = until, timeout
        return added

    def incr(self, key: Any, delta: int) -> int:
        """Raises ValueError for a key that is not there, unless it was added here."""
        seconds = self._seconds_to_live(key)
        if seconds is None:
            return int(super().incr(key, delta))
        self.get_client(key, write=True)
        return int(self._increment(keys=[key], args=[delta, seconds]))

    def delete(self, key: Any) -> bool:
        self._remembered.pop(key, None)
        return bool(super().delete(key))

    def _seconds_to_live(self, key: str) -> int | None:
        """What a key was added with; None for one that is not known to live."""
        until, timeout = self._remembered.get(key, (0.0, 0))
        return timeout if time.monotonic() < until else None


class SharedRedisCache(RedisCache):
    """RedisCache without `clear`."""

    def __init__(self, server: str, params: dict[str, Any]) -> None:
        super().__init__(server, params)
        self._class = CountingClient

    def clear(self) -> NoReturn:
        raise RuntimeError("This cache shares its Redis with waiting requests: delete keys one by one.")
