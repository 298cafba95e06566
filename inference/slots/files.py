"""States of slots on disk: those that tenants save under a label, and those that outlive an unload of their model.

They hold token ids and what the model made of them, so they are content: a folder of each tenant's own, mode 0600,
bounded in bytes and days. The server chooses every path; whatever is read is verified to its last byte before
anything looks at it, and must come from the same model, vocabulary, context and build. Used by workers alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from inference.engine.slot_keeper import SlotState
from inference.engine.state_store import StoredState
from inference.engine.types import AdapterVector

logger = logging.getLogger(__name__)

MAGIC = b"llmslot1"
MAC_BYTES = 32
MAX_HEADER_BYTES = 64 * 1024
PURPOSE = b"llmsite states of slots"
SAVED, KEPT = ".saved", ".kept"
DAY_SECONDS = 86400.0


FILE_NAME = re.compile(r"(?:[0-9a-f]{16}-)?[0-9a-f]{40}\.(?:saved|kept)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFile:
    """A file as an operator sees it, unverified. name: in the tenant's folder. written_at: Unix seconds."""

    tenant_id: int
    name: str
    is_kept: bool
    num_bytes: int
    written_at: float
    num_tokens: int | None = None
    model_digest: str = ""


class SlotFileError(Exception):
    """A file that is not there, does not fit, or is not to be trusted; the message is for the tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a state is good for: the same of everything. n_ctx: tokens of a slot; build: engine, version, machine."""

    model_digest: str
    vocabulary: str
    n_ctx: int
    kv_type: str
    build: str


def scope_of(tenant_id: int) -> str:
    """The engine's cache_scope of a tenant's requests."""
    return f"tenant {tenant_id}"


def tenant_of(scope: str) -> int:
    return int(scope.removeprefix("tenant "))


