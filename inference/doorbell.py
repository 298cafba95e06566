"""One Celery message per ticket: "there is work in this pool". It carries nothing; the ticket waits in Redis.

Sent by task name, so that the web imports no worker. A lost ring is repeated by the sweep and by the worker itself.
"""

from __future__ import annotations

import logging

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from llmsite.celery import app

logger = logging.getLogger(__name__)

SERVE = "inference.serve"
HOUSEKEEPING = "housekeeping"
"""The queue of beat's jobs, consumed by every worker beside its pool's."""


def ring(pool: str) -> bool:
    """One round trip over a kept connection. False, logged, if the broker does not answer."""
    try:
        app.send_task(SERVE, args=(pool,), queue=pool, retry=False, ignore_result=True)
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("the doorbell of pool %s is out of order: %s", pool, error)
        return False
    return True
