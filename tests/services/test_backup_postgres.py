"""backup and restore with pg_dump and pg_restore."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.llmsite.test_backup import FILL, SIGN_IN, manage, run

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ADD = """
import django
django.setup()
from accounts.models import Plan, Tenant
Tenant.objects.create(name="Late", plan=Plan.objects.get())
"""


def test_a_backup_of_postgresql_is_restored_with_its_ledger_proven(postgresql_url: str, tmp_path: Path) -> None:
    if shutil.which("pg_dump") is None:
        pytest.skip("PostgreSQL's client programs are not there")
    here = {"DATABASE_URL": postgresql_url, "REDIS_URL": f"unix://{tmp_path}/no.sock"}
    state = tmp_path / "state"
    key = run(state, "-c", FILL, **here).strip()
    made = manage(state, "backup", **here)
    assert made["engine"] == "postgresql"
    run(state, "-c", ADD, **here)
    assert manage(state, "restore", made["file"], status=1, **here)["error"]["code"] == "not_empty"
    done = manage(state, "restore", made["file"], "--replace", **here)
    assert done["ledger"]["clean"] and done["ledger"]["num_entries"] == 1
    assert [row["tenant"] for row in manage(state, "usage", **here)["usage"]] == ["Alice's"]
    assert run(state, "-c", SIGN_IN, key, **here).strip() == "Alice's"
    other = manage(tmp_path / "other", "restore", made["file"], status=1, REDIS_URL=here["REDIS_URL"])
    assert other["error"]["code"] == "other_database"
