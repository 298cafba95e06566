"""A file from an address onto the disk, going on where it broke off. Blocking; the importer's thread, or a command's.

What came is kept only together with the server's validator (a strong ETag, or Last-Modified): the rest is asked for on
the condition that the file is still that one (If-Range, RFC 9110 §13.1.5), else it begins again. `tick` hears of each
piece, and ends the transfer by what it raises.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from inference.imports.addresses import Policy, shown
from inference.imports.connections import TryAgain, get
from inference.imports.quarantine import open_to_write, sync
from inference.vetting.inspection import RegistrationError

PIECE_BYTES = 1 << 18
MAX_FAILURES = 5
"""In a row, without GOOD_BYTES of progress between them."""
GOOD_BYTES = 1 << 20
SLOW_SECONDS = 60.0
"""Within each such span at least GOOD_BYTES come, else the transfer is begun again."""
LONGEST_PAUSE_SECONDS = 30.0

Tick = Callable[[int], None]
"""Called with the bytes of the file that are there; what it raises ends the transfer."""


@dataclass(slots=True, kw_only=True)
class Wanted:
    """A file that is to come, as ModelImport.files keeps it. size: bytes, None where the server does not say."""

    name: str
    url: str
    size: int | None = None
    validator: str = ""


@dataclass(frozen=True, slots=True)
class _Range:
    """Of a Content-Range header: the first byte, and how many the whole has."""

    start: int | None
    total: int | None


def probe(wanted: Wanted, policy: Policy) -> None:
    """Ask for the first byte, to learn size and validator. Raises RegistrationError, or TryAgain."""
    with get(wanted.url, {"Range": "bytes=0-0"}, policy) as answer:
        _check_status(answer, wanted)
        found = _range_of(answer)
        wanted.size = found.total if answer.status in (206, 416) else answer.length
        wanted.validator = _validator_of(answer)
    if wanted.size == 0:
        raise RegistrationError("fetch_failed", f"The file at {shown(wanted.url)} is empty.")


def persistently(step: Callable[[], None], progress: Callable[[], int], pause: Callable[[float], None]) -> None:
    """Do a step again that failed for a while. progress: bytes that are there; pause: waits so many seconds. Raises
    RegistrationError when it fails too often."""
    failures = 0
    while True:
        before = progress()
        try:
            step()
            return
        except TryAgain as error:
            failures = 1 if progress() >= before + GOOD_BYTES else failures + 1
            if failures > MAX_FAILURES:
                text = f"{error}. It was tried {failures} times: look at the server, or try later."
                raise RegistrationError("fetch_failed", text) from error
            pause(min(LONGEST_PAUSE_SECONDS, 2.0 ** (failures - 1)))


def fetch(wanted: Wanted, target: Path, policy: Policy, tick: Tick) -> None:
    """Have all of a probed file at `target`, from where it ends now. Raises RegistrationError, TryAgain, or what `tick`
    raises; what has come stays."""
    have = bytes_at(target)
    if have and have == wanted.size:
        tick(have)
        return
    headers = {}
    if have and wanted.validator:
        headers = {"Range": f"bytes={have}-", "If-Range": wanted.validator}
    with get(wanted.url, headers, policy) as answer:
        _check_status(answer, wanted)
        if answer.status == 416 and _range_of(answer).total == have:  # its size was not known before
            tick(have)
            return
        start = _start_of(answer, wanted, have)
        with open_to_write(target, keep=start) as file:
            _copy(answer, file.write, wanted, start, tick)
            sync(file)


def bytes_at(target: Path) -> int:
    return target.stat().st_size if target.exists() else 0


def _start_of(answer: HTTPResponse, wanted: Wanted, have: int) -> int:
    """The byte that the body begins with: where the file ends, or 0. Raises RegistrationError where it is another file
    than the one that was begun, TryAgain where the answer does not fit the question."""
    if answer.status == 200:
        _check_same(wanted, answer.length, _validator_of(answer))
        return 0
    found = _range_of(answer)
    if answer.status != 206 or found.start != have:
        raise TryAgain(f"The server answered {answer.status} with another part than bytes {have} and on")
    _check_same(wanted, found.total, _validator_of(answer))
    return have


def _check_same(wanted: Wanted, size: int | None, validator: str) -> None:
    is_other = wanted.size is not None and size is not None and size != wanted.size
    if is_other or (wanted.validator and validator and validator != wanted.validator):
        raise RegistrationError(
            "fetch_changed", f"{shown(wanted.url)} became another file while it was fetched: begin the import again."
        )


def _copy(answer: HTTPResponse, write: Callable[[bytes], object], wanted: Wanted, have: int, tick: Tick) -> None:
    span_began, span_bytes = time.monotonic(), have
    while True:
        try:
            data = answer.read1(PIECE_BYTES)
        except (OSError, HTTPException) as error:
            raise TryAgain(f"The connection broke after {have} bytes ({error or type(error).__name__})") from error
        if not data:
            break
        write(data)
        have += len(data)
        tick(have)
        if (now := time.monotonic()) - span_began > SLOW_SECONDS:
            if have - span_bytes < GOOD_BYTES:
                raise TryAgain(f"Only {have - span_bytes} bytes came in {now - span_began:.0f} s")
            span_began, span_bytes = now, have
    if wanted.size is not None and have != wanted.size:
        raise TryAgain(f"The connection broke after {have} of {wanted.size} bytes")


def _check_status(answer: HTTPResponse, wanted: Wanted) -> None:
    status = answer.status
    if status in (408, 425, 429) or status >= 500:
        raise TryAgain(f"{shown(wanted.url)} answered {status} {answer.reason}")
    if status in (401, 403):
        text = (
            f"{shown(wanted.url)} answered {status}: it is not open to all, nor to the token that FETCH_TOKENS may "
            "have for its host. Set one that may read it, or get the file by hand, and upload or register it."
        )
        raise RegistrationError("fetch_failed", text)
    if status not in (200, 206, 416):
        raise RegistrationError("fetch_failed", f"{shown(wanted.url)} answered {status} {answer.reason}.")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RegistrationError(
            "fetch_failed", f"{shown(wanted.url)} sends it compressed, though that was not asked for."
        )


def _validator_of(answer: HTTPResponse) -> str:
    etag = answer.headers.get("ETag") or ""
    found = etag if etag.startswith('"') else answer.headers.get("Last-Modified") or ""
    return found if found.isprintable() and len(found) <= 300 else ""


def _range_of(answer: HTTPResponse) -> _Range:
    text = answer.headers.get("Content-Range") or ""
    found = re.fullmatch(r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)", text)
    if found is None:
        return _Range(None, None)
    start, total = found.groups()
    return _Range(int(start) if start else None, int(total) if total != "*" else None)
