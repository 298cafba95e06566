"""A multipart body from the wire to a file: first as it comes, on the event loop, then taken apart, in a thread.

Whoever sends it is known by then. Django's parser does the second half, into a file of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from django.core.files import uploadedfile
from django.core.files.uploadhandler import FileUploadHandler, StopUpload
from django.http.multipartparser import MultiPartParser, MultiPartParserError
from django.utils.datastructures import MultiValueDict

from accounts.trail.refusals import Refusal
from inference.api.spooling import Source, copy_body
from inference.batches import files

UPLOAD_SECONDS = 1800.0
MAX_FORM_BYTES = 64 * 1024
"""Of a body, beside its file."""
MAX_FILENAME = 255
UPLOADS_EACH = 4
"""Of a tenant at once, in a web process: each takes up to twice its file on the disk while it is read."""
UPLOADS_AT_ONCE = 16
"""Of all tenants, in a web process."""
_under_way: Counter[int] = Counter()


@contextlib.contextmanager
def one_more(tenant_id: int) -> Iterator[None]:
    """On the event loop, around all that is read and written. Raises Refusal too_many_concurrent_requests or
    service_unavailable."""
    if _under_way[tenant_id] >= UPLOADS_EACH:
        raise Refusal(
            "too_many_concurrent_requests",
            f"{UPLOADS_EACH} uploads of this tenant are under way, as many as may be. Try again in 1 s.",
            retry_after=1,
            limit="uploads",
            of="tenant",
            value=UPLOADS_EACH,
        )
    if _under_way.total() >= UPLOADS_AT_ONCE:
        raise Refusal("service_unavailable", "Too many files are uploaded at once; try again.", retry_after=1)
    _under_way[tenant_id] += 1
    try:
        yield
    finally:
        _under_way[tenant_id] -= 1
        if not _under_way[tenant_id]:
            del _under_way[tenant_id]


async def spool(source: Source, place: Path, max_bytes: int) -> int:
    """The body as it is on the wire; returns its bytes. Raises Refusal request_too_large or request_timeout."""
    file = await asyncio.to_thread(files.create, place)
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            return await copy_body(source, file, lambda num_bytes: _check_size(num_bytes, max_bytes))
    except TimeoutError as error:
        raise Refusal("request_timeout", "The file did not arrive in time.") from error
    finally:
        await asyncio.to_thread(file.close)


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes + MAX_FORM_BYTES:
        raise too_large(max_bytes)


def too_large(max_bytes: int) -> Refusal:
    return Refusal(
        "request_too_large", f"The file is over the limit of {max_bytes} bytes.", field="file", max_file_bytes=max_bytes
    )


class _IntoFile(FileUploadHandler):
    """The part named `file` into `place`; a part too many or too large ends the parse."""

    def __init__(self, place: Path, max_bytes: int) -> None:
        super().__init__()
        self._place, self._max_bytes = place, max_bytes
        self._file: IO[bytes] | None = None
        self.size = 0
        self.refusal: Refusal | None = None

    def new_file(self, *args: Any, **kwargs: Any) -> None:
        super().new_file(*args, **kwargs)
        if self.field_name != "file" or self._file is not None:
            self._stop(Refusal("bad_request", "Send one file, in the part named file.", field="file"))
        self._file = files.create(self._place)

    def receive_data_chunk(self, raw_data: bytes, start: int) -> None:
        assert self._file is not None
        self.size += len(raw_data)
        if self.size > self._max_bytes:
            self._stop(too_large(self._max_bytes))
        self._file.write(raw_data)

    def file_complete(self, file_size: int) -> Any:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        return uploadedfile.UploadedFile(name=self.file_name, size=file_size)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _stop(self, refusal: Refusal) -> None:
        self.refusal = refusal
        raise StopUpload(connection_reset=True)


def take_apart(spooled: Path, content_type: str, place: Path, max_bytes: int) -> tuple[dict[str, Any], str, int]:
    """(fields, file name, bytes) of a multipart body; the file's content is in `place`. Blocking. Raises Refusal."""
    handler = _IntoFile(place, max_bytes)
    meta = {"CONTENT_TYPE": content_type, "CONTENT_LENGTH": spooled.stat().st_size}
    try:
        with spooled.open("rb") as body, contextlib.closing(handler):
            fields, found = MultiPartParser(meta, body, [handler], "utf-8").parse()
    except RequestDataTooBig as error:
        raise Refusal("request_too_large", "The fields beside the file are too large.") from error
    except (MultiPartParserError, SuspiciousOperation) as error:
        raise Refusal("bad_request", f"The body is no multipart/form-data: {error}") from error
    if handler.refusal is not None:
        raise handler.refusal
    if "file" not in found:
        raise Refusal("bad_request", "The part named file is missing.", field="file")
    name = str(getattr(found["file"], "name", "") or "upload.jsonl")
    return _nested(fields), name[-MAX_FILENAME:], handler.size


def _nested(fields: MultiValueDict[str, str]) -> dict[str, Any]:
    """`expires_after[seconds]` is a field of a field."""
    values: dict[str, Any] = {}
    for name, value in _last(fields).items():
        outer, bracket, inner = name.partition("[")
        if bracket and inner.endswith("]"):
            group = values.setdefault(outer, {})
            if isinstance(group, dict):
                group[inner[:-1]] = value
        else:
            values[name] = value
    return values


def _last(fields: Mapping[str, str]) -> dict[str, str]:
    return {name: fields[name] for name in fields}
