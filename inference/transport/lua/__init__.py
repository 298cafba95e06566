"""The Lua scripts of the request flow, one file each behind common.lua; sent by their hash."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import redis
from redis.commands.core import Script

FOLDER = Path(__file__).parent


@cache
def source(name: str) -> str:
    return (FOLDER / "common.lua").read_text() + (FOLDER / f"{name}.lua").read_text()


def script(client: redis.Redis, name: str) -> Script:
    """A call is one round trip; where the server lacks the script, redis-py loads it and calls again."""
    return client.register_script(source(name))
