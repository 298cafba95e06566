"""How long a test waits, and promises of a time on a machine that is busy with other things too."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 30.0
"""For what comes at once: it bounds a failure, and is no promise."""
MOST_BUSY = 5.0
"""A machine is not taken to be slower than so many times: what takes longer is late on any."""


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true value of `condition`. Fails the test after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return value


class Stopwatch:
    """Seconds since it was made, less those in which threads of this process and of those below it could have run
    and waited for a processor. Linux counts them; elsewhere nothing is taken off.

    All threads are taken together, since what is timed goes from one to the next. So that it cannot excuse
    everything, at most four fifths are taken off.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._at_first = self._waits = _waits()

    def seconds(self) -> float:
        passed = time.monotonic() - self._began
        self._waits = {**self._waits, **_waits()}
        waited = sum(seconds - self._at_first.get(thread, 0.0) for thread, seconds in self._waits.items())
        return max(passed - waited, passed / MOST_BUSY)


def _waits() -> dict[str, float]:
    """By thread: seconds in which it waited for a processor, ever."""
    found: dict[str, float] = {}
    folders = [Path("/proc/self")]
    while folders:
        for thread in folders.pop().glob("task/*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
                folders += [Path("/proc", child) for child in (thread / "children").read_text().split()]
    return found
