"""Forms that a request forces, over HTTP: a model of 135 million parameters calls rightly, and answers rightly.

Its template shows no tools. FORCED_ANSWERS=100 makes a hundred of each with all schemas; the suite makes a few.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.anthropic_calls import events, message
from tests.anthropic_calls import sdk as anthropic_sdk
from tests.conftest import manage
from tests.in_process import read_events
from tests.openai_calls import chat, chunks, respond, sdk, text_of
from tests.real.conftest import LlamaSite
from tests.structured.tool_corpus import TOOLS, tool

pytestmark = [
    pytest.mark.model,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(3_600),
    pytest.mark.xdist_group("llama_site"),
]

NUM_ANSWERS = int(os.environ.get("FORCED_ANSWERS", "0")) or 12
MAX_TOKENS = 384
NUM_CLIENTS = 8
NO_CUT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": MAX_TOKENS}
"""The model's own probabilities, unlikely tokens included."""
THINKER, SHORT = "thinker", "short"
OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather in a city.", "parameters": WEATHER}
ASK: list[Any] = [{"role": "user", "content": "How is the weather in Rome for three days?"}]


@pytest.fixture(scope="module")
def client(llama_site: LlamaSite, model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    template = tmp_path_factory.mktemp("templates") / "opens.jinja"
    template.write_text(OPENS_THOUGHTS)
    register = partial(manage, llama_site.site, "register_model", str(model_path), "--n-slots", "2", "--name")
    register(THINKER, "--n-ctx", "1024", "--chat-template", str(template))
    register(SHORT, "--n-ctx", "256")
    with httpx.Client(base_url=llama_site.site.base_url, headers=llama_site.site.headers(), timeout=600) as found:
        yield found


def answered(client: httpx.Client, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(lambda body: _patiently(client, body), bodies))
    assert [each.status_code for each in answers] == [200] * len(bodies), [each.text[:300] for each in answers]
    return [each.json()["choices"][0] for each in answers]


def _patiently(client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
    """As the official clients do: a 503 is asked again, since many new grammars at once may be too many to try out."""
    for _ in range(10):
        answer = client.post("/v1/chat/completions", json=body)
        if answer.status_code != 503:
            break
        time.sleep(float(answer.headers["retry-after"]))
    return answer


# A hundred of each


def test_every_forced_call_is_valid(client: httpx.Client) -> None:
    """Several tools to choose from, and several calls at once, in every third."""
    names, bodies, offered = list(TOOLS), [], []
    for number in range(NUM_ANSWERS):
        name = names[number * 7 % len(names)]
        several = number % 3 == 0
        offered.append({name, "now", "pick"} if several else {name})
        choice: Any = "required" if several else {"type": "function", "function": {"name": name}}
        bodies.append(
            {
                "model": "smollm2-135m",
                "messages": [{"role": "user", "content": TOOLS[name][0]}],
                "tools": [tool(each) for each in sorted(offered[-1])],
                "tool_choice": choice,
                "parallel_tool_calls": several,
                "seed": number,
                **NO_CUT,
            }
        )
    for choice, names_of in zip(answered(client, bodies), offered, strict=True):
        assert choice["finish_reason"] == "tool_calls", choice
        assert choice["message"]["content"] == ""
        for call in choice["message"]["tool_calls"]:
            function = call["function"]
            assert function["name"] in names_of
            jsonschema.validate(json.loads(function["arguments"]), TOOLS[function["name"]][1])


def test_every_answer_in_a_schema_is_valid(client: httpx.Client) -> None:
    names = list(TOOLS)
    chosen = [names[number * 7 % len(names)] for number in range(NUM_ANSWERS)]
    bodies = [
        {
            "model": "smollm2-135m",
            "messages": [{"role": "user", "content": TOOLS[name][0]}],
            "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": TOOLS[name][1]}},
            "seed": number,
            **NO_CUT,
        }
        for number, name in enumerate(chosen)
    ]
    for choice, name in zip(answered(client, bodies), chosen, strict=True):
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), TOOLS[name][1])


def test_beside_an_answer_in_a_schema_a_call_is_valid_and_so_is_the_answer(client: httpx.Client) -> None:
    answer = {"type": "object", "properties": {"sentence": {"type": "string"}}, "required": ["sentence"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": answer}}
    bodies = [
        {
            "model": "smollm2-135m",
            "messages": ASK,
            "tools": [{"type": "function", "function": FUNCTION}],
            "response_format": form,
            "seed": number,
            **NO_CUT,
        }
        for number in range(NUM_ANSWERS)
    ]
    reasons = set()
    for choice in answered(client, bodies):
        reasons.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), answer)
            continue
        assert choice["message"]["content"] == ""
        for call in choice["message"]["tool_calls"]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    assert "tool_calls" in reasons
    assert reasons <= {"tool_calls", "stop"}