class SlotFiles:
    """The files of all tenants under one folder. tenant_bytes: what each may have; 0 switches files off.

    fallbacks: earlier secrets. What they sealed and named is read; what is written has the names and seals of `secret`.
    """

    def __init__(
        self,
        folder: Path,
        secret: str,
        *,
        fallbacks: Sequence[str] = (),
        tenant_bytes: int,
        max_age_days: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._keys = [hmac.digest(each.encode(), PURPOSE, "sha256") for each in (secret, *fallbacks)]
        self._tenant_bytes = tenant_bytes
        self._max_age_seconds = max_age_days * DAY_SECONDS
        self._clock = clock

    @property
    def is_on(self) -> bool:
        return self._tenant_bytes > 0

    # Saved under a label

    def save(self, tenant_id: int, label: str, origin: Origin, saved: SlotState) -> int:
        """Write it in the place of what has this label; returns the bytes. Raises SlotFileError or OSError."""
        path, *earlier = self._saved_paths(tenant_id, label, origin)
        num_bytes = self._write(path, tenant_id, origin, 0, saved)
        for each in earlier:
            each.unlink(missing_ok=True)
        return num_bytes

    def load(self, tenant_id: int, label: str, origin: Origin) -> tuple[SlotState, int]:
        """What was saved under the label for this model, and the bytes that were read. Raises SlotFileError."""
        paths = self._saved_paths(tenant_id, label, origin)
        path = next((each for each in paths if each.exists()), paths[0])
        stored, num_bytes = self._read(path, tenant_id, origin)
        return SlotState(tuple(stored.tokens), stored.key[1], stored.state), num_bytes

    # Kept while a model is not loaded

    def keep(self, origin: Origin, states: Iterable[StoredState], most_bytes: int) -> int:
        """Write states, latest use first, up to so many bytes; returns how many. What cannot be written is logged."""
        number = 0
        for each in states if self.is_on else ():
            most_bytes -= len(each.state)
            if most_bytes < 0:
                break
            tenant_id = tenant_of(each.key[0])
            name = f"{_name(self._keys[0], origin.model_digest, str(each.key), str(each.tokens))}{KEPT}"
            path = self._tenant_folder(tenant_id) / f"{origin.model_digest[:16]}-{name}"
            try:
                self._write(
                    path, tenant_id, origin, each.number, SlotState(tuple(each.tokens), each.key[1], each.state)
                )
            except (SlotFileError, OSError) as error:
                logger.warning("the state of a slot could not be kept: %s", error)
                break
            number += 1
            os.utime(path, (self._clock() - number, self._clock() - number))  # its place in the order of use
        return number

    def take_kept(self, origin: Origin, most_bytes: int) -> list[StoredState]:
        """What was kept for this model, latest first, up to so many bytes; nothing of it is on disk any more.

        What is too old is dropped, whether or not a sweep has come by.
        """
        found, horizon = [], self._clock() - self._max_age_seconds
        for path in self._by_age(self._folder.glob(f"*/{origin.model_digest[:16]}-*{KEPT}")):
            try:
                facts = path.stat()
                size = facts.st_size
                if size <= most_bytes and facts.st_mtime >= horizon:
                    stored, _ = self._read(path, int(path.parent.name), origin)
                    found.append(stored)
                    most_bytes -= size
                path.unlink()
            except (SlotFileError, OSError, ValueError) as error:
                logger.warning("a kept state cannot be read, or not be removed: %s", error)
                with contextlib.suppress(OSError):  # in a folder that may not be written it stays
                    path.unlink()
        return found

    # Upkeep

    def sweep(self) -> int:
        """Remove what is too old, or was never finished; how many files."""
        horizon, number = self._clock() - self._max_age_seconds, 0
        for path in list(self._folder.glob("*/*")):
            try:
                limit = horizon if path.suffix in (SAVED, KEPT) else self._clock() - 3600
                if path.lstat().st_mtime < limit:
                    path.unlink()
                    number += 1
            except OSError as error:
                logger.warning("an old state could not be removed: %s", error)
        return number

    def listing(self, most: int) -> list[StateFile]:
        """What lies there of all tenants, latest first, at most so many."""
        paths = (path for path in self._folder.glob("*/*") if FILE_NAME.match(path.name) and path.parent.name.isdigit())
        found: list[StateFile] = []
        for path in self._by_age(paths):
            if len(found) >= most:
                break
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                found.append(_described(path))
        return found

    def forget(self, tenant_id: int, name: str) -> bool:
        """Remove one file of `listing`; False where it is gone. Raises SlotFileError for what is no name of one."""
        if not FILE_NAME.match(name):
            raise SlotFileError("this is no name of a saved state")
        try:
            (self._tenant_folder(tenant_id) / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def forget_tenant(self, tenant_id: int) -> None:
        """Remove everything of a tenant. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._tenant_folder(tenant_id))

    def forget_kept(self, tenant_id: int, origin: Origin) -> None:
        """Remove what is kept of a tenant for this model."""
        for path in self._tenant_folder(tenant_id).glob(f"{origin.model_digest[:16]}-*{KEPT}"):
            path.unlink(missing_ok=True)

    # Paths

    def _tenant_folder(self, tenant_id: int) -> Path:
        return self._folder / str(int(tenant_id))

    def _saved_paths(self, tenant_id: int, label: str, origin: Origin) -> list[Path]:
        """Where it is written, then where earlier secrets would have it."""
        folder = self._tenant_folder(tenant_id)
        return [folder / f"{_name(key, origin.model_digest, label)}{SAVED}" for key in self._keys]

    def _by_age(self, paths: Iterable[Path]) -> Iterator[Path]:
        """Latest first; those that go meanwhile are left out, and those that may not be looked at."""
        times = []
        for path in paths:
            try:
                times.append((path.lstat().st_mtime, path))
            except (FileNotFoundError, PermissionError):
                continue
        yield from (path for _, path in sorted(times, reverse=True))

    # Bytes

    def _write(self, path: Path, tenant_id: int, origin: Origin, number: int, saved: SlotState) -> int:
        header = {
            "tenant": tenant_id,
            "number": number,
            "adapters": saved.adapters,
            "num_tokens": len(saved.tokens),
            "num_state_bytes": len(saved.state),
            **asdict(origin),
        }
        head = orjson.dumps(header)
        parts = [MAGIC, len(head).to_bytes(4, "little"), head, array("i", saved.tokens).tobytes(), saved.state]
        size = sum(map(len, parts)) + MAC_BYTES
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_room(path, size)
        scratch = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part")
        mac = hmac.new(self._keys[0], digestmod=hashlib.sha256)
        try:
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                for part in parts:
                    mac.update(part)
                    file.write(part)
                file.write(mac.digest())
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return size

    def _make_room(self, path: Path, size: int) -> None:
        """Within the tenant's bytes: kept states go first, then what was saved longest ago."""
        if size > self._tenant_bytes:
            raise SlotFileError(f"the state has {size} bytes, {self._tenant_bytes} are allowed")
        others = [each for each in self._by_age(path.parent.iterdir()) if each != path]
        order = [each for suffix in (SAVED, KEPT) for each in others if each.suffix == suffix]
        total = size
        for each in order:
            try:
                number = each.lstat().st_size
                if total + number > self._tenant_bytes:
                    each.unlink()
                else:
                    total += number
            except FileNotFoundError:
                continue

    def _read(self, path: Path, tenant_id: int, origin: Origin) -> tuple[StoredState, int]:
        data = self._verified(path)
        length = int.from_bytes(data[len(MAGIC) : len(MAGIC) + 4], "little")
        start = len(MAGIC) + 4
        header = orjson.loads(data[start : start + length])
        _check(header, tenant_id, origin)
        tokens = array("i")
        end = start + length + header["num_tokens"] * tokens.itemsize
        tokens.frombytes(data[start + length : end])
        state = bytes(data[end : end + header["num_state_bytes"]])
        adapters: AdapterVector = tuple((str(digest), float(scale)) for digest, scale in header["adapters"])
        stored = StoredState((scope_of(tenant_id), adapters), header["number"], list(tokens), state)
        return stored, len(data) + MAC_BYTES

    def _verified(self, path: Path) -> memoryview:
        """The bytes that `_write` wrote, without the seal. Raises SlotFileError for any others."""
        try:
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                if os.fstat(file.fileno()).st_size > self._tenant_bytes:
                    raise SlotFileError("the file is larger than files may be")
                data = file.read(self._tenant_bytes + 1)
        except FileNotFoundError:
            raise SlotFileError("nothing is saved under this name") from None
        except OSError as error:
            raise SlotFileError("the file cannot be read") from error
        content, mac = memoryview(data)[:-MAC_BYTES], data[-MAC_BYTES:]
        if not data.startswith(MAGIC) or not any(_is_seal(key, content, mac) for key in self._keys):
            raise SlotFileError("the file is damaged, or was written by another installation")
        return content


def _name(key: bytes, *parts: str) -> str:
    """Of fixed form, whatever the label: nothing of it reaches the file system, and nobody can guess it."""
    return hmac.digest(key, "\0".join(parts).encode("utf-8", "surrogatepass"), "sha256").hex()[:40]


def _is_seal(key: bytes, content: memoryview, mac: bytes) -> bool:
    return hmac.compare_digest(hmac.digest(key, content, "sha256"), mac)


def _described(path: Path) -> StateFile:
    """From its first bytes, which only say how much there is of what. Raises FileNotFoundError."""
    status = path.lstat()
    known = StateFile(
        tenant_id=int(path.parent.name),
        name=path.name,
        is_kept=path.suffix == KEPT,
        num_bytes=status.st_size,
        written_at=status.st_mtime,
    )
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            start = file.read(len(MAGIC) + 4)
            length = min(MAX_HEADER_BYTES, int.from_bytes(start[len(MAGIC) :], "little"))
            header = orjson.loads(file.read(length))
        return replace(known, num_tokens=int(header["num_tokens"]), model_digest=str(header["model_digest"])[:64])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError):  # damaged: it is listed without what it would say of itself
        return known


def _check(header: dict[str, Any], tenant_id: int, origin: Origin) -> None:
    if header["tenant"] != tenant_id:
        raise SlotFileError("the file belongs to somebody else")
    for name, value in asdict(origin).items():
        if header[name] != value:
            raise SlotFileError(f"it was saved with another {name.replace('_', ' ')}: {header[name]}, now {value}")
