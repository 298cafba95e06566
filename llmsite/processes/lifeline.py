"""A child that never outlives its parent, even after kill -9 of the parent.

On Linux the kernel does it (PR_SET_PDEATHSIG, set in the child before exec, with a look at getppid() against the race).
Elsewhere this file runs as a small process between the two that watches a pipe: `python lifeline.py FD -- command`.
Standard library only: the supervisor, the test suite and the wrapper import it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
ORPHANED = 75  # exit status of a child whose parent was gone before it could be tied to it
TIED_BY_KERNEL = sys.platform == "linux"


def spawn(
    command: Sequence[str],
    *,
    output: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    signal_on_death: signal.Signals = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, tied to this process; output and errors go to `output`.

    The kernel ties a child to the thread that forked it, so call this from a thread that lives as long as the process.
    """
    if TIED_BY_KERNEL:
        return _spawn_tied_by_kernel(command, output, env, cwd, signal_on_death)
    return _spawn_tied_by_pipe(command, output, env, cwd)


def _spawn_tied_by_kernel(
    command: Sequence[str],
    output: int | IO[bytes] | None,
    env: Mapping[str, str] | None,
    cwd: Path | None,
    signal_on_death: signal.Signals,
) -> subprocess.Popen[bytes]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork
    parent = os.getpid()
    number = int(signal_on_death)

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl: no signal will ever come
            os._exit(ORPHANED)

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=env,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=tie,
    )


def _spawn_tied_by_pipe(
    command: Sequence[str], output: int | IO[bytes] | None, env: Mapping[str, str] | None, cwd: Path | None
) -> subprocess.Popen[bytes]:
    read_end, write_end = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__)), str(read_end), "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env=env,
            cwd=cwd,
            start_new_session=True,
            pass_fds=(read_end,),
        )
    finally:
        os.close(read_end)
    _PIPES.append(write_end)  # open for as long as this process lives; the kernel closes it at death
    return child


_PIPES: list[int] = []


def watch(descriptor: int, command: Sequence[str]) -> int:
    """Run `command`, pass signals on, kill it when the other end of the pipe closes; return its exit status."""
    child = subprocess.Popen(command, close_fds=True)

    def pass_on(number: int, _frame: object) -> None:
        child.send_signal(number)

    def kill_at_end_of_pipe() -> None:
        while os.read(descriptor, 1):
            pass
        child.kill()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, pass_on)
    threading.Thread(target=kill_at_end_of_pipe, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(watch(int(sys.argv[1]), sys.argv[3:]))
