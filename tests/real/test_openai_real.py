"""The official openai client against a running site with the real model: counts, streams, forms, tools, Unicode."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.openai_calls import async_sdk, chat, chunks, sdk, text_of
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

MODEL = "smollm2-135m"
SEA = "The sea was calm, and"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
ASK: dict[str, Any] = {"model": MODEL, "messages": CAPITAL, "max_tokens": 24, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Answer(pydantic.BaseModel):
    city: str
    is_large: bool


@pytest.fixture(scope="module")
def client(llama_site: LlamaSite) -> Iterator[openai.OpenAI]:
    with sdk(llama_site.site.base_url, llama_site.site.key) as found:
        yield found


def test_usage_is_exact_and_what_is_held_is_counted(client: openai.OpenAI, llama_site: LlamaSite) -> None:
    prompt = "A text that nobody has sent before to this site, of some length, so that it may be held: " * 2
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5)
    again = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5)
    assert first.usage is not None
    assert again.usage is not None
    num_prompt = llama_site.count(prompt)
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (num_prompt, 5)
    assert first.usage.total_tokens == num_prompt + 5
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == num_prompt - 1


def test_a_chat_is_what_its_template_makes_of_it(client: openai.OpenAI, llama_site: LlamaSite) -> None:
    completion = client.chat.completions.create(**ASK)
    assert completion.choices[0].message.content
    native = llama_site.alice.post(
        "/v1/generate", json={"messages": CAPITAL, "max_new_tokens": 24, "temperature": 0, "cache": False}
    )
    assert completion.choices[0].message.content == native.json()["output"]
    assert completion.usage is not None
    assert str(completion.usage.prompt_tokens) == native.headers["x-usage-prompt-tokens"]


def test_an_answer_that_was_begun_goes_on(client: openai.OpenAI) -> None:
    messages: Any = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    text = client.chat.completions.create(**{**ASK, "messages": messages}).choices[0].message.content or ""
    assert text.startswith(" Paris")


@pytest.mark.parametrize("number", [1, 3])
def test_a_stream_has_the_usage_of_the_whole_answer(client: openai.OpenAI, llama_site: LlamaSite, number: int) -> None:
    """All of it, tokens that were held included, once the prompt is held."""
    ask = {**ASK, "n": number, "seed": 6, "temperature": 1.0}
    client.chat.completions.create(**ask)
    whole = client.chat.completions.create(**ask).usage
    found = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert whole is not None
    assert whole.prompt_tokens_details is not None
    assert whole.prompt_tokens_details.cached_tokens == whole.prompt_tokens - 1
    assert found[-1].usage == whole


@pytest.mark.parametrize("number", [1, 3])
def test_streams_are_the_whole_answer_token_for_token(client: openai.OpenAI, number: int) -> None:
    ask = {**ASK, "n": number, "seed": 4, "temperature": 1.0, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**ask)
    found = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [each for chunk in found for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert choice.logprobs is not None
        tokens = [token.token for each in mine if each.logprobs for token in each.logprobs.content or ()]
        assert tokens == [token.token for token in choice.logprobs.content or ()]
        assert mine[-1].finish_reason == choice.finish_reason
    texts = {choice.message.content for choice in whole.choices}
    assert len(texts) == number


def test_probabilities_are_of_the_tokens_that_came(client: openai.OpenAI) -> None:
    ask = {**ASK, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**ask).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert len(content) == 6
    assert "".join(each.token for each in content) == choice.message.content
    for each in content:
        assert bytes(each.bytes or ()).decode() == each.token
        assert each.top_logprobs[0].token == each.token, "at temperature 0 the most probable one comes"
        assert 0 < sum(math.exp(top.logprob) for top in each.top_logprobs) <= 1.0001
    text = client.completions.create(model=MODEL, prompt=SEA, max_tokens=6, temperature=0, logprobs=2).choices[0]
    assert text.logprobs is not None
    offsets, tokens = text.logprobs.text_offset or [], text.logprobs.tokens or []
    assert [text.text[start : start + len(token)] for start, token in zip(offsets, tokens, strict=True)] == tokens
    assert all(len(top) == 2 for top in text.logprobs.top_logprobs or ())


def test_biases_and_stops_and_seeds_hold(client: openai.OpenAI, llama_site: LlamaSite) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": SEA, "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(**ask).choices[0].text
    first = client.completions.create(**{**ask, "max_tokens": 1}).choices[0].text
    token = llama_site.alice.post("/tokenize", json={"content": first}).json()["tokens"][0]
    assert not client.completions.create(**ask, logit_bias={str(token): -100}).choices[0].text.startswith(first)
    word = plain.split()[3]
    stopped = client.completions.create(**ask, stop=[word]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (plain[: plain.index(word)], "stop")
    hot = {**ask, "temperature": 1.5, "seed": 2**40 + 9}
    assert client.completions.create(**hot).choices[0].text == client.completions.create(**hot).choices[0].text


def test_answers_follow_their_form(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Is Paris a large city? Answer in JSON."}]
    ask: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 100}
    parsed = client.chat.completions.parse(**ask, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    loose = client.chat.completions.create(
        **ask,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": Answer.model_json_schema()}},
    )
    Answer.model_validate_json(loose.choices[0].message.content or "")
    any_object = client.chat.completions.create(**ask, response_format={"type": "json_object"})
    assert (any_object.choices[0].message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    ask: dict[str, Any] = {
        "model": MODEL,
        "messages": messages,
        "tools": [WEATHER],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 100,
    }
    answer = client.chat.completions.create(**ask).choices[0]
    (call,) = answer.message.tool_calls or ()
    assert answer.finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in {"Paris", "Rome"}
    with client.chat.completions.stream(**ask) as stream:
        final = stream.get_final_completion().choices[0]
    (streamed,) = final.message.tool_calls or ()
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert final.finish_reason == "tool_calls"
    back: Any = [
        *messages,
        answer.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees"},
    ]
    more = client.chat.completions.create(model=MODEL, messages=back, tools=[WEATHER], max_tokens=24)  # type: ignore[list-item]
    assert more.usage is not None
    assert more.usage.prompt_tokens > 0


TORTURE = "👩‍👩‍👧‍👦 مرحبا ｆｕｌｌ 𝔘𝔫𝔦 éé 中文字符 \U0001f1eb\U0001f1f7 नमस्ते"


def test_no_character_is_ever_split(llama_site: LlamaSite) -> None:
    """The model is made to write characters of several tokens each."""
    grammar = f'root ::= "{TORTURE}"'
    fields = {"grammar": grammar, "max_tokens": 300, "model": MODEL}
    whole = chat(llama_site.alice, CAPITAL, **fields).json()["choices"][0]
    assert whole["message"]["content"] == TORTURE
    for path in ("/v1/chat/completions", "/v1/completions"):
        more = {"messages": CAPITAL} if "chat" in path else {"prompt": SEA}
        found = chunks(llama_site.alice, path, logprobs=True if "chat" in path else 1, **more, **fields)
        assert text_of(found) == TORTURE
        assert "\ufffd" not in "".join(text_of([each]) for each in found)
    spelled = chat(llama_site.alice, CAPITAL, logprobs=True, **fields).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in spelled).decode() == TORTURE
    assert any(each["token"].startswith("bytes:") for each in spelled)


def test_thoughts_are_told_apart(llama_site: LlamaSite) -> None:
    grammar = r'root ::= "<think>\nFrance.\n</think>\n\nParis."'
    fields = {"grammar": grammar, "max_tokens": 60, "model": MODEL}
    message = chat(llama_site.alice, CAPITAL, **fields).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("France.", "Paris.")
    found = chunks(llama_site.alice, "/v1/chat/completions", messages=CAPITAL, **fields)
    assert (text_of(found, name="reasoning_content"), text_of(found)) == ("France.", "Paris.")


def test_an_adapter_is_named_by_the_model(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    adapted = next(name for name in names if name.startswith(f"{MODEL}:"))
    assert client.models.retrieve(adapted).id == adapted
    ask: dict[str, Any] = {"prompt": "Look in thy glass", "max_tokens": 24, "temperature": 0}
    plain = client.completions.create(model=MODEL, **ask)
    styled = client.completions.create(model=adapted, **ask)
    assert styled.model == adapted
    assert styled.choices[0].text != plain.choices[0].text
    named = client.completions.create(
        model=MODEL, **ask, extra_body={"adapters": [{"name": adapted.partition(":")[2]}]}
    )
    assert named.choices[0].text == styled.choices[0].text


async def test_many_at_once_by_the_asynchronous_client(llama_site: LlamaSite) -> None:
    async with async_sdk(llama_site.site.base_url, llama_site.site.key) as client:
        alone = await client.chat.completions.create(**ASK)

        async def streamed() -> str:
            stream = await client.chat.completions.create(**ASK, stream=True)
            return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

        texts = await asyncio.gather(*(streamed() for _ in range(4)))
    assert set(texts) == {alone.choices[0].message.content}


async def test_the_asynchronous_client_has_every_method(llama_site: LlamaSite) -> None:
    """What the other client is asked for above: texts, streams, forms, calls."""
    question: Any = [{"role": "user", "content": "Is Paris a large city? Answer in JSON."}]
    async with async_sdk(llama_site.site.base_url, llama_site.site.key) as client:
        ask: dict[str, Any] = {"model": MODEL, "prompt": SEA, "max_tokens": 12, "temperature": 0}
        whole = await client.completions.create(**ask)
        stream = await client.completions.create(**ask, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == whole.choices[0].text
        parsed = await client.chat.completions.parse(
            model=MODEL, messages=question, temperature=0, max_tokens=100, response_format=Answer
        )
        assert isinstance(parsed.choices[0].message.parsed, Answer)
        forced: dict[str, Any] = {**ASK, "max_tokens": 100, "tools": [WEATHER], "tool_choice": "required"}
        calls = (await client.chat.completions.create(**forced)).choices[0].message.tool_calls or []
        async with client.chat.completions.stream(**forced) as events:
            final = await events.get_final_completion()
        streamed = final.choices[0].message.tool_calls or []
        arguments = [each.function.arguments for each in calls if each.type == "function"]
        assert [each.function.arguments for each in streamed] == arguments != []
