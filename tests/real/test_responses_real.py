"""OpenAI's responses by the official client, against a running site with the real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.in_process import wait_until
from tests.openai_calls import async_sdk, chat, sdk
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

MODEL = "smollm2-135m"
ASK: dict[str, Any] = {
    "model": MODEL,
    "input": "What is the capital of France?",
    "max_output_tokens": 24,
    "temperature": 0,
}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Answer(pydantic.BaseModel):
    city: str
    is_large: bool


@pytest.fixture(scope="module")
def client(llama_site: LlamaSite) -> Iterator[openai.OpenAI]:
    """Alice's, whose responses are stored while these tests run."""
    set_days(llama_site, 30)
    with sdk(llama_site.site.base_url, llama_site.site.key) as found:
        wait_until(lambda: found.responses.create(**{**ASK, "max_output_tokens": 1}).model_dump()["store"], 20.0)
        yield found
    set_days(llama_site, None)


def set_days(site: LlamaSite, days: int | None) -> None:
    name = site.alice.get("/v1/me").json()["tenant"]["name"]
    tenants = site.operator.get("/v1/admin/tenants", params={"page_size": 100}).json()["results"]
    number = next(tenant["id"] for tenant in tenants if tenant["name"] == name)
    answer = site.operator.patch(f"/v1/admin/tenants/{number}", json={"response_days": days})
    assert answer.json()["response_days"] == days, answer.text


def test_a_response_is_a_chat_completion(client: openai.OpenAI, llama_site: LlamaSite) -> None:
    response = client.responses.create(**ASK)
    messages = [{"role": "user", "content": ASK["input"]}]
    chatted = chat(llama_site.alice, messages, model=MODEL, max_tokens=24).json()
    assert response.output_text == chatted["choices"][0]["message"]["content"]
    assert response.usage is not None
    assert response.usage.input_tokens == chatted["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chatted["usage"]["completion_tokens"]
    again = client.responses.create(**ASK)
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens == again.usage.input_tokens - 1
    assert client.responses.input_tokens.count(model=MODEL, input=ASK["input"]).input_tokens == again.usage.input_tokens


def test_a_stream_is_the_whole_response(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK, store=False)
    events = list(client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[1].type) == ("response.created", "response.in_progress")
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    word = whole.output_text.split()[3]
    with client.responses.stream(**ASK, extra_body={"stop": [word]}) as stream:
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == whole.output_text.partition(word)[0]
    assert client.responses.retrieve(final.id).output_text == final.output_text


def test_three_turns_are_the_conversation_sent_whole(client: openai.OpenAI) -> None:
    items: list[Any] = []
    previous: str | None = None
    for text in ("What is the capital of France?", "And of Italy?", "Which one is larger?"):
        items.append({"role": "user", "content": text})
        ask: dict[str, Any] = {**ASK, "max_output_tokens": 12}
        whole = client.responses.create(**{**ask, "input": items}, store=False)
        response = client.responses.create(**{**ask, "input": text}, previous_response_id=previous)
        assert response.output_text == whole.output_text
        assert response.usage is not None
        assert whole.usage is not None
        assert response.usage.input_tokens == whole.usage.input_tokens
        items += [item.model_dump() for item in response.output]
        previous = response.id
    listed = list(client.responses.input_items.list(previous or "", order="asc", limit=2))
    assert len(listed) == 5, "the client turns the pages"
    client.responses.delete(previous or "")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(previous or "")


def test_nobody_else_sees_it(client: openai.OpenAI, llama_site: LlamaSite) -> None:
    found = client.responses.create(**ASK)
    assert client.responses.cancel(found.id).id == found.id, "what has ended stays as it is"
    with sdk(llama_site.site.base_url, llama_site.site.other_key) as bob:
        for call in (
            bob.responses.retrieve,
            bob.responses.delete,
            bob.responses.cancel,
            bob.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                call(found.id)
        with pytest.raises(openai.BadRequestError):
            bob.responses.create(**ASK, previous_response_id=found.id)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_that_must_be_made_is_valid(client: openai.OpenAI, choice: Any) -> None:
    ask: dict[str, Any] = {
        **ASK,
        "input": "What is the weather in Rome?",
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 100,
    }
    response = client.responses.create(**ask)
    (call,) = response.output
    assert call.type == "function_call"
    assert response.status == "completed"
    arguments = json.loads(call.arguments)
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in {"Paris", "Rome"}
    with client.responses.stream(**ask) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 21 degrees"}
    more = client.responses.create(**{**ASK, "input": [output]}, tools=[WEATHER], previous_response_id=response.id)
    whole: Any = [{"role": "user", "content": ask["input"]}, call.model_dump(), output]
    again = client.responses.create(**{**ASK, "input": whole}, tools=[WEATHER])
    assert more.usage is not None
    assert again.usage is not None
    assert more.usage.input_tokens == again.usage.input_tokens
    assert more.output_text == again.output_text


def test_answers_follow_their_form(client: openai.OpenAI) -> None:
    ask = {**ASK, "input": "Is Paris a large city? Answer in JSON.", "max_output_tokens": 100}
    parsed = client.responses.parse(**ask, text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)
    loose = client.responses.create(**ask, text={"format": {"type": "json_object"}})
    assert loose.output_text.lstrip().startswith("{")


def test_thoughts_are_items_and_are_taken_back(client: openai.OpenAI) -> None:
    grammar = {"grammar": r'root ::= "<think>\nFrance.\n</think>\n\nParis."'}
    ask: dict[str, Any] = {**ASK, "max_output_tokens": 60, "extra_body": grammar}
    response = client.responses.create(**ask)
    thought, message = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text == "France."
    assert (message.type, response.output_text) == ("message", "Paris.")
    assert response.usage is not None
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    with client.responses.stream(**ask) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "message"]
    assert final.output_text == "Paris."
    more = client.responses.create(**{**ASK, "input": "Why?"}, previous_response_id=response.id)
    assert more.output_text


async def test_the_asynchronous_client_does_the_same(client: openai.OpenAI, llama_site: LlamaSite) -> None:
    whole = client.responses.create(**ASK)
    async with async_sdk(llama_site.site.base_url, llama_site.site.key) as found:
        response = await found.responses.create(**ASK)
        assert response.output_text == whole.output_text
        stream = await found.responses.create(**ASK, stream=True)
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        assert "".join(texts) == whole.output_text
        word = whole.output_text.split()[3]
        async with found.responses.stream(**ASK, extra_body={"stop": [word]}) as events:
            final = await events.get_final_response()
        assert final.output_text == whole.output_text.partition(word)[0]
        assert (await found.responses.retrieve(response.id)).output_text == whole.output_text
        items = [item async for item in await found.responses.input_items.list(response.id)]
        assert [item.type for item in items] == ["message"]
        counted = await found.responses.input_tokens.count(model=MODEL, input=ASK["input"])
        assert response.usage is not None
        assert counted.input_tokens == response.usage.input_tokens
        assert (await found.responses.cancel(response.id)).status == response.status
        await found.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await found.responses.delete(response.id)
