"""A batch's input, line by line: what is wrong with it, and where each request is. Pure but for reading the file.

https://platform.openai.com/docs/api-reference/batch/request-input
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import orjson

from inference.batches.models import MAX_CUSTOM_ID

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class Line:
    """A request. number: from 1, as editors count; offset and size in bytes, without the end of the line."""

    number: int
    offset: int
    size: int
    custom_id: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Why the file is refused. line: None where it is the file as a whole."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None

    def as_error(self) -> dict[str, Any]:
        """As `errors.data` of a batch has it."""
        return {"code": self.code, "message": self.message, "param": self.param, "line": self.line}


class _WrongLine(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def read(file: IO[bytes], endpoint: str, *, max_lines: int, max_line_bytes: int) -> Iterator[Line | Problem]:
    """Every line that is not blank. Ends at the first problem of the file as a whole."""
    number, num_requests, offset = 0, 0, 0
    seen: dict[str, int] = {}
    while raw := file.readline(max_line_bytes + 2):
        number += 1
        start, offset = offset, offset + len(raw)
        if number == 1 and raw.startswith(BYTE_ORDER_MARK):
            raw, start = raw[len(BYTE_ORDER_MARK) :], start + len(BYTE_ORDER_MARK)
        text = raw.rstrip(b"\r\n")
        if len(text) > max_line_bytes:
            yield Problem("line_too_long", f"The line is over the limit of {max_line_bytes} bytes.", None, number)
            return
        if not text.strip():
            continue
        num_requests += 1
        if num_requests > max_lines:
            yield Problem("too_many_lines", f"The file has more than {max_lines} requests.")
            return
        try:
            custom_id = _check(text, endpoint)
            if custom_id in seen:
                raise _WrongLine("duplicate_custom_id", f"Line {seen[custom_id]} has this custom_id.", "custom_id")
        except _WrongLine as wrong:
            yield Problem(wrong.code, wrong.message, wrong.param, number)
            if wrong.code == "invalid_encoding":  # no line of it can be right
                return
            continue
        seen[custom_id] = number
        yield Line(number, start, len(text), custom_id)
    if not num_requests:
        yield Problem("empty_file", "The file has no request: write one JSON object on each line.")


def _check(text: bytes, endpoint: str) -> str:
    """The line's custom_id."""
    try:
        text.decode()
    except UnicodeDecodeError:
        raise _WrongLine("invalid_encoding", "The line is not UTF-8.") from None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _WrongLine("invalid_json_line", f"The line is not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise _WrongLine("invalid_json_line", "The line is not a JSON object.")
    for name in FIELDS:
        if name not in found:
            raise _WrongLine("missing_required_parameter", f"The line has no {name}.", name)
    custom_id, method, url, body = (found[name] for name in FIELDS)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID or not custom_id.isprintable():
        raise _WrongLine("invalid_value", f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters.", "custom_id")
    if method != "POST":
        raise _WrongLine("invalid_method", "method must be POST.", "method")
    if url != endpoint:
        raise _WrongLine("mismatched_url", f"url must be the batch's endpoint, {endpoint}.", "url")
    if not isinstance(body, dict):
        raise _WrongLine("invalid_type", "body must be an object.", "body")
    if body.get("stream"):
        raise _WrongLine("invalid_value", "A request of a batch cannot stream.", "body.stream")
    return custom_id


def body_of(text: bytes) -> bytes:
    """The request's body, of a line that was found right."""
    return orjson.dumps(orjson.loads(text)["body"])
