"""A process that reserves and settles against a quota as fast as it can: `python -m tests.accounts.quota_client`.

Environment: DATABASE_URL or STATE_DIR. Arguments: tenant id, key id, requests, limit. Prints the tokens delivered.
"""

from __future__ import annotations

import json
import os
import random
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

NUM_THREADS = 16


def main(tenant_id: int, key_id: int, num_requests: int, limit: int) -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")
    import django

    django.setup()
    from accounts.ledger import quotas
    from accounts.limits.precedence import Limits
    from accounts.trail.refusals import Refusal

    def request(number: int) -> int:
        dice, now = random.Random(number), datetime.now(UTC)
        order = quotas.ReserveOrder(
            request_id=str(uuid.uuid4()),
            tenant_id=tenant_id,
            key_id=key_id,
            anchor_day=1,
            tenant_limits=Limits(monthly_tokens=limit),
            key_limits=Limits(),
            prompt_tokens=10,
            max_tokens=40,
            now=now,
            expires_at=now + timedelta(minutes=10),
        )
        try:
            held = quotas.reserve(order)
        except Refusal as refusal:
            if refusal.code not in {"quota_reserved", "quota_exhausted"}:
                raise
            return 0
        output = dice.randrange(held.max_tokens + 1)
        quotas.settle(
            quotas.SettleOrder(
                request_id=order.request_id,
                charged_tokens=10 + output,
                prompt_tokens=10,
                completion_tokens=output,
                now=now,
            )
        )
        return 10 + output

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        print(json.dumps({"delivered": sum(pool.map(request, range(num_requests)))}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
