"""The folder where formats are written: room for them is checked first, nothing is left behind, one run at a time.

Files are made in a folder of the run's own that is removed at its end; the chosen one is renamed into place whole. What
a killed run left is swept away by the next.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inference.vetting.inspection import Progress, hash_file

PREFIX = ".making-"
SPARE_BYTES = 64 << 20
DIGEST_CHARACTERS = 12


class WorkshopError(Exception):
    """No place to work in; `code` is stable, the message says what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@contextmanager
def workshop(folder: Path, need_bytes: int) -> Iterator[Path]:
    """A folder to write in, on the same disk as `folder`, gone afterwards. Raises WorkshopError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WorkshopError(
            "folder_unwritable", f"{folder} cannot be used: {error}. Name another with --out."
        ) from error
    try:
        _lock(handle, folder)
        for left in folder.glob(f"{PREFIX}*"):  # whoever made it holds no lock: it was killed
            shutil.rmtree(left, ignore_errors=True)
        _check_room(folder, need_bytes)
        with _own_folder(folder) as own:
            yield own
    finally:
        os.close(handle)  # and the lock goes with it


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise WorkshopError(
            "already_running", f"Another run works in {folder}: two would measure each other. Wait until it has ended."
        ) from error


def _check_room(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if need_bytes + SPARE_BYTES > free:
        raise WorkshopError(
            "disk_full",
            f"The formats need up to {need_bytes / 1e9:,.1f} GB in {folder}, where {free / 1e9:,.1f} GB are free: make "
            "room, name fewer --formats, or another disk with --out.",
        )


@contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    try:
        own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
    except OSError as error:
        raise WorkshopError(
            "folder_unwritable", f"{folder} cannot be used: {error}. Name another with --out."
        ) from error
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def is_free(folder: Path) -> bool:
    """Whether no run of this machine works there: a lock ends with its process."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        _lock(handle, folder)
    except WorkshopError:
        return False
    finally:
        os.close(handle)
    return True


def keep(made: Path, folder: Path, name: str, progress: Progress | None = None) -> tuple[Path, bool]:
    """Rename a file that was made into `folder`, under a name that its content decides; and whether it is new there."""
    digest = hash_file(made, progress)
    target = folder / f"{name.replace('/', '-')}-{made.stem}-{digest[:DIGEST_CHARACTERS]}.gguf"
    if target.is_file() and hash_file(target, None) == digest:
        return target, False
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.replace(target)
    return target, True
