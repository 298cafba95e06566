"""Single HTTP calls to a server on loopback: setting up, reading metrics and receipts. Not for measuring load.

Blocking; safe from any thread, a connection per call.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CALL_SECONDS = 120.0


class CallRefused(Exception):
    """The server answered with another status than expected."""


@dataclass(frozen=True, slots=True)
class Reply:
    """headers have lower-case names; seconds is the whole call with its connection."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


def call(port: int, method: str, path: str, *, key: str = "", body: object = None) -> Reply:
    """One request. Raises OSError, http.client.HTTPException, and CallRefused for a status of 400 or more."""
    headers = {"Content-Type": "application/json", "Accept": "*/*"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=CALL_SECONDS)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    reply = Reply(
        response.status,
        {name.lower(): value for name, value in response.getheaders()},
        text,
        time.perf_counter() - started,
    )
    if reply.status >= 400:
        raise CallRefused(f"{method} {path}: {reply.status} {text[:300].decode(errors='replace')}")
    return reply
