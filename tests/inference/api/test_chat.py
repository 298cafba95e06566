"""Conversations over HTTP on a site with a fake model: /v1/generate with messages, /apply-template, their bounds."""

from __future__ import annotations

from typing import Any

import pytest

from inference.catalog import model_rows, registry
from inference.models import Receipt, ServedModel
from tests.in_process import CHAT_TEMPLATE, MODEL, N_CTX, Client, InProcessSite, read_events

pytestmark = pytest.mark.api

HELLO = {"role": "user", "content": "Hello there"}
ANSWER = {"role": "assistant", "content": "General"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def generate(client: Client, messages: Any, **fields: Any) -> Any:
    return client.post("/v1/generate", json={"messages": messages, "max_new_tokens": 8, **fields})


def apply(client: Client, messages: Any, **fields: Any) -> Any:
    return client.post("/apply-template", json={"messages": messages, **fields})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


# Messages for /v1/generate


def test_messages_are_answered_and_charged_as_the_prompt_that_they_become(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    response = generate(alice, [HELLO], cache=False, temperature=0)
    assert response.status_code == 200, response.text
    prompt = apply(alice, [HELLO]).json()["prompt"]
    assert prompt == "user : Hello there\nassistant :"
    assert response.headers["x-usage-prompt-tokens"] == str(len(prompt.split()))
    assert response.json()["output"] == alice.generate(prompt, cache=False, temperature=0).json()["output"]
    assert site.charged(site.cast.alice) == (2 * (6 + 8), 0)
    assert Receipt.objects.filter(prompt_tokens=6, route="/v1/generate").count() == 2


def test_messages_stream_as_prompts_do(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    whole = generate(alice, [HELLO], cache=False, temperature=0).json()["output"]
    body = {"messages": [HELLO], "max_new_tokens": 8, "stream": True, "cache": False, "temperature": 0}
    with alice.stream("POST", "/v1/generate", json=body) as response:
        *deltas, last = list(read_events(response))
    assert "".join(data["text"] for _, data in deltas) == whole
    assert (last[0], last[1]["usage"]["prompt_tokens"]) == ("finished", 6)


def test_the_same_conversation_is_answered_from_the_cache(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    first = generate(alice, [HELLO], temperature=0)
    site.settle()
    again = generate(alice, [HELLO], temperature=0)
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    other = generate(alice, [HELLO], temperature=0, chat_template_kwargs={"enable_thinking": True})
    assert other.headers["x-cache"] == "miss"


def test_a_conversation_that_does_not_fit_is_refused_and_costs_nothing(site: InProcessSite) -> None:
    response = generate(site.client(site.cast.alice), [{"role": "user", "content": "word " * N_CTX}])
    assert (response.status_code, response.json()["code"]) == (400, "context_length_exceeded")
    assert site.charged(site.cast.alice) == (0, 0)


def test_a_model_that_is_not_granted_does_not_exist_for_messages(site: InProcessSite) -> None:
    response = generate(site.client(site.cast.charlie), [HELLO], model="granted-model")
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
    response = apply(site.client(site.cast.charlie), [HELLO], model="granted-model")
    assert response.status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "messages": [HELLO]},
        {"prompt": "x", "tools": [TOOL]},
        {"prompt": "x", "chat_template_kwargs": {}},
        {"messages": []},
        {"messages": None},
    ],
)
def test_either_a_prompt_or_messages_is_sent(site: InProcessSite, body: dict[str, Any]) -> None:
    response = site.client(site.cast.alice).post("/v1/generate", json=body)
    assert (response.status_code, response.json()["code"]) == (422, "validation_error")


# /apply-template


@pytest.mark.parametrize(
    ("messages", "fields", "prompt"),
    [
        ([HELLO], {}, "user : Hello there\nassistant :"),
        ([HELLO], {"add_generation_prompt": False}, "user : Hello there\n"),
        ([HELLO, ANSWER], {}, "user : Hello there\nassistant :General"),
        ([HELLO, ANSWER], {"continue_final_message": True}, "user : Hello there\nassistant :General"),
        ([HELLO, ANSWER], {"continue_final_message": False}, "user : Hello there\nassistant : General\nassistant :"),
        ([HELLO, ANSWER], {"add_generation_prompt": True}, "user : Hello there\nassistant : General\nassistant :"),
        ([HELLO, ANSWER], {"add_generation_prompt": False}, "user : Hello there\nassistant : General\n"),
        (
            [HELLO],
            {"chat_template_kwargs": {"enable_thinking": True}},
            "user : Hello there\n<think>\nassistant :",
        ),
        (
            [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, HELLO],
            {"add_generation_prompt": False},
            "system : a\nb\nuser : Hello there\n",
        ),
        ([HELLO], {"tools": [], "model": MODEL}, "user : Hello there\nassistant :"),
    ],
)
def test_a_conversation_becomes_a_prompt(
    site: InProcessSite, messages: list[Any], fields: dict[str, Any], prompt: str
) -> None:
    response = apply(site.client(site.cast.alice), messages, **fields)
    assert response.json() == {"prompt": prompt}


def test_tools_reach_a_model_whose_template_shows_none(site: InProcessSite) -> None:
    messages = [HELLO, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "found"}]
    prompt = apply(site.client(site.cast.alice), messages, tools=[TOOL]).json()["prompt"]
    assert prompt.startswith("system : You can call the functions")
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in prompt
    assert "<tool_response>\nfound\n</tool_response>" in prompt


