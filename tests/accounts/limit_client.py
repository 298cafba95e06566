"""A process that uses the minute's limits as a web does, as fast as it can: `python -m tests.accounts.limit_client`.

Environment: REDIS_URL, STATE_DIR. Arguments: what is tried (requests, tokens, places, streams), how often, limit, name.
Prints the number that was granted; begins when the list `go` has something, so that several begin together.
"""

from __future__ import annotations

import json
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor

NUM_THREADS = 16
TOKENS = 100


def main(what: str, num_attempts: int, limit: int, name: str) -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")
    import django
    import django_ratelimit.core

    django.setup()
    from accounts.limits import throttling
    from accounts.redis_client import client
    from accounts.trail.refusals import Refusal
    from tests.accounts.principals import on_plan

    django_ratelimit.core.time = types.SimpleNamespace(time=lambda: 1_800_000_000.0)  # no window ends meanwhile
    field = {
        "requests": "requests_per_minute",
        "tokens": "tokens_per_minute",
        "places": "concurrent_requests",
        "streams": "concurrent_streams",
    }[what]
    alice = on_plan(**{field: limit})

    def attempt(number: int) -> bool:
        try:
            if what == "requests":
                throttling.count_request(alice, None)
            else:
                request_id = f"{name}-{number}"
                throttling.enter(alice, request_id, tokens=TOKENS, ttl_seconds=60, stream=what == "streams")
        except Refusal as refusal:
            if refusal.code not in {
                "rate_limit_exceeded",
                "too_many_concurrent_requests",
                "too_many_concurrent_streams",
            }:
                raise
            return False
        return True

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        client().rpush("ready", name)
        client().blpop(["go"], timeout=30)
        print(json.dumps({"granted": sum(pool.map(attempt, range(num_attempts)))}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
