"""Calls of llama.cpp's dialect that several test files make, with the fake model and with the real one."""

from __future__ import annotations

from typing import Any

import httpx
import orjson


def complete(client: httpx.Client, prompt: Any = "Once upon a time", **fields: Any) -> httpx.Response:
    return client.post("/completion", json={"prompt": prompt, "n_predict": 8, "temperature": 0, **fields})


def stream(client: httpx.Client, prompt: Any = "Once upon a time", **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", "/completion", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [orjson.loads(line.removeprefix("data: ")) for line in lines]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == status
    return error
