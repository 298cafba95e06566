"""The gate of a model's lanes: steps pass side by side, until somebody changes what all of them read.

A readers-writer lock that starves nobody: no step begins while a writer waits, and the steps that waited for one writer
go before the next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """Any thread. Neither side may be entered twice by the same thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_steps = 0
        self._num_waiting = 0
        self._num_owed = 0  # steps that go before the next writer
        self._num_closers = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Held by a lane for one step, together with others'."""
        with self._changed:
            self._num_waiting += 1
            self._changed.wait_for(self._may_step)
            self._num_waiting -= 1
            self._num_owed = max(0, self._num_owed - 1)
            self._num_steps += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_steps -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Waits for the steps under way; no other begins before this is left."""
        with self._changed:
            self._num_closers += 1
            self._changed.wait_for(self._may_close)
            self._is_closed = True
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._num_closers -= 1
                self._num_owed = self._num_waiting
                self._changed.notify_all()

    def _may_step(self) -> bool:
        return not self._is_closed and (not self._num_closers or self._num_owed > 0)

    def _may_close(self) -> bool:
        return not self._is_closed and not self._num_steps and not self._num_owed
