"""What was deleted leaves the disk of an embedded installation, too: both of its stores write logs, which outlive it.

Valkey's append-only file has every command since it was last rewritten, prompts and answers among them; SQLite's
write-ahead log has pages as they were. (Pages of the database itself are overwritten: secure_delete in settings.py.)
Called by the housekeeping and `manage.py purge`; a Redis and a PostgreSQL of one's own are their operator's.
"""

from __future__ import annotations

import redis
from django.conf import settings
from django.db import connection


def wipe(client: redis.Redis) -> list[str]:
    """Begins to write both logs anew, and says which. Idempotent; raises RedisError and DatabaseError."""
    done = []
    if not settings.CONFIG.redis_url and not client.info("persistence")["aof_rewrite_in_progress"]:
        client.bgrewriteaof()
        done.append("valkey")
    if connection.vendor == "sqlite" and not connection.in_atomic_block:
        with connection.cursor() as cursor:
            # whoever reads at this moment keeps its pages in the log; the next time they go
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        done.append("sqlite")
    return done
