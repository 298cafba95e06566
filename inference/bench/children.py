"""Processes that the benchmark starts: logged to a file, tied to this process, waited for, stopped in the end.

Called on the command's main thread only (the kernel ties a child to the thread that forked it).
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmsite.processes import lifeline

STOP_SECONDS = 20.0


class NotStarted(Exception):
    """A server did not become ready; the message holds the end of its log."""


def free_port() -> int:
    """A port of the loopback address that was free a moment ago: the next one to bind it may still be somebody else."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def child(command: Sequence[str], log: Path, *, env: Mapping[str, str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command for as long as the block lasts: TERM at its end, KILL for what is left after STOP_SECONDS."""
    with log.open("ab") as output:
        process = lifeline.spawn(
            command, output=output, env={**os.environ, **env}, cwd=cwd, signal_on_death=signal.SIGTERM
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and, if it does not end in time, its whole session."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own (lifeline.spawn)
        process.wait()


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, *, seconds: float, what: str
) -> float:
    """Wait until `ready()`; return the time it took. Raises NotStarted when the process ends or time is up."""
    started = time.monotonic()
    while not ready():
        if process.poll() is not None:
            raise NotStarted(f"{what} ended with {process.returncode}:\n{tail(log)}")
        if time.monotonic() - started > seconds:
            raise NotStarted(f"{what} was not ready after {seconds:.0f} s:\n{tail(log)}")
        time.sleep(0.05)
    return time.monotonic() - started


def answers_200(port: int, path: str) -> bool:
    """Whether a GET is answered with 200 right now."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def tail(log: Path, num_bytes: int = 2000) -> str:
    return log.read_bytes()[-num_bytes:].decode(errors="replace") if log.exists() else "(no log)"


@contextmanager
def upstream(log: Path, *, text_bytes: int, chunks: int) -> Iterator[int]:
    """The instant model server in a process of its own; yields its port."""
    command = [sys.executable, "-m", "inference.bench.upstream"]
    command += ["--text-bytes", str(text_bytes), "--chunks", str(chunks)]
    root = Path(__file__).resolve().parents[2]
    with child(command, log, env={}, cwd=root) as process:
        wait_until(lambda: log.exists() and b"\n" in log.read_bytes(), process, log, seconds=20, what="the upstream")
        yield int(log.read_text().split()[0])
