"""A server by its base URL, over http.client: bounded answers, JSON and server-sent events. Blocking."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_ANSWER_BYTES = 16 << 20
MAX_SHOWN = 200


class Unmet(Exception):
    """A check that failed; the message is what was seen."""


class Skipped(Exception):
    """A check that does not apply here; the message says why."""


class Unreachable(Exception):
    """The server does not answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Names of headers are lower case."""

    status: int
    headers: Mapping[str, str]
    data: bytes

    def json(self) -> Any:
        """Raises Unmet."""
        try:
            return json.loads(self.data)
        except ValueError:
            raise Unmet(f"no JSON: {self.data[:MAX_SHOWN]!r}") from None

    def events(self) -> list[tuple[str, str]]:
        """Server-sent events as (event, data); comments are dropped. Raises Unmet for another type."""
        kind = self.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            raise Unmet(f"content-type {kind!r} is no stream: {self.data[:MAX_SHOWN]!r}")
        found, event = [], ""
        for line in self.data.splitlines():  # of bytes: as text it would be split at Unicode's own line breaks, too
            name, _, value = line.decode("utf-8", "replace").partition(":")
            if name == "event":
                event = value.strip()
            elif name == "data":
                found.append((event, value.strip()))
                event = ""
        return found

    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects of the events; `[DONE]` is none."""
        return [json.loads(data) for _, data in self.events() if data.startswith("{")]


@dataclass(slots=True)
class Target:
    """Where and as whom. `known`: what one check found for another."""

    url: str
    key: str
    model: str | None = None
    timeout_seconds: float = 60.0
    known: dict[str, Any] = field(default_factory=dict)

    def get(self, path: str, *, key: str | None = None) -> Answer:
        return self.send("GET", path, None, key=key)

    def post(self, path: str, body: Any, *, key: str | None = None, headers: Mapping[str, str] | None = None) -> Answer:
        if isinstance(body, dict) and self.model and "model" not in body:
            body = {"model": self.model, **body}
        return self.send("POST", path, body, key=key, headers=headers)

    def send(
        self, method: str, path: str, body: Any, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Raises Unreachable, or Unmet for an answer that is too large."""
        parts = urlsplit(self.url)
        sent = {"Authorization": f"Bearer {self.key if key is None else key}", "Accept": "*/*", **(headers or {})}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        connection = self._connection(parts.scheme, parts.hostname or "", parts.port)
        try:
            connection.request(method, parts.path.rstrip("/") + path, data, sent)
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.url} does not answer: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if len(content) > MAX_ANSWER_BYTES:
            raise Unmet(f"the answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, content)

    def _connection(self, scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
        if scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=self.timeout_seconds, context=context)
        return http.client.HTTPConnection(host, port, timeout=self.timeout_seconds)


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of a dialect. `run` returns, or raises Unmet, Skipped or Unreachable."""

    dialect: str
    name: str
    run: Callable[[Target], None]


def expect(condition: object, seen: object) -> None:
    """Raises Unmet with what was seen."""
    if not condition:
        text = seen if isinstance(seen, str) else repr(seen)
        raise Unmet(text[:MAX_SHOWN])


def good(answer: Answer) -> Any:
    """The JSON of a 200. Raises Unmet."""
    expect(answer.status == 200, f"status {answer.status}: {answer.data[:MAX_SHOWN].decode('utf-8', 'replace')}")
    return answer.json()


def refused(answer: Answer, *statuses: int) -> Any:
    """The JSON of a refusal. Raises Unmet for another status."""
    expect(answer.status in statuses, f"status {answer.status} in the place of {' or '.join(map(str, statuses))}")
    return answer.json()
