"""Whose turn it is to write to SQLite: a file lock between processes. Manners, not safety: SQLite locks for itself.

SQLite lets a writer that finds the database locked sleep for longer and longer, so of two busy processes one starves
for up to a second. Here the wait is short steps, and after MAX_WAIT_SECONDS a process goes on without its turn, so one
that was stopped while it had the lock holds up nobody for long. PostgreSQL needs none of this. Called by quotas.py.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from django.db import connection

STEP_SECONDS = 0.0005
MAX_WAIT_SECONDS = 1.0


@contextmanager
def turn() -> Iterator[None]:
    """Waits for the turn and holds it for the block; one thread of a process at a time."""
    file = _lock_file(os.getpid(), str(connection.settings_dict["NAME"])) if _is_file() else None
    if file is None or not _wait(file):
        yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _is_file() -> bool:
    return connection.vendor == "sqlite" and not connection.is_in_memory_db()  # type: ignore[attr-defined]


@lru_cache(maxsize=4)
def _lock_file(_process_id: int, database: str) -> int | None:
    """A descriptor of its own for each process: those that a fork shares would share the lock."""
    try:
        return os.open(f"{database}-turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None  # a folder that cannot be written to: SQLite will say so itself


def _wait(file: int) -> bool:
    give_up_at = time.monotonic() + MAX_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(STEP_SECONDS)
        else:
            return True
