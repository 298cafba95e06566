"""How often a test's thread asks Redis; other tests may use the same server meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from redis.connection import AbstractConnection


class Trips:
    """Counts what the thread that made it sends to Redis; a pipeline or a script is one.

    of: that command alone.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, of: str = "") -> None:
        self.number = 0
        thread, send = threading.get_ident(), AbstractConnection.send_packed_command

        def counted(connection: Any, command: Any, check_health: bool = True) -> None:
            packed = b"".join([command] if isinstance(command, bytes) else command)
            self.number += threading.get_ident() == thread and of.encode() in packed
            send(connection, command, check_health)

        monkeypatch.setattr(AbstractConnection, "send_packed_command", counted)
