"""OpenAI's dialect: chat completions, completions, models."""

from __future__ import annotations

import json
from typing import Any

from inference.conformance.target import Answer, Check, Skipped, Target, expect, good, refused

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
BODY: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]},
    },
}


def chat(target: Target, **fields: Any) -> Answer:
    answer = target.post(CHAT, {**BODY, **fields})
    if answer.status == 400 and b"chat template" in answer.data:
        raise Skipped("the model has no chat template")
    return answer


def lists_models(target: Target) -> None:
    found = good(target.get("/v1/models"))
    expect(found.get("object") == "list" and found["data"][0].get("object") == "model", found)
    expect(good(target.get(f"/v1/models/{found['data'][0]['id']}")).get("object") == "model", "no such model by id")


def chats(target: Target) -> None:
    found = good(chat(target))
    [choice], usage = found["choices"], found["usage"]
    expect(found["object"] == "chat.completion" and found["id"], found)
    expect(choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length"), choice)
    expect(usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"], usage)


def streams(target: Target) -> None:
    answer = chat(target, stream=True, stream_options={"include_usage": True})
    events = answer.events()
    expect(events and events[-1][1] == "[DONE]", events[-1:])
    chunks = answer.objects()
    expect(all(chunk["object"] == "chat.completion.chunk" for chunk in chunks), chunks[:1])
    expect(chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0, chunks[-1])


def gives_several(target: Target) -> None:
    expect(len(good(chat(target, n=2, temperature=1))["choices"]) == 2, "not two choices")


def stops(target: Target) -> None:
    whole = good(target.post(TEXT, {"prompt": "1 2 3 4", "max_tokens": 8, "temperature": 0}))["choices"][0]["text"]
    word = whole.strip()[:1]
    if not word:
        raise Skipped("the model says nothing that could stop it")
    found = good(target.post(TEXT, {"prompt": "1 2 3 4", "max_tokens": 8, "temperature": 0, "stop": [word]}))[
        "choices"
    ][0]
    expect(word not in found["text"] and found["finish_reason"] == "stop", found)


def follows_a_schema(target: Target) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    text = good(chat(target, response_format=form, max_tokens=32))["choices"][0]["message"]["content"]
    expect(isinstance(_object(text).get("ok"), bool), text)


def calls_a_tool(target: Target) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    found = good(chat(target, tools=[TOOL], tool_choice=choice, max_tokens=64))["choices"][0]
    [call] = found["message"].get("tool_calls") or [None]
    expect(call and _object(call["function"]["arguments"]).get("city") in ("Paris", "Rome"), found)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def completes(target: Target) -> None:
    found = good(target.post(TEXT, {"prompt": "The capital of France is", "max_tokens": 4, "logprobs": 1}))
    expect(found["object"] == "text_completion" and found["choices"][0]["logprobs"]["tokens"], found)


def refuses_a_wrong_key(target: Target) -> None:
    error = refused(target.post(CHAT, BODY, key="llms_wrong_key"), 401)["error"]
    expect(error.get("message") and error.get("type") and "code" in error, error)


def refuses_a_wrong_body(target: Target) -> None:
    error = refused(target.post(CHAT, {**BODY, "temperature": "hot"}), 400)["error"]
    expect(error["type"] == "invalid_request_error" and error.get("param") == "temperature", error)


def refuses_an_unknown_model(target: Target) -> None:
    error = refused(target.post(CHAT, {**BODY, "model": "conformance-no-such-model"}), 404)["error"]
    expect(error.get("code") == "model_not_found", error)


CHECKS = [
    Check("OpenAI", "models, listed and by id", lists_models),
    Check("OpenAI", "a chat completion with usage", chats),
    Check("OpenAI", "a stream with usage and [DONE]", streams),
    Check("OpenAI", "n choices", gives_several),
    Check("OpenAI", "stop words", stops),
    Check("OpenAI", "an answer by JSON Schema", follows_a_schema),
    Check("OpenAI", "a forced tool call", calls_a_tool),
    Check("OpenAI", "a text completion with logprobs", completes),
    Check("OpenAI", "401 in its own shape", refuses_a_wrong_key),
    Check("OpenAI", "400 names the parameter", refuses_a_wrong_body),
    Check("OpenAI", "404 for an unknown model", refuses_an_unknown_model),
]
