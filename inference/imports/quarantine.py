"""The disk under files that have not passed their checks: STATE_DIR/quarantine, one folder an import, names of our own.

Files have mode 0600. Whoever works on an import holds its lock, which ends with the process: so two never write to one
file, and what a dead process left is taken up at once. What has passed is linked into STATE_DIR/models/imported, and
the registry knows it there. Several web machines need both folders shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from django.conf import settings

from inference.gguf.parts import name_of, parts_of, place_among
from inference.vetting.inspection import RegistrationError, hash_file

SPARE_BYTES = 256 << 20
"""Left free on the disk, for the database beside the files."""
STRAY_SECONDS = 3600.0
DIGEST_CHARACTERS = 12
ONE_FILE = "model.gguf"


def folder() -> Path:
    return Path(settings.CONFIG.state) / "quarantine"


def folder_of(import_id: int) -> Path:
    return folder() / str(int(import_id))


def make_folder(import_id: int) -> Path:
    place = folder_of(import_id)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    return place


def imported() -> Path:
    return Path(settings.CONFIG.state) / "models" / "imported"


@contextlib.contextmanager
def held(import_id: int) -> Iterator[bool]:
    """Whether this import is ours alone for the block: one thread of all processes."""
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder() / f"{int(import_id)}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


def open_to_write(path: Path, *, keep: int) -> IO[bytes]:
    """To go on after its first `keep` bytes; what is behind them goes. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    file = os.fdopen(handle, "wb")
    file.truncate(keep)
    file.seek(keep)
    return file


def sync(file: IO[bytes]) -> None:
    """What was written survives the machine."""
    file.flush()
    os.fsync(file.fileno())


def received(import_id: int) -> int:
    """Bytes that are there."""
    return sum(path.stat().st_size for path in folder_of(import_id).glob("*.gguf"))


def check_room(coming: int, promised: int) -> None:
    """Raises RegistrationError where files of so many bytes may not come. promised: what other imports, which have not
    ended, will need beside what they have. Two at once may both pass; `check_disk` is asked again while bytes come."""
    config = settings.CONFIG
    check_size(coming)
    present = sum(path.stat().st_size for path in folder().glob("*/*.gguf"))
    if present + promised + coming > config.quarantine_mb << 20:
        raise RegistrationError(
            "quarantine_full",
            f"Other imports have taken the room in quarantine (QUARANTINE_MB is {config.quarantine_mb}): wait for "
            "them, or cancel some.",
        )
    check_disk(coming + promised)


def check_size(num_bytes: int) -> None:
    """Raises RegistrationError for more than one import may have."""
    most = settings.CONFIG.import_mb << 20
    if num_bytes > most:
        raise RegistrationError(
            "import_too_large", f"It has {num_bytes:,} bytes or more; IMPORT_MB allows {most:,} with all parts."
        )


def check_disk(coming: int) -> None:
    """Raises RegistrationError where the disk has no room for so many bytes more."""
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    free = shutil.disk_usage(folder()).free
    if coming + SPARE_BYTES > free:
        raise RegistrationError(
            "disk_full",
            f"{coming / 1e9:,.2f} GB are to come, and {max(0, free - SPARE_BYTES) / 1e9:,.2f} GB are free in "
            f"{folder()}: make room.",
        )


def let_in(first: Path, name: str, digest: str) -> tuple[Path, bool]:
    """Link files that have passed into the folder of models, under a name of their own; the first one's path, and
    whether it is new there. Idempotent. Raises RegistrationError or OSError."""
    imported().mkdir(mode=0o700, parents=True, exist_ok=True)
    stem = f"{name.replace('/', '-')}-{digest[:DIGEST_CHARACTERS]}"
    place = place_among(first.name)
    target = imported() / (name_of(stem, 1, place[2]) if place else f"{stem}.gguf")
    if target.is_file() and hash_file(target, None) == digest:
        return target, False
    for source, link in zip(parts_of(first), parts_of(target), strict=True):
        link.unlink(missing_ok=True)  # left by somebody who was killed
        link.hardlink_to(source)
    return target, True


def turn_away(target: Path) -> None:
    """Undo `let_in`."""
    for path in parts_of(target):
        path.unlink(missing_ok=True)


def remove(import_id: int) -> None:
    """Remove what has come; whoever calls it holds the import."""
    shutil.rmtree(folder_of(import_id), ignore_errors=True)


def sweep_strays(known: Collection[int]) -> int:
    """Remove folders and locks of imports that are not `known`, an hour after they were last touched; how many."""
    number, horizon = 0, time.time() - STRAY_SECONDS
    for path in folder().glob("*"):
        stem = path.name.removesuffix(".lock")
        if stem.isdigit() and int(stem) in known:
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_mtime < horizon:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                number += 1
    return number
