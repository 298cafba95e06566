"""Two processes, one quota: what a web and a worker do to each other's locks (RELIABILITY R1)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from django.db import connection

from tests.accounts.quota_cast import assert_proven, counters, tenant_period
from tests.accounts.test_quota_races import new_customer

REPOSITORY = Path(__file__).parent.parent.parent

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.django_db(transaction=True)]

NUM_REQUESTS = 300
LIMIT = 9_000


def environment(tmp_path: Path) -> dict[str, str]:
    """The database of this test, as another process finds it."""
    database: dict[str, Any] = connection.settings_dict
    state = {**os.environ, "STATE_DIR": str(tmp_path), "LOG_LEVEL": "ERROR"}
    if connection.vendor == "sqlite":
        (tmp_path / "db.sqlite3").symlink_to(database["NAME"])
        return state
    login = f"{quote(database['USER'])}:{quote(database['PASSWORD'])}"
    url = f"postgres://{login}@{database['HOST']}:{database['PORT'] or 5432}/{database['NAME']}"
    return {**state, "DATABASE_URL": url}


def test_two_processes_never_pass_a_limit(tmp_path: Path) -> None:
    alice = new_customer()
    command = [sys.executable, "-m", "tests.accounts.quota_client"]
    command += [str(alice.tenant.pk), str(alice.key.pk), str(NUM_REQUESTS), str(LIMIT)]
    inherited = environment(tmp_path)
    running = [
        subprocess.Popen(command, cwd=REPOSITORY, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], answers
    delivered = sum(json.loads(out)["delivered"] for out, _err in answers)
    used, reserved, _requests, open_requests = counters(tenant_period(alice, datetime.now(UTC)))
    assert 0 < delivered == used <= LIMIT
    assert (reserved, open_requests) == (0, 0)
    assert_proven()
