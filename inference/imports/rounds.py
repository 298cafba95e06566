"""Daemon threads of a web process that look for what is due, each again and again, until they are stopped.

The importer has two, and the optimizer (inference/tuning) one. What they know is in rows and on the disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from django.db import DatabaseError, connection

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
JOIN_SECONDS = 5


class Stopped(Exception):
    """This process ends: what is under way is left as it is, for the next, or ended with a reason."""


class Rounds:
    """A thread for each piece of work, by the thread's name. `stopping` is set once they are to end."""

    def __init__(self, works: dict[str, Callable[[], None]]) -> None:
        self.stopping = threading.Event()
        self._wakes = {name: threading.Event() for name in works}
        self._threads = [
            threading.Thread(target=self._run, args=(name, work), name=name, daemon=True)
            for name, work in works.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wake(self, name: str = "") -> None:
        """Look now; all of them, or one."""
        for each, wake in self._wakes.items():
            if name in ("", each):
                wake.set()

    def stop(self) -> None:
        self.stopping.set()
        self.wake()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(JOIN_SECONDS)

    def _run(self, name: str, work: Callable[[], None]) -> None:
        while not self.stopping.is_set():
            self._wakes[name].wait(LOOK_SECONDS)
            self._wakes[name].clear()
            try:
                if not self.stopping.is_set():
                    work()
            except Stopped:
                return
            except DatabaseError as error:
                logger.warning("%s: the database: %s", name, error)
            except Exception:
                logger.exception("%s failed", name)
            finally:
                connection.close()
