"""Celery's consumer as the doorbell needs it: garbage on a queue is dropped and the worker lives, and nothing is acked.

Celery and kombu treat most garbage themselves; a body or an envelope of the wrong shape ends the worker. Only in worker
processes, on the consumer's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from queue import Empty
from typing import Any

import redis
from celery import Celery
from celery.worker.consumer import Consumer
from kombu.transport import redis as transport

logger = logging.getLogger(__name__)

BROKER_ERRORS = (redis.RedisError, OSError)
"""Kombu's own list holds KeyError, which garbage raises too."""
CONNECT_AGAIN_SECONDS = 1
"""Kombu waits for longer each time, half a minute in the end: the worker lives, and would take nothing for so long."""


class GuardedConsumer(Consumer):
    """Rejects a message whose handling failed for a reason other than the connection, and soon connects again."""

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        connection: Any = self.app.connection_for_read(heartbeat=heartbeat)
        connection.ensure_connection = partial(
            connection.ensure_connection,
            interval_start=CONNECT_AGAIN_SECONDS,
            interval_step=0,
            interval_max=CONNECT_AGAIN_SECONDS,
        )
        return self.ensure_connected(connection)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle: Callable[[Any], None] = super().create_task_handler(*args, **kwargs)

        def guarded(message: Any) -> None:
            try:
                handle(message)
            except BROKER_ERRORS:
                raise
            except Exception as error:  # noqa: BLE001 - logged; whatever it was, the next message must be heard
                logger.error("a message that cannot be handled is dropped: %r", error)
                message.reject_log_error(logger, BROKER_ERRORS)

        return guarded


class GuardedChannel(transport.Channel):
    """Skips list entries that are no envelope of kombu's.

    All our tasks are bells: one that is lost is rung again, so the two round trips of every acknowledgement are saved.
    """

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        return super().basic_consume(queue, True, *args, **kwargs)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        """Nothing was kept that could be acknowledged."""

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """As basic_ack."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            logger.error("an entry of the queue that is no message is dropped: %r", error)
            raise Empty from error


def install(app: Celery) -> None:
    """Before the worker connects."""
    app.conf.worker_consumer = "inference.transport.broker_guard:GuardedConsumer"
    app.conf.worker_enable_remote_control = False  # who may write to the broker shall not shut workers down
    transport.Transport.Channel = GuardedChannel
