"""The gate of a model's lanes: steps pass side by side, until somebody changes what all of them read.

A readers-writer lock on which the writers have precedence: no lane begins another step while one waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """Any thread. Neither side may be entered twice by the same thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_steps = 0
        self._num_closers = 0
        self._is_closed = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Held by a lane for one step, together with others'."""
        with self._changed:
            self._changed.wait_for(lambda: not self._num_closers)
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
            self._changed.wait_for(lambda: not self._num_steps and not self._is_closed)
            self._is_closed = True
        try:
            yield
        finally:
            with self._changed:
                self._num_closers -= 1
                self._is_closed = False
                self._changed.notify_all()