# The bound that counts


@pytest.mark.parametrize("name", ["deep", "write_note", "anything", "open_object"])
def test_without_max_tokens_the_room_that_is_left_is_the_bound(client: httpx.Client, name: str) -> None:
    """Of a context of 256 tokens; whole answers, and calls in every dialect that has them."""
    messages = [{"role": "user", "content": TOOLS[name][0]}]
    wide = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "model": SHORT, "messages": messages}
    schema = TOOLS[name][1]
    for seed in range(2):
        form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
        found = client.post("/v1/chat/completions", json={**wide, "seed": seed, "response_format": form}).json()
        assert found["choices"][0]["finish_reason"] == "stop", found
        jsonschema.validate(json.loads(found["choices"][0]["message"]["content"]), schema)
        native = {key: value for key, value in wide.items() if key != "max_tokens"}
        said = client.post("/v1/generate", json={**native, "seed": seed, "json_schema": schema, "max_new_tokens": 120})
        jsonschema.validate(json.loads(said.json()["output"]), schema)
        raw = {**wide, "prompt": "A JSON text: ", "n_predict": -1, "json_schema": schema, "seed": seed}
        raw.pop("messages")
        text = client.post("/completion", json=raw).json()
        assert (text["stop_type"], text["truncated"]) == ("eos", False), text
        jsonschema.validate(json.loads(text["content"]), schema)


def test_a_form_that_fits_nowhere_is_refused_with_its_length(client: httpx.Client) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}
    refused = chat(client, ASK, model="smollm2-135m", response_format=form, max_tokens=5)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_tokens"
    said = refused.json()["error"]["message"]
    needed = int(said.split(" tokens", 1)[0].rsplit(" ", 1)[1])
    assert 5 < needed < 20
    assert chat(client, ASK, model="smollm2-135m", response_format=form, max_tokens=needed).status_code == 200
    for body in ({"stream": True}, {"stream": False}):
        tools = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
        assert chat(client, ASK, model="smollm2-135m", max_tokens=5, **tools, **body).status_code == 400


# A template that opens the model's thoughts


FORMS: dict[str, dict[str, Any]] = {
    "required": {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
    "named": {
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    },
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}}},
}
ROOM = {"model": THINKER, "max_tokens": 200, "temperature": 1.0, "parallel_tool_calls": False}


