"""Calls of OpenAI's dialect that several test files make, by hand and by the official client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import orjson

HELLO = [{"role": "user", "content": "Hello there"}]


def chat(client: httpx.Client, messages: Any = HELLO, **fields: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8, "temperature": 0, **fields})


def complete(client: httpx.Client, prompt: Any = "Once upon a time", **fields: Any) -> httpx.Response:
    return client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8, "temperature": 0, **fields})


def respond(client: httpx.Client, items: Any = "Hello there", **fields: Any) -> httpx.Response:
    body = {"input": items, "max_output_tokens": 8, "temperature": 0, **fields}
    return client.post("/v1/responses", json=body)


def chunks(client: httpx.Client, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, whose last word is [DONE]."""
    given = {"messages": HELLO} if path.endswith("chat/completions") else {"prompt": "Once upon a time"}
    body = {**given, "max_tokens": 8, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [orjson.loads(line) for line in lines[:-1]]


def text_of(found: list[dict[str, Any]], index: int = 0, name: str = "content") -> str:
    """What the chunks of a choice say together."""
    choices = [choice for chunk in found for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(name) or "" if "delta" in choice else choice["text"] for choice in choices)


def error_of(response: httpx.Response, status: int, code: str | None, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return error


def sdk(base_url: str, key: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60, **options})


def async_sdk(base_url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, timeout=60)