@pytest.mark.parametrize(
    ("messages", "fields", "said"),
    [
        ([HELLO, ANSWER], {"add_generation_prompt": True, "continue_final_message": True}, "cannot both be true"),
        ([HELLO], {"continue_final_message": True}, "needs a last message of the assistant"),
        ([ANSWER], {"continue_final_message": True}, "after others"),
        ([HELLO], {"chat_template": "{{ messages }}"}, "operator's to choose"),
        ([HELLO], {"chat_template_kwargs": {"chat_template": "x"}}, "cannot be set"),
        ([HELLO], {"chat_template_kwargs": {"messages": []}}, "cannot be set"),
        ([HELLO], {"chat_template_kwargs": {"bos_token": "x"}}, "cannot be set"),
        ([HELLO], {"chat_template_kwargs": {"__class__": "x"}}, "cannot be set"),
        ([HELLO], {"chat_template_kwargs": {f"v{number}": 1 for number in range(40)}}, "at most 32"),
        ([HELLO], {"chat_template_kwargs": nested(40)}, "nested deeper"),
        ([HELLO], {"chat_template_kwargs": {"a": 1 << 70}}, "number that is too large"),
        ([HELLO], {"tools": [{**TOOL, "type": "other"}]}, "function"),
        ([HELLO], {"tools": [TOOL] * 200}, "at most 128"),
        ([{"role": "im_end", "content": "x"}], {}, "role"),
        ([{"role": "user", "content": None}], {}, "content"),
        ([{"role": "assistant"}], {}, "content or tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], {}, "takes text alone"),
        ([{"role": "user", "content": "x" * 1_000_001}], {}, "at most 1000000"),
        ([HELLO] * 5000, {}, "at most 4096"),
        ([{**HELLO, "name": "a b"}], {}, "name"),
        ([HELLO, {"role": "tool", "content": "x", "tool_call_id": "<|im_end|>"}], {}, "tool_call_id"),
    ],
)
def test_what_contradicts_itself_or_is_out_of_bounds_is_refused(
    site: InProcessSite, messages: list[Any], fields: dict[str, Any], said: str
) -> None:
    alice = site.client(site.cast.alice)
    response = apply(alice, messages, **fields)
    assert response.status_code in (400, 422), response.text
    assert said in response.json()["error"]["message"]
    response = generate(alice, messages, **fields)
    assert response.status_code in (400, 422), response.text
    assert site.charged(site.cast.alice) == (0, 0)


def test_fields_of_messages_that_nobody_knows_are_ignored_in_llama_cpps_dialect_alone(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    messages = [{"role": "user", "content": "x", "weight": 1}]
    assert apply(alice, messages).json() == {"prompt": "user : x\nassistant :"}
    assert generate(alice, messages).status_code == 422


@pytest.mark.parametrize("arguments", ["[1]", "{", '{"a": NaN}', '{"a": 1e999}', "[" * 100_000])
def test_arguments_of_a_call_are_an_object_in_a_string(site: InProcessSite, arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    response = apply(site.client(site.cast.alice), [HELLO, {"role": "assistant", "tool_calls": [call]}])
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_whatever_a_model_has_called_can_be_sent_back(site: InProcessSite) -> None:
    """Names that it made up, whole numbers that others write as floats, and half a character."""
    alice = site.client(site.cast.alice)
    for name in ("search the web", "s" * 128, "math::add"):
        arguments = '{"a": 123456789012345678901234567890, "b": 1e30, "c": "\\ud83d", "d": true}'
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}
        response = apply(alice, [HELLO, {"role": "assistant", "tool_calls": [call]}])
        assert response.status_code == 200, response.text
        told = '{"a": 1.2345678901234568e+29, "b": 1e+30, "c": "\ufffd", "d": true}'
        assert f'"name": "{name}", "arguments": {told}' in response.json()["prompt"]


def test_a_call_without_arguments_has_none(site: InProcessSite) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f"}}
    response = apply(site.client(site.cast.alice), [HELLO, {"role": "assistant", "tool_calls": [call]}])
    assert response.status_code == 200, response.text
    assert '"name": "f", "arguments": {}' in response.json()["prompt"]


def test_an_answer_of_a_tool_names_it_as_the_model_has_called_it(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for name in ("search the web", "s" * 128, "mcp/find"):
        call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": "{}"}}
        answer = {"role": "tool", "tool_call_id": "call_1", "name": name, "content": "Yes"}
        response = apply(alice, [HELLO, {"role": "assistant", "tool_calls": [call]}, answer])
        assert response.status_code == 200, response.text


def test_a_refusal_is_what_the_assistant_said(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    refusal = {"role": "assistant", "content": None, "refusal": "No.", "annotations": [{"type": "url_citation"}]}
    again = {"role": "user", "name": "José", "content": "Please"}
    assert "No." in apply(alice, [HELLO, refusal, again]).json()["prompt"]


def test_a_model_without_a_good_template_takes_prompts_alone(site: InProcessSite) -> None:
    ServedModel.objects.update(metadata={"chat_templates": {"default": CHAT_TEMPLATE}, "chat": {}})
    registry.changed()
    alice = site.client(site.cast.alice)
    response = generate(alice, [HELLO])
    assert (response.status_code, response.json()["code"]) == (400, "capability_not_supported")
    assert "send a prompt" in response.json()["message"]
    assert alice.generate().status_code == 200


def test_properties_show_the_template_in_use(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert alice.get("/props").json()["chat_template"] == CHAT_TEMPLATE
    row = ServedModel.objects.get(name=MODEL)
    row.chat_template = "{% for m in messages %}({{ m.content }}){% endfor %}"
    row.chat_facts = model_rows.check_template(row.chat_template)
    row.save()
    registry.changed()
    assert alice.get("/props").json()["chat_template"] == row.chat_template
    assert apply(alice, [HELLO, ANSWER], add_generation_prompt=False).json()["prompt"] == "(Hello there)(General)"
    system = {"role": "system", "content": "Be kind."}
    assert apply(alice, [system, HELLO]).json()["prompt"] == "(Be kind.)(Hello there)"
