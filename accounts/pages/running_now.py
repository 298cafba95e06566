"""What runs of tenants and keys now, in words, for pages that are about to end it. One round trip to Redis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import redis

from accounts.limits import throttling

UNKNOWN = "what runs is unknown: Redis does not answer"


def in_words(kind: Literal["tenant", "key"], ids: Mapping[int, int]) -> dict[int, str]:
    """By row. ids: row → tenant, or the first key of its rotation, which has the places of all."""
    try:
        found = throttling.running_of(kind, list(ids.values()))
    except redis.RedisError:
        return dict.fromkeys(ids, UNKNOWN)
    return {
        row: f"{found[each]:,} requests run or wait" if found[each] else "nothing runs" for row, each in ids.items()
    }
