"""Anthropic's dialect: messages. Skipped where the server has none."""

from __future__ import annotations

from typing import Any

from inference.conformance.target import Answer, Check, Skipped, Target, expect, good, refused

HEADERS = {"anthropic-version": "2023-06-01"}
BODY: dict[str, Any] = {"max_tokens": 8, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
MESSAGES = "/v1/messages"


def message(target: Target, path: str = MESSAGES, key: str | None = None, **fields: Any) -> Answer:
    body = {**BODY, **fields}
    body.setdefault("model", target.model or _first_model(target))
    answer = target.post(path, body, key=key, headers={**HEADERS, "x-api-key": target.key if key is None else key})
    is_missing = answer.status in (404, 405) and b"model" not in answer.data
    if is_missing:
        raise Skipped(f"the server has no {path}")
    if answer.status == 400 and b"chat template" in answer.data:
        raise Skipped("the model has no chat template")
    return answer


def _first_model(target: Target) -> str:
    if "model" not in target.known:
        listed = good(target.get("/v1/models")).get("data") or [{}]
        target.known["model"] = listed[0].get("id", "default")
    return str(target.known["model"])


def answers(target: Target) -> None:
    found = good(message(target))
    expect(found["type"] == "message" and found["role"] == "assistant", found)
    expect(found["content"][0]["type"] == "text" and found["stop_reason"] in ("end_turn", "max_tokens"), found)
    expect(found["usage"]["input_tokens"] > 0 and found["usage"]["output_tokens"] > 0, found["usage"])


def streams(target: Target) -> None:
    names = [name for name, _ in message(target, stream=True).events() if name != "ping"]
    expect(names[:1] == ["message_start"] and names[-2:] == ["message_delta", "message_stop"], names)
    expect("content_block_start" in names and "content_block_delta" in names, names)


def counts(target: Target) -> None:
    body = {key: value for key, value in BODY.items() if key != "max_tokens"}
    answer = target.post(
        f"{MESSAGES}/count_tokens",
        {"model": target.model or _first_model(target), **body},
        headers={**HEADERS, "x-api-key": target.key},
    )
    if answer.status in (404, 405):
        raise Skipped("the server has no count_tokens")
    expect(good(answer)["input_tokens"] > 0, "no input_tokens")


def refuses_a_wrong_key(target: Target) -> None:
    found = refused(message(target, key="llms_wrong_key"), 401)
    expect(found.get("type") == "error" and found["error"]["type"] == "authentication_error", found)


def refuses_a_wrong_body(target: Target) -> None:
    found = refused(message(target, max_tokens="many"), 400)
    expect(found.get("type") == "error" and found["error"]["type"] == "invalid_request_error", found)


CHECKS = [
    Check("Anthropic", "a message with usage", answers),
    Check("Anthropic", "a stream's events in order", streams),
    Check("Anthropic", "tokens are counted", counts),
    Check("Anthropic", "401 in its own shape", refuses_a_wrong_key),
    Check("Anthropic", "400 in its own shape", refuses_a_wrong_body),
]
