"""A backup as one file: the database, and where it is asked for the secrets and the files of the state folder.

SQLite is copied by its online backup, PostgreSQL by pg_dump: both while requests are served. A manifest names every
member with its size and SHA-256, and nothing is restored before all of them were read and compared. Called by the
commands backup and restore; blocking, on the main thread. Waiting requests, streams and caches are in Redis and in no
backup.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import shutil
import sqlite3
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import DatabaseError, connection
from django.db.migrations.loader import MigrationLoader
from redis import RedisError

from accounts import redis_client
from accounts.ledger import audit
from accounts.models import Tenant
from inference.transport.queue import TicketQueue
from llmsite.config import Config
from llmsite.processes.setup import migrate
from llmsite.processes.supervisor import StartError, held_alone

FORMAT = 1
MANIFEST = "manifest.json"
DATABASE = "database/content"
SECRETS = ("secret_key", "key_pepper")
FILE_FOLDERS = ("models", "adapters", "uploads")
"""Folders of STATE_DIR that hold what was uploaded or made from it. States of slots are computed again."""
SQLITE_HEADER = b"SQLite format 3\0"
UNMERGED = ("-wal", "-journal")
"""Behind the name of a SQLite database: what was written and is not in it yet, or has to leave it again."""
MAX_MANIFEST_BYTES = 64 << 20
MAX_MEMBERS = 100_000
CHUNK = 1 << 20

Progress = Callable[[str], None]


class BackupError(Exception):
    """Nothing was changed, unless the message says so. `code` is stable."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is in a backup. migrations: the last of each application. pepper: not the secret, eight characters that tell
    whether another one is the same."""

    made_at: str
    engine: str
    migrations: dict[str, str]
    pepper: str
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def has_secrets(self) -> bool:
        return any(name.startswith("secrets/") for name in self.members)

    @property
    def num_files(self) -> int:
        return sum(name.startswith("files/") for name in self.members)


def engine() -> str:
    return "postgresql" if connection.vendor == "postgresql" else "sqlite"


def pepper_fingerprint() -> str:
    return hmac.digest(settings.KEY_PEPPER.encode(), b"llmsite pepper of a backup", "sha256").hex()[:8]


# Making one


def make(
    config: Config,
    path: Path,
    now: datetime,
    *,
    with_secrets: bool,
    with_files: bool,
    say: Progress = lambda text: None,
) -> Manifest:
    """Write the archive, mode 0600; a file that is there already stays. Raises BackupError."""
    if path.exists():
        raise BackupError("backup_exists", f"{path} exists already: name another file with --to.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=path.parent) as scratch:
            database = Path(scratch) / "database"
            say("copying the database")
            _dump(database)
            listed = {DATABASE: database, **dict(_extras(config, with_secrets=with_secrets, with_files=with_files))}
            archive = Path(scratch) / "archive"
            archive.touch(mode=0o600)
            manifest = _write(archive, listed, now, say)
            archive.rename(path)
    except OSError as error:
        raise BackupError("backup_not_written", f"{path} cannot be written: {error.strerror or error}") from error
    except sqlite3.Error as error:
        raise BackupError("backup_not_written", f"The database cannot be copied to {path.parent}: {error}") from error
    return manifest


def _extras(config: Config, *, with_secrets: bool, with_files: bool) -> Iterator[tuple[str, Path]]:
    for name in SECRETS if with_secrets else ():
        if (config.state / name).is_file():
            yield f"secrets/{name}", config.state / name
    for folder in FILE_FOLDERS if with_files else ():
        for path in sorted((config.state / folder).rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield f"files/{path.relative_to(config.state).as_posix()}", path


def _write(archive: Path, listed: Mapping[str, Path], now: datetime, say: Progress) -> Manifest:
    """The manifest goes last: a file that grows meanwhile is named with what was really stored."""
    manifest = Manifest(
        made_at=now.isoformat(timespec="seconds"),
        engine=engine(),
        migrations=_migrations(),
        pepper=pepper_fingerprint(),
    )
    with tarfile.open(archive, "w:gz", compresslevel=3) as tar:
        for name, path in listed.items():
            say(f"storing {name}")
            with path.open("rb") as file:
                information = tar.gettarinfo(arcname=name, fileobj=file)
                hashed = _Hashing(file)
                tar.addfile(information, hashed)
            manifest.members[name] = {"bytes": information.size, "sha256": hashed.hexdigest()}
        with tempfile.TemporaryFile() as text:
            values = {name: getattr(manifest, name) for name in Manifest.__dataclass_fields__}
            text.write(json.dumps(values, indent=1).encode())
            text.seek(0)
            tar.addfile(tar.gettarinfo(arcname=MANIFEST, fileobj=text), text)
    return manifest


class _Hashing:
    """A file that is read once: into the archive and into its SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _migrations() -> dict[str, str]:
    applied = MigrationLoader(connection).applied_migrations
    return {app: max(name for label, name in applied if label == app) for app in sorted({app for app, _ in applied})}


