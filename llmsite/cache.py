"""Django's Redis cache on a database that it shares with tickets and streams.

Only django-ratelimit uses it. `clear` would be FLUSHDB, which would drop every waiting request: it refuses.
"""

from __future__ import annotations

from typing import NoReturn

from django.core.cache.backends.redis import RedisCache


class SharedRedisCache(RedisCache):
    """RedisCache without `clear`."""

    def clear(self) -> NoReturn:
        raise RuntimeError("This cache shares its Redis with waiting requests: delete keys one by one.")
