"""One Celery message per ticket: "there is work in this pool". It carries nothing; the ticket waits in Redis.

Sent by task name, so that the web imports no worker. A lost ring is repeated by the sweep and by the worker itself.
"""

from __future__ import annotations

import logging
import os

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from llmsite.celery import app

logger = logging.getLogger(__name__)

SERVE = "inference.serve"
HOUSEKEEPING = "housekeeping"
"""The queue of beat's jobs, consumed by every worker beside its pool's."""
OPTIONS = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def ring(pool: str) -> bool:
    """One round trip over a kept connection. False, logged, if the broker does not answer."""
    try:
        _publish(pool)
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("the doorbell of pool %s is out of order: %s", pool, error)
        return False
    return True


def _publish(pool: str) -> None:
    """A message of Celery's protocol 2, as `send_task` makes it in twice the time."""
    task_id = os.urandom(16).hex()
    headers = {"lang": "py", "task": SERVE, "id": task_id, "root_id": task_id, "parent_id": None, "group": None}
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            ([pool], {}, OPTIONS),
            exchange="",
            routing_key=pool,
            serializer="json",
            headers={**headers, "ignore_result": True, "retries": 0, "argsrepr": "", "kwargsrepr": ""},
            correlation_id=task_id,
            retry=False,
        )
