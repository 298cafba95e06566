"""Stored files: rows, and bytes in the state folder, a folder of each tenant's own. Blocking; web and commands.

They are what tenants gave to be kept: content. The server chooses every path, files have mode 0600, and number, bytes
and days are bounded. A file is whole before its row is there; bytes without a row are removed by `purge`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from django.conf import settings
from django.db.models import Count, Sum

from accounts.identity.principals import Principal
from accounts.ledger.turn import turn
from accounts.trail.refusals import Refusal
from inference.batches.models import Batch, StoredFile

logger = logging.getLogger(__name__)

OPEN_STATES = (
    Batch.Status.VALIDATING,
    Batch.Status.IN_PROGRESS,
    Batch.Status.FINALIZING,
    Batch.Status.CANCELLING,
)
ABANDONED_SECONDS = 2 * 3600.0
"""Bytes without a row that are older than this belong to nobody who still writes."""


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def folder() -> Path:
    return Path(settings.CONFIG.state) / "files"


def path_of(tenant_id: int, file_id: str) -> Path:
    """file_id: of a row."""
    return folder() / str(int(tenant_id)) / file_id


@contextmanager
def scratch(tenant_id: int) -> Iterator[Path]:
    """A path to write to, on the disk of the files; what is still there at the end is removed."""
    place = path_of(tenant_id, new_id("part-"))
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield place
    finally:
        place.unlink(missing_ok=True)


def create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w+b")


def keep(written: Path, row: StoredFile) -> StoredFile:
    """Give the bytes of `written` their place, then their row. Whoever dies between leaves bytes for `purge`; so does
    whoever fails: the row may be there, since a commit's reply can be lost and another may have written the same."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    written.replace(path_of(row.tenant_id, row.id))
    with turn():
        row.save(force_insert=True)
    return row


def check_room(principal: Principal, size_bytes: int) -> None:
    """Raises Refusal where the tenant would have too many files or bytes. Two at once may both pass."""
    config = settings.CONFIG
    rows = StoredFile.objects.filter(tenant_id=principal.tenant_id)
    found = rows.aggregate(number=Count("id"), size=Sum("size_bytes", default=0))
    if found["number"] >= config.tenant_files:
        raise Refusal(
            "file_limit_exceeded",
            f"{found['number']} files are stored, as many as may be: delete some.",
            limit="tenant_files",
            value=config.tenant_files,
        )
    if found["size"] + size_bytes > config.tenant_files_mb << 20:
        raise Refusal(
            "file_limit_exceeded",
            f"{found['size']} bytes are stored, {config.tenant_files_mb << 20} may be: delete some files.",
            limit="tenant_files_mb",
            value=config.tenant_files_mb,
        )


def lifetime(now: datetime, seconds: int | None = None) -> datetime:
    """When a file of now is removed: what its tenant asks for, and the operator's days at most."""
    most = timedelta(days=settings.CONFIG.file_days)
    return now + (most if seconds is None else min(most, timedelta(seconds=seconds)))


def find(tenant_id: int, file_id: str) -> StoredFile:
    """Raises Refusal not_found, also for another tenant's."""
    row = StoredFile.objects.filter(pk=file_id[:40], tenant_id=tenant_id).first()
    if row is None:
        raise Refusal("file_not_found", f"No such File object: {file_id[:40]}", field="id")
    return row


def open_bytes(row: StoredFile) -> IO[bytes]:
    """Raises Refusal file_not_found where the bytes are gone: the state folder was changed, or is another machine's."""
    try:
        return os.fdopen(os.open(path_of(row.tenant_id, row.id), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    except OSError as error:
        logger.error("the bytes of %s cannot be read: %s", row.id, error)
        raise Refusal("file_not_found", f"The content of {row.id} is no longer there.", field="id") from error


def delete(row: StoredFile) -> None:
    """Raises Refusal conflict while a batch reads it."""
    if Batch.objects.filter(tenant_id=row.tenant_id, input_file_id=row.id, status__in=OPEN_STATES).exists():
        raise Refusal("conflict", f"A batch that has not ended reads {row.id}: cancel it, or wait.", field="id")
    _remove(row)


def _remove(row: StoredFile) -> None:
    """The row first: bytes without a row are purged, a row without bytes would be a promise."""
    with turn():
        StoredFile.objects.filter(pk=row.id).delete()
    path_of(row.tenant_id, row.id).unlink(missing_ok=True)


def purge(now: datetime) -> dict[str, int]:
    """Remove what has expired, and bytes that belong to nobody. Idempotent; any number of purgers is harmless.

    Returns how many files, batches and stray files were removed.
    """
    busy = set(Batch.objects.filter(status__in=OPEN_STATES).values_list("input_file_id", flat=True))
    expired = [row for row in StoredFile.objects.filter(expires_at__lte=now).iterator() if row.id not in busy]
    for row in expired:
        _remove(row)
    horizon = now - timedelta(days=settings.CONFIG.file_days)
    old = Batch.objects.filter(created_at__lt=horizon).exclude(status__in=OPEN_STATES)
    with turn():
        num_batches = old.delete()[1].get("inference.Batch", 0)
    return {"files": len(expired), "batches": num_batches, "strays": _purge_strays()}


def _purge_strays() -> int:
    number, horizon = 0, time.time() - ABANDONED_SECONDS
    for path in folder().glob("*/*"):
        try:
            if path.lstat().st_mtime < horizon and not StoredFile.objects.filter(pk=path.name[:40]).exists():
                path.unlink()
                number += 1
        except FileNotFoundError:
            continue
    return number
