"""Calls of Anthropic's dialect that several test files make, by hand and by the official client."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx

from tests.in_process import read_events

HELLO: list[Any] = [{"role": "user", "content": "Hello there"}]


def message(client: httpx.Client, messages: Any = HELLO, **fields: Any) -> httpx.Response:
    return client.post("/v1/messages", json={"messages": messages, "max_tokens": 8, "temperature": 0, **fields})


def events(client: httpx.Client, messages: Any = HELLO, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name of its type."""
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", "/v1/messages", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        found = list(read_events(response))
    assert [name for name, _ in found] == [data["type"] for _, data in found]
    return [data for _, data in found]


def error_of(response: httpx.Response, status: int, kind: str, code: str) -> str:
    """The message of an error in Anthropic's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error = body["error"]
    assert (error["type"], error["details"]) == (kind, {"error_code": code}), error
    return str(error["message"])


def sdk(base_url: str, key: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=base_url, api_key=key, **{"max_retries": 0, "timeout": 60, **options})


def async_sdk(base_url: str, key: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=base_url, api_key=key, max_retries=0, timeout=60)
