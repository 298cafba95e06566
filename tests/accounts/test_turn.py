"""One process after the other at SQLite's door, and nobody waits for one that stands still."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from accounts.ledger import turn as turn_module
from accounts.ledger.turn import turn
from tests.timing import Stopwatch

pytestmark = pytest.mark.unit


class FakeConnection:
    vendor = "sqlite"

    def __init__(self, name: Path) -> None:
        self.settings_dict = {"NAME": name}

    def is_in_memory_db(self) -> bool:
        return False


@pytest.fixture
def lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The lock of a database, opened as another process would."""
    monkeypatch.setattr(turn_module, "connection", FakeConnection(tmp_path / "db"))
    return os.open(tmp_path / "db-turn", os.O_RDWR | os.O_CREAT)


def is_free(lock_file: int) -> bool:
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(lock_file, fcntl.LOCK_UN)
    return True


def test_a_turn_excludes_other_processes_and_ends_with_an_error_too(lock_file: int) -> None:
    with turn():
        assert not is_free(lock_file)
    assert is_free(lock_file)
    with pytest.raises(RuntimeError), turn():
        raise RuntimeError
    assert is_free(lock_file)


def test_a_process_waits_for_its_turn(lock_file: int) -> None:
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    threading.Timer(0.1, fcntl.flock, [lock_file, fcntl.LOCK_UN]).start()
    started, watch = time.monotonic(), Stopwatch()
    with turn():
        assert watch.seconds() < 1.0
        assert time.monotonic() - started > 0.05
        assert not is_free(lock_file)


def test_a_process_that_stands_still_is_passed_by(
    lock_file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_module, "MAX_WAIT_SECONDS", 0.05)
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    with turn():
        pass
    assert not is_free(
        os.dup(turn_module._lock_file(os.getpid(), str(turn_module.connection.settings_dict["NAME"])) or 0)
    )


@pytest.mark.parametrize("attribute", [("vendor", "postgresql"), ("is_in_memory_db", lambda: True)])
def test_where_there_is_no_file_there_is_no_turn(lock_file: int, attribute: tuple[str, Any]) -> None:
    setattr(turn_module.connection, *attribute)
    with turn():
        assert is_free(lock_file)


def test_a_folder_that_cannot_be_written_to_is_sqlites_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "connection", FakeConnection(Path("/nonexistent/db")))
    with turn():
        assert turn_module._lock_file(os.getpid(), "/nonexistent/db") is None
