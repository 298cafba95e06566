"""One supervised process: started, read, judged, started again, stopped.

No clock and no loop of its own: the supervisor's only thread calls it with the time. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmsite.processes import lifeline
from llmsite.processes.console import Lines

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
HEALTHY_SECONDS = 30.0


@dataclass(frozen=True)
class ChildPlan:
    """How to run a child. `stop_seconds` is how long it may take to leave after TERM before it is killed."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stop_seconds: float
    signal_on_death: signal.Signals = signal.SIGKILL
    on_end: Callable[[int], None] = field(default=lambda pid: None)
    """Called with the process id when it has ended, whatever the reason."""
    is_noise: Callable[[str], bool] = field(default=lambda line: False)
    """Lines that are not worth showing."""


def pause_before(failures: int) -> float:
    """Seconds to wait before the start that follows `failures` quick deaths in a row: doubled each time, bounded."""
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(failures, 16))


class Child:
    """A process that may be running, or waiting for its next start. Times are of time.monotonic()."""

    def __init__(self, plan: ChildPlan) -> None:
        self.plan = plan
        self.process: subprocess.Popen[bytes] | None = None
        self.lines = Lines()
        self.started_at = 0.0
        self.next_start_at = 0.0
        self.failures = 0

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def is_running(self) -> bool:
        return self.process is not None

    @property
    def descriptor(self) -> int | None:
        """Where its output is read."""
        return self.process.stdout.fileno() if self.process and self.process.stdout else None

    def start(self, now: float) -> None:
        self.process = lifeline.spawn(
            self.plan.command,
            output=subprocess.PIPE,
            env=self.plan.env,
            cwd=self.plan.cwd,
            signal_on_death=self.plan.signal_on_death,
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.started_at = now

    def read(self) -> list[str]:
        """Lines that it has written since; never waits."""
        if self.descriptor is None:
            return []
        lines: list[str] = []
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.descriptor, 65536):
                lines += self.lines.feed(data)
        return [line for line in lines if not self.plan.is_noise(line)]

    def reap(self, now: float) -> int | None:
        """The exit status if it has ended (negative: the signal); sets when it may start again. Else None."""
        if self.process is None or self.process.poll() is None:
            return None
        status = self.process.returncode
        pid = self.process.pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # children that it left behind
        if self.process.stdout:
            self.process.stdout.close()
        self.process = None
        if now - self.started_at >= HEALTHY_SECONDS:
            self.failures = 0
        self.put_off(now)
        self.plan.on_end(pid)
        return status

    def put_off(self, now: float) -> None:
        """It has died, or could not be started: it may start after a pause."""
        self.next_start_at = now + pause_before(self.failures)
        self.failures += 1

    def terminate(self) -> None:
        """Ask it to leave."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        """End it and its children."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