@pytest.mark.parametrize("form", FORMS)
def test_openai_answers_have_their_form_behind_thoughts(client: httpx.Client, form: str) -> None:
    num_thoughts = 0
    for seed in range(3):
        ask = {**ROOM, **FORMS[form], "seed": seed}
        choice = chat(client, ASK, **ask).json()["choices"][0]
        whole = choice["message"]
        assert "<think>" not in str(whole)
        found = chunks(client, "/v1/chat/completions", messages=ASK, **ask)
        assert text_of(found) == (whole["content"] or "")
        assert text_of(found, name="reasoning_content") == whole.get("reasoning_content", "")
        num_thoughts += bool(whole.get("reasoning_content"))
        if form == "schema":
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(whole["content"]), WEATHER)
            continue
        assert choice["finish_reason"] == "tool_calls"
        assert whole["content"] == ""
        (call,) = whole["tool_calls"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
        deltas = [each for chunk in found for c in chunk["choices"] for each in c["delta"].get("tool_calls", ())]
        assert len(deltas) > 3, "the arguments come as they are written"
        assert deltas[0]["function"]["name"] == "get_weather"
        assert "".join(each["function"]["arguments"] for each in deltas) == call["function"]["arguments"]
    assert num_thoughts


@pytest.mark.parametrize("form", [None, *FORMS])
def test_thoughts_have_no_more_tokens_than_their_budget(client: httpx.Client, form: str | None) -> None:
    """Without one the free model thinks to its end, as it does not know the tags."""
    ask = {**ROOM, **(FORMS[form] if form else {}), "seed": 3, "ignore_eos": True}
    choice = chat(client, ASK, **ask, thinking_budget_tokens=12).json()["choices"][0]
    whole = choice["message"]
    counted = client.post("/tokenize", json={"content": whole["reasoning_content"]}).json()["tokens"]
    assert 0 < len(counted) <= 12 + 2
    if form is None:
        assert whole["content"]
        free = chat(client, ASK, **ask).json()["choices"][0]["message"]
        assert not free["content"]
        assert free["reasoning_content"].startswith(whole["reasoning_content"])
    elif form == "schema":
        jsonschema.validate(json.loads(whole["content"]), WEATHER)
    else:
        jsonschema.validate(json.loads(whole["tool_calls"][0]["function"]["arguments"]), WEATHER)


def test_thoughts_that_are_not_told_apart_are_not_had(client: httpx.Client) -> None:
    choice = chat(client, ASK, **ROOM, **FORMS["schema"], reasoning_format="none").json()["choices"][0]
    jsonschema.validate(json.loads(choice["message"]["content"]), WEATHER)


def test_a_grammar_of_the_client_s_own_is_all_that_is_said(client: httpx.Client) -> None:
    message = chat(client, ASK, **ROOM, grammar='root ::= "yes" | "no"').json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
    assert "reasoning_content" not in message


@pytest.mark.parametrize("form", FORMS)
def test_anthropic_answers_have_their_form_behind_thoughts(client: httpx.Client, form: str) -> None:
    tools = [{"name": "get_weather", "input_schema": WEATHER}]
    fields: dict[str, Any] = {
        "required": {"tools": tools, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        "named": {"tools": tools, "tool_choice": {"type": "tool", "name": "get_weather"}},
        "schema": {"output_config": {"format": {"type": "json_schema", "schema": WEATHER}}},
    }[form]
    ask = {"model": THINKER, "max_tokens": 200, "temperature": 1.0, "seed": 3, **fields}
    whole = message(client, ASK, **ask).json()
    last = whole["content"][-1]
    told = events(client, ASK, **ask)
    if form == "schema":
        jsonschema.validate(json.loads(last["text"]), WEATHER)
        assert whole["stop_reason"] == "end_turn"
    else:
        assert last["type"] == "tool_use"
        assert whole["stop_reason"] == "tool_use"
        jsonschema.validate(last["input"], WEATHER)
        parts = [
            each["delta"]["partial_json"] for each in told if each.get("delta", {}).get("type") == "input_json_delta"
        ]
        calls = [block for block in whole["content"] if block["type"] == "tool_use"]
        assert len(parts) > len(calls)
        if len(calls) == 1:
            assert json.loads("".join(parts)) == last["input"]
    kinds = [each["content_block"]["type"] for each in told if each["type"] == "content_block_start"]
    assert kinds == [block["type"] for block in whole["content"]]


@pytest.mark.parametrize("form", FORMS)
def test_responses_have_their_form_behind_thoughts(client: httpx.Client, form: str) -> None:
    tools = [{"type": "function", **FUNCTION}]
    fields: dict[str, Any] = {
        "required": {"tools": tools, "tool_choice": "required"},
        "named": {"tools": tools, "tool_choice": {"type": "function", "name": "get_weather"}},
        "schema": {"text": {"format": {"type": "json_schema", "name": "w", "schema": WEATHER}}},
    }[form]
    ask = {**ROOM, "max_output_tokens": ROOM["max_tokens"], "seed": 3, **fields}
    del ask["max_tokens"]
    whole = respond(client, ASK[0]["content"], **ask).json()
    assert whole["status"] == "completed"
    item = whole["output"][-1]
    body = {"input": ASK[0]["content"], "stream": True, **ask}
    with client.stream("POST", "/v1/responses", json=body) as response:
        told = [data for _, data in read_events(response)]
    assert [each["type"] for each in told[-1]["response"]["output"]] == [each["type"] for each in whole["output"]]
    if form == "schema":
        jsonschema.validate(json.loads(item["content"][0]["text"]), WEATHER)
        return
    assert (item["type"], item["status"]) == ("function_call", "completed")
    jsonschema.validate(json.loads(item["arguments"]), WEATHER)
    parts = [each["delta"] for each in told if each["type"] == "response.function_call_arguments.delta"]
    assert len(parts) > 1
    assert "".join(parts) == item["arguments"]


def test_the_clients_libraries_read_calls_as_they_come(llama_site: LlamaSite, client: httpx.Client) -> None:
    base_url, key = llama_site.site.base_url, llama_site.site.key
    ask: Any = {**ROOM, **FORMS["named"], "messages": ASK, "seed": 5}
    with sdk(base_url, key) as openai_client, openai_client.chat.completions.stream(**ask) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    jsonschema.validate(json.loads(call.function.arguments), WEATHER)
    tools: Any = [{"name": "get_weather", "input_schema": WEATHER}]
    forced: Any = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    with (
        anthropic_sdk(base_url, key) as anthropic_client,
        anthropic_client.messages.stream(
            model=THINKER, messages=ASK, max_tokens=200, tools=tools, tool_choice=forced
        ) as events_of,
    ):
        block = events_of.get_final_message().content[-1]
    assert block.type == "tool_use"
    jsonschema.validate(block.input, WEATHER)
