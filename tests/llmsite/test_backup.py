"""backup and restore, as an operator runs them: processes of their own, each with a state folder."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmsite import backup
from llmsite.config import Config
from llmsite.processes.supervisor import held_alone
from tests.conftest import REPOSITORY, site_environment

pytestmark = [pytest.mark.integration, pytest.mark.slow]

FILL = """
import django, json, sys
django.setup()
from django.core.management import call_command
from django.utils import timezone
from accounts.ledger import quotas
from accounts.ledger.allotment import ReserveOrder
from accounts.models import Plan, Tenant
from accounts.identity.key_rows import principal_of
from accounts.identity import issuing
from datetime import timedelta
from django.conf import settings
call_command("migrate", verbosity=0)
tenant = Tenant.objects.create(name="Alice's", plan=Plan.objects.create(name="cast"))
key, text = issuing.issue(tenant, "main", None, {}, None)
who, now = principal_of(key), timezone.now()
quotas.reserve(ReserveOrder(request_id="r1", tenant_id=who.tenant_id, key_id=who.quota_key_id, anchor_day=1,
    tenant_limits=who.tenant_limits, key_limits=who.key_limits, prompt_tokens=5, max_tokens=10, all_or_nothing=True,
    now=now, expires_at=now + timedelta(hours=1)))
(settings.CONFIG.state / "models").mkdir()
(settings.CONFIG.state / "models" / "small.gguf").write_bytes(b"weights")
print(text)
"""
SIGN_IN = """
import django, sys
django.setup()
from accounts.identity.authentication import authenticate_credentials
print(authenticate_credentials({"X-API-Key": sys.argv[1]}).tenant_name)
"""


def run(state: Path, *words: str, status: int = 0, **environment: str) -> str:
    env = site_environment(state, 1, DJANGO_SETTINGS_MODULE="llmsite.settings", **environment)
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def manage(state: Path, *words: str, status: int = 0, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(state, "manage.py", *words, "--json", status=status, **environment))
    return found


def test_a_backup_is_restored_elsewhere_with_its_ledger_proven_and_its_keys_at_work(tmp_path: Path) -> None:
    old, new, other = tmp_path / "old", tmp_path / "new", tmp_path / "other"
    no_redis = {"REDIS_URL": f"unix://{tmp_path}/no.sock"}
    text = run(old, "-c", FILL, **no_redis).strip()
    archive = tmp_path / "whole.tar.gz"
    made = manage(old, "backup", "--to", str(archive), "--with-secrets", "--with-files", **no_redis)
    assert (made["has_secrets"], made["num_files"], made["engine"]) == (True, 1, "sqlite")
    assert "whoever has it" in made["warnings"][0] and archive.stat().st_mode & 0o777 == 0o600
    done = manage(new, "restore", str(archive), **no_redis)
    assert (done["ledger"]["clean"], done["ledger"]["num_entries"], done["warnings"]) == (True, 1, [])
    assert (new / "models" / "small.gguf").read_bytes() == b"weights"
    assert run(new, "-c", SIGN_IN, text, **no_redis).strip() == "Alice's"
    refused = manage(new, "restore", str(archive), status=1, **no_redis)
    assert refused["error"]["code"] == "not_empty"
    # Without the pepper, into a full target that is told to give way.
    plain = manage(old, "backup", **no_redis)
    assert "pepper is not in this file" in plain["warnings"][0] and plain["num_files"] == 0
    run(other, "-c", FILL, **no_redis)
    done = manage(other, "restore", plain["file"], "--replace", **no_redis)
    assert "no API key of the backup works" in done["warnings"][0]
    assert [Path(path).name.split(".before")[0] for path in done["kept"]] == ["db.sqlite3"]


def archive_of(tmp_path: Path, **members: bytes) -> Path:
    path = tmp_path / "made.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            file = tmp_path / "member"
            file.write_bytes(data)
            tar.add(file, arcname=name.replace("__", "/"))
    return path


def manifest(**members: dict[str, Any]) -> bytes:
    listed = {name.replace("__", "/"): facts for name, facts in members.items()}
    values = {"format": 1, "made_at": "", "engine": "sqlite", "migrations": {}, "pepper": "", "members": listed}
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"database__content": b"x"}, "backup_invalid"),
        ({"manifest.json": b"{}"}, "backup_invalid"),
        ({"manifest.json": b'{"format": 2}'}, "backup_version"),
        ({"files__..__..__escape": b"x"}, "backup_invalid"),
        ({"elsewhere": b"x"}, "backup_invalid"),
        (
            {"database__content": b"x", "manifest.json": manifest(database__content={"bytes": 1, "sha256": "0"})},
            "backup_damaged",
        ),
    ],
)
def test_an_archive_that_is_no_backup_or_damaged_is_refused(
    tmp_path: Path, members: dict[str, bytes], code: str
) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(backup.BackupError) as caught:
        backup.read(archive_of(tmp_path, **members), tmp_path / "target")
    assert caught.value.code == code
    assert not (tmp_path / "escape").exists()


def test_a_site_that_runs_is_not_restored_into(tmp_path: Path) -> None:
    config = Config(state_dir=tmp_path)
    with held_alone(tmp_path), pytest.raises(backup.BackupError) as caught:
        backup.restore(config, tmp_path / "none.tar.gz", datetime.now(UTC))
    assert caught.value.code == "site_runs"