def _dump(target: Path) -> None:
    if engine() == "postgresql":
        _run_pg("pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={target}")
        return
    source = Path(connection.settings_dict["NAME"])
    opened = sqlite3.connect(f"{source.as_uri()}?mode=ro", uri=True)
    with contextlib.closing(opened) as live, contextlib.closing(sqlite3.connect(target)) as copy:
        live.backup(copy)  # in one step: writers go on beside it, and between two steps each write would begin it anew
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, whatever the live one has
        _check_integrity(copy)


def _check_integrity(database: sqlite3.Connection) -> None:
    try:
        [found] = database.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise BackupError("database_damaged", f"SQLite finds the copy of the database damaged: {found}")


def _run_pg(tool: str, *arguments: str) -> None:
    """The password goes by environment: a command line can be read by everybody on the machine."""
    found = shutil.which(tool)
    if found is None:
        raise BackupError(f"{tool}_missing", f"{tool} is not there: install PostgreSQL's client programs.")
    names = {"PGHOST": "HOST", "PGPORT": "PORT", "PGUSER": "USER", "PGPASSWORD": "PASSWORD", "PGDATABASE": "NAME"}
    given = {name: str(connection.settings_dict[key]) for name, key in names.items() if connection.settings_dict[key]}
    done = subprocess.run([found, *arguments], env={**os.environ, **given}, capture_output=True, check=False, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise BackupError(f"{tool}_failed", f"{tool} failed: {lines[-1]}")


# Reading one


def read(path: Path, folder: Path, say: Progress = lambda text: None) -> Manifest:
    """Unpack into an empty folder, and compare every member with the manifest. Raises BackupError."""
    found: dict[str, dict[str, Any]] = {}
    manifest: Manifest | None = None
    try:
        with tarfile.open(path, "r:gz") as tar:
            for number, member in enumerate(tar):
                if number > MAX_MEMBERS or not _is_plain(member):
                    raise BackupError("backup_invalid", f"{path} is no backup of llmsite: {member.name[:100]!r} in it.")
                content = tar.extractfile(member)
                assert content is not None
                if member.name == MANIFEST:
                    manifest = _manifest(content.read(MAX_MANIFEST_BYTES))
                    continue
                say(f"reading {member.name}")
                found[member.name] = _unpack(content, folder / member.name)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise BackupError("backup_unreadable", f"{path} cannot be read: {error}") from error
    if manifest is None or DATABASE not in manifest.members:
        raise BackupError("backup_invalid", f"{path} has no manifest: it is no backup, or was cut off.")
    if found != manifest.members:
        wrong = sorted(name for name in {*found, *manifest.members} if found.get(name) != manifest.members.get(name))
        raise BackupError("backup_damaged", f"{path} is damaged: {wrong[0]} is not what the manifest says.")
    return manifest


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether it is a file such as `make` stores: nothing else of STATE_DIR is written."""
    match PurePosixPath(member.name).parts:
        case ("secrets", name):
            is_ours = name in SECRETS
        case ("files", folder, _, *_):
            is_ours = folder in FILE_FOLDERS
        case _:
            is_ours = member.name in (MANIFEST, DATABASE)
    return member.isfile() and is_ours and ".." not in member.name.split("/") and "\\" not in member.name


def _unpack(content: IO[bytes], target: Path) -> dict[str, Any]:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
    target.chmod(0o600)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest(data: bytes) -> Manifest:
    try:
        values = json.loads(data)
        version = values["format"]
        if version != FORMAT:
            raise BackupError("backup_version", f"This backup has form {version}; this version reads form {FORMAT}.")
        return Manifest(**values)
    except (ValueError, TypeError, LookupError) as error:
        raise BackupError("backup_invalid", "The backup's manifest cannot be understood.") from error


# Restoring one


@dataclass(slots=True)
class Restored:
    """What was done. `kept`: where what was there before is now."""

    manifest: Manifest
    report: audit.Report = field(default_factory=audit.Report)
    kept: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_files: int = 0


def restore(
    config: Config, path: Path, now: datetime, *, replace: bool = False, say: Progress = lambda text: None
) -> Restored:
    """Put a backup in the place of this installation's data, migrate it and prove its ledger.

    Refuses a site that runs, and a target that holds something unless `replace`; what was there is kept beside it
    (SQLite, secrets). Raises BackupError.
    """
    config.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with held_alone(config.state), tempfile.TemporaryDirectory(prefix=".restore-", dir=config.state) as scratch:
            _refuse_running()
            manifest = read(path, Path(scratch), say)
            _check_fit(manifest)
            if not replace:
                _refuse_full()
            done = Restored(manifest)
            say("replacing the database")
            _replace_database(Path(scratch) / DATABASE, now, done)
            _replace_files(config, Path(scratch), now, done)
            say("migrating and proving the ledger")
            migrate(say)
            done.report = audit.audit()
            _warn_of_pepper(config, manifest, done)
            return done
    except StartError as error:
        raise BackupError("site_runs", str(error)) from error
    except (OSError, DatabaseError) as error:
        raise BackupError("restore_failed", f"The backup could not be put in place: {error}") from error


def _refuse_running() -> None:
    """Workers of other machines hold no lock here; they are seen in Redis. Where it does not answer none can serve."""
    with contextlib.suppress(RedisError):
        if workers := TicketQueue(redis_client.client()).workers():
            names = ", ".join(worker.worker_id for worker in workers[:3])
            raise BackupError("site_runs", f"Workers of this site run: {names}. Stop every process of it first.")


def _check_fit(manifest: Manifest) -> None:
    if manifest.engine != engine():
        raise BackupError(
            "other_database",
            f"The backup is of {manifest.engine}, and DATABASE_URL names {engine()}: restore it where it is the same.",
        )
    known = MigrationLoader(None).disk_migrations
    for app, name in manifest.migrations.items():
        newest = max((each for label, each in known if label == app), default="")
        if newest and name > newest:
            raise BackupError("backup_newer", f"The backup is of a newer version ({app} {name}): update llmsite first.")


def _refuse_full() -> None:
    """Secrets alone protect nothing: every start makes them."""
    try:
        num_rows = Tenant.objects.count() + get_user_model().objects.count()
    except DatabaseError:  # no tables yet
        num_rows = 0
    finally:
        connection.close()
    if num_rows:
        raise BackupError(
            "not_empty",
            f"This installation holds {num_rows:,} tenants and users. With --replace they give way to the backup.",
        )


def _replace_database(source: Path, now: datetime, done: Restored) -> None:
    if engine() == "postgresql":
        connection.close()
        options = ("--clean", "--if-exists", "--no-owner", "--no-privileges", "--single-transaction")
        _run_pg("pg_restore", *options, f"--dbname={connection.settings_dict['NAME']}", str(source))
        return
    with contextlib.closing(sqlite3.connect(source)) as copy:
        _check_integrity(copy)
    target = Path(connection.settings_dict["NAME"])
    connection.close()
    _put_aside(target, now, done)
    for suffix in ("-shm", *UNMERGED):  # of no file that is there any more
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    source.rename(target)


def _put_aside(path: Path, now: datetime, done: Restored) -> None:
    if not path.exists():
        return
    if path.suffix == ".sqlite3":
        _merge(path)
    kept = path.with_name(f"{path.name}.before-{now:%Y%m%dT%H%M%S}")
    path.rename(kept)
    done.kept.append(str(kept))
    for suffix in UNMERGED:
        if (beside := path.with_name(path.name + suffix)).exists():
            beside.rename(f"{kept}{suffix}")
            done.kept.append(f"{kept}{suffix}")


def _merge(path: Path) -> None:
    """What was written last into the database itself. One that is damaged stays as it is: SQLite would throw that
    away."""
    with path.open("rb") as file:
        is_database = file.read(len(SQLITE_HEADER)) == SQLITE_HEADER
    if is_database:
        with contextlib.suppress(sqlite3.DatabaseError), contextlib.closing(sqlite3.connect(path)) as old:
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _replace_files(config: Config, scratch: Path, now: datetime, done: Restored) -> None:
    for path in _files_below(scratch / "secrets"):
        target = config.state / path.name
        if target.exists() and target.read_bytes() == path.read_bytes():
            continue
        _put_aside(target, now, done)
        path.rename(target)
    for path in _files_below(scratch / "files"):
        target = config.state / path.relative_to(scratch / "files")
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.replace(target)
        done.num_files += 1


def _files_below(folder: Path) -> Iterable[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _warn_of_pepper(config: Config, manifest: Manifest, done: Restored) -> None:
    """Settings were read when this process began: a pepper that has just come from the backup is not in them yet."""
    is_restored = manifest.has_secrets and not config.key_pepper
    if not is_restored and manifest.pepper != pepper_fingerprint():
        done.warnings.append(
            "KEY_PEPPER is another one than when the backup was made: no API key of the backup works here. "
            "Give the old pepper (setting KEY_PEPPER, or the file key_pepper in STATE_DIR), or issue new keys."
        )
