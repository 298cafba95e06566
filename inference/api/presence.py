"""That this web process lives: a heartbeat in Redis, on its own thread. What a dead one alone read is cancelled."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from functools import lru_cache

import redis

from accounts import redis_client
from inference.transport.queue import TicketQueue

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5


def web_id() -> str:
    """Of this process; a forked child has its own."""
    return _web_id(os.getpid())


@lru_cache(maxsize=2)
def _web_id(process_id: int) -> str:
    return f"{socket.gethostname()}-{process_id}-{secrets.token_hex(3)}"


class Presence:
    """Beats until it is stopped."""

    def __init__(self, queue: TicketQueue, web: str) -> None:
        self._queue, self._web = queue, web
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        """The first beat comes before the first request."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """What is still read here has lost its reader."""
        self._stop.set()
        self._thread.join(5)
        try:
            self._queue.sign_off_web(self._web)
        except redis.RedisError as error:
            logger.warning("this web process could not sign off: %s", error)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        try:
            self._queue.beat_web(self._web)
        except redis.RedisError as error:
            logger.warning("the heartbeat waits for Redis: %s", error)


_presence: Presence | None = None


def start() -> None:
    """Idempotent."""
    global _presence
    if _presence is None:
        _presence = Presence(TicketQueue(redis_client.client()), web_id())
        _presence.start()


def stop() -> None:
    global _presence
    present, _presence = _presence, None
    if present is not None:
        present.stop()
