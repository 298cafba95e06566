"""backup and restore, as an operator runs them: processes of their own, each with a state folder."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from llmsite import backup
from llmsite.config import Config
from llmsite.processes import setup
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
    # Onto a database that is damaged, which may be why it is restored.
    (other / "db.sqlite3").write_bytes(b"damaged" * 1000)
    done = manage(other, "restore", plain["file"], "--replace", **no_redis)
    assert Path(done["kept"][0]).read_bytes() == b"damaged" * 1000 and done["ledger"]["clean"] is True


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
        ({"files__db.sqlite3": b"x"}, "backup_invalid"),
        ({"files__models": b"x"}, "backup_invalid"),
        ({"secrets__demo.json": b"x"}, "backup_invalid"),
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


def test_an_archive_of_a_folder_is_no_backup(tmp_path: Path) -> None:
    """As `tar czf backup.tar.gz .` makes it: its first member is the folder itself, which has no name."""
    path = tmp_path / "folder.tar.gz"
    (tmp_path / "target").mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "target", arcname=".")
    with pytest.raises(backup.BackupError) as caught:
        backup.read(path, tmp_path / "target")
    assert caught.value.code == "backup_invalid"


def test_bytes_that_went_wrong_within_an_archive_are_told(tmp_path: Path) -> None:
    """The decompressor finds most of them before any checksum does."""
    (tmp_path / "target").mkdir()
    path = archive_of(tmp_path, database__content=b"".join(hex(number**3).encode() for number in range(50_000)))
    whole = path.read_bytes()
    codes = set()
    for place in range(len(whole) // 20, len(whole) - 9, len(whole) // 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        (tmp_path / "target" / "database" / "content").unlink(missing_ok=True)
        with pytest.raises(backup.BackupError) as caught:
            backup.read(path, tmp_path / "target")
        codes.add(caught.value.code)
    assert codes <= {"backup_unreadable", "backup_invalid"} and "backup_unreadable" in codes


def of_database(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    settings = {"NAME": str(path)}
    monkeypatch.setattr(backup, "connection", SimpleNamespace(vendor="sqlite", settings_dict=settings))


def test_a_database_that_is_written_to_all_the_time_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger than what was once copied in a step: between two steps a write begins the copy anew, for ever."""
    path = tmp_path / "live.sqlite3"
    of_database(monkeypatch, path)
    with contextlib.closing(sqlite3.connect(path, check_same_thread=False)) as live:
        live.execute("PRAGMA journal_mode=WAL")
        live.execute("CREATE TABLE kept (number INTEGER, content BLOB)")
        live.executemany("INSERT INTO kept VALUES (?, zeroblob(?))", ((each, 1 << 20) for each in range(64)))
        live.commit()
        is_copied, deadline = threading.Event(), time.monotonic() + 20

        def write() -> None:
            while not is_copied.is_set() and time.monotonic() < deadline:
                live.execute("INSERT INTO kept VALUES (-1, NULL)")
                live.commit()

        writer = threading.Thread(target=write)
        writer.start()
        backup._dump(tmp_path / "copy")
        is_over = time.monotonic() >= deadline
        is_copied.set()
        writer.join()
    assert not is_over, "it ended only when nobody wrote any more"
    with contextlib.closing(sqlite3.connect(tmp_path / "copy")) as copy:
        assert copy.execute("SELECT count(*) FROM kept WHERE number >= 0").fetchone() == (64,)


def test_a_database_that_cannot_be_copied_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_database(monkeypatch, tmp_path / "none.sqlite3")
    with pytest.raises(backup.BackupError) as caught:
        backup.make(
            Config(state_dir=tmp_path), tmp_path / "b.tar.gz", datetime.now(UTC), with_secrets=False, with_files=False
        )
    assert caught.value.code == "backup_not_written" and not list(tmp_path.iterdir())


def test_migrating_says_so_where_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    """`restore --json` of an older backup has nothing but its object on standard output."""
    said: list[str] = []
    with mock.patch.object(setup, "MigrationExecutor") as executor, mock.patch.object(setup, "call_command"):
        executor.return_value.migration_plan.return_value = [object()]
        setup.migrate(said.append)
    assert said == ["Migrating the database (1 steps)."] and capsys.readouterr().out == ""


def test_a_database_that_is_damaged_gives_way_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be why there is something to restore."""
    target, copy = tmp_path / "db.sqlite3", tmp_path / "copy"
    of_database(monkeypatch, target)
    monkeypatch.setattr(backup.connection, "close", lambda: None, raising=False)
    target.write_bytes(b"damaged" * 1000)
    (tmp_path / "db.sqlite3-wal").write_bytes(b"not merged")
    with contextlib.closing(sqlite3.connect(copy)) as whole:
        whole.execute("CREATE TABLE kept (number INTEGER)")
    done = backup.Restored(mock.Mock())
    backup._replace_database(copy, datetime.now(UTC), done)
    with contextlib.closing(sqlite3.connect(target)) as restored:
        assert restored.execute("SELECT name FROM sqlite_master").fetchone() == ("kept",)
    kept, beside = done.kept
    assert (Path(kept).read_bytes(), Path(beside).read_bytes()) == (b"damaged" * 1000, b"not merged")
    assert beside == f"{kept}-wal" and not (tmp_path / "db.sqlite3-wal").exists()
