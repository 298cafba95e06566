"""Two web processes, one minute's limits: together they grant what one would (RELIABILITY R5)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.accounts.limit_client import TOKENS

REPOSITORY = Path(__file__).parent.parent.parent
NUM_ATTEMPTS = 200

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def granted(valkey: Any, tmp_path: Path, what: str, limit: int) -> tuple[list[int], float]:
    """By each of two processes that begin together; and the seconds from then until the last one has ended."""
    command = [sys.executable, "-m", "tests.accounts.limit_client", what, str(NUM_ATTEMPTS), str(limit)]
    environment = {**os.environ, "STATE_DIR": str(tmp_path), "LOG_LEVEL": "ERROR"}
    running = [
        subprocess.Popen(
            [*command, name], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name in ("one", "two")
    ]
    try:
        for _ in running:
            assert valkey.blpop(["ready"], timeout=60), "a process did not come so far"
        began = time.monotonic()
        valkey.rpush("go", "one", "two")
        answers = [process.communicate(timeout=100) for process in running]
        took = time.monotonic() - began
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], answers
    return [json.loads(out)["granted"] for out, _ in answers], took


@pytest.mark.parametrize(("what", "limit"), [("places", 12), ("streams", 12)])
def test_two_processes_share_places(valkey: Any, tmp_path: Path, what: str, limit: int) -> None:
    by_each, _ = granted(valkey, tmp_path, what, limit)
    assert sum(by_each) == limit


def test_two_processes_share_a_minutes_tokens(valkey: Any, tmp_path: Path) -> None:
    by_each, took = granted(valkey, tmp_path, "tokens", 60 * TOKENS)
    assert 60 <= sum(by_each) <= 60 + took + 1  # one request's worth flows back a second


def test_two_processes_share_a_minutes_requests(valkey: Any, tmp_path: Path) -> None:
    by_each, _ = granted(valkey, tmp_path, "requests", 50)
    assert sum(by_each) == 50
