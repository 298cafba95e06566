"""The official anthropic client against a running site with the real model: counts, streams, forms, tools, Unicode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest

from tests.anthropic_calls import async_sdk, events, message, sdk
from tests.real.conftest import LlamaSite

pytestmark = [pytest.mark.model, pytest.mark.integration, pytest.mark.slow, pytest.mark.xdist_group("llama_site")]

MODEL = "smollm2-135m"
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"temperature": 0}
ASK: dict[str, Any] = {"model": MODEL, "messages": CAPITAL, "max_tokens": 24}
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TORTURE = "👩‍👩‍👧‍👦 مرحبا ｆｕｌｌ 𝔘𝔫𝔦 éé 中文字符 \U0001f1eb\U0001f1f7 नमस्ते"


class Answer(pydantic.BaseModel):
    city: str
    is_large: bool


@pytest.fixture(scope="module")
def client(llama_site: LlamaSite) -> Iterator[anthropic.Anthropic]:
    with sdk(llama_site.site.base_url, llama_site.site.key) as found:
        yield found


def texts_of(message: Any) -> list[str]:
    return [block.text for block in message.content]


def test_usage_is_exact_and_what_is_held_is_counted_apart(client: anthropic.Anthropic, llama_site: LlamaSite) -> None:
    turns: list[Any] = [{"role": "user", "content": "A text that nobody has sent to this dialect before, " * 4}]
    counted = client.messages.count_tokens(model=MODEL, messages=turns, system="Be brief.").input_tokens
    first, again = (
        client.messages.create(model=MODEL, messages=turns, system="Be brief.", max_tokens=5).usage for _ in range(2)
    )
    assert first.input_tokens + (first.cache_read_input_tokens or 0) == counted
    assert (again.input_tokens, again.cache_read_input_tokens) == (1, counted - 1)
    assert first.output_tokens == again.output_tokens == 5
    native = llama_site.alice.post(
        "/v1/generate",
        json={"messages": [{"role": "system", "content": "Be brief."}, *turns], "max_new_tokens": 5, "cache": False},
    )
    assert native.headers["x-usage-prompt-tokens"] == str(counted)


@pytest.mark.parametrize("extra", [GREEDY, {"temperature": 1.0, "seed": 4}])
def test_streams_are_the_whole_answer_token_for_token(client: anthropic.Anthropic, extra: dict[str, Any]) -> None:
    client.messages.create(**ASK, extra_body=extra)  # from now on the prompt is held
    whole = client.messages.create(**ASK, extra_body=extra)
    with client.messages.stream(**ASK, extra_body=extra) as stream:
        final = stream.get_final_message()
    assert texts_of(final) == texts_of(whole) != []
    assert (final.usage, final.stop_reason) == (whole.usage, whole.stop_reason)


async def test_the_asynchronous_client_gets_the_same(client: anthropic.Anthropic, llama_site: LlamaSite) -> None:
    whole = client.messages.create(**ASK, extra_body=GREEDY)
    async with async_sdk(llama_site.site.base_url, llama_site.site.key) as other:
        mine = await other.messages.create(**ASK, extra_body=GREEDY)
        async with other.messages.stream(**ASK, extra_body=GREEDY) as stream:
            final = await stream.get_final_message()
    assert texts_of(mine) == texts_of(final) == texts_of(whole)


def test_an_answer_that_was_begun_goes_on(client: anthropic.Anthropic) -> None:
    turns: list[Any] = [*CAPITAL, {"role": "assistant", "content": "The capital of France is"}]
    block = client.messages.create(**{**ASK, "messages": turns}, extra_body=GREEDY).content[0]
    assert block.type == "text"
    assert block.text.startswith(" Paris")


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    (plain,) = texts_of(client.messages.create(**ASK, extra_body=GREEDY))
    word = plain.split()[3]
    found = client.messages.create(**ASK, stop_sequences=["never said", word], extra_body=GREEDY)
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", word)
    assert texts_of(found) == [plain[: plain.index(word)]]


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}]
)
def test_a_call_that_must_be_made_is_made_and_answered(client: anthropic.Anthropic, choice: Any) -> None:
    turns: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]
    ask: dict[str, Any] = {"model": MODEL, "messages": turns, "tools": [WEATHER], "max_tokens": 120}
    found = client.messages.create(**ask, tool_choice=choice, extra_body=GREEDY)
    call = found.content[-1]
    assert found.stop_reason == "tool_use"
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert call.input["city"] in {"Paris", "Rome"}
    with client.messages.stream(**ask, tool_choice=choice, extra_body=GREEDY) as stream:
        kinds = [event.delta.type for event in stream if event.type == "content_block_delta"]
        final = stream.get_final_message()
    assert "input_json_delta" in kinds
    streamed = final.content[-1]
    assert streamed.type == "tool_use"
    assert (streamed.name, streamed.input, len(final.content)) == (call.name, call.input, len(found.content))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 21 degrees"}
    back: list[Any] = [*turns, {"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    more = client.messages.create(**{**ask, "messages": back, "max_tokens": 24}, extra_body=GREEDY)
    assert more.usage.input_tokens + (more.usage.cache_read_input_tokens or 0) > found.usage.input_tokens


def test_answers_follow_their_form(client: anthropic.Anthropic) -> None:
    turns: list[Any] = [{"role": "user", "content": "Is Paris a large city? Answer in JSON."}]
    parsed = client.messages.parse(model=MODEL, messages=turns, max_tokens=100, output_format=Answer, extra_body=GREEDY)
    assert isinstance(parsed.parsed_output, Answer)


def test_no_character_is_ever_split(llama_site: LlamaSite) -> None:
    """The model is made to write characters of several tokens each."""
    fields = {"grammar": f'root ::= "{TORTURE}"', "max_tokens": 300, "model": MODEL}
    whole = message(llama_site.alice, CAPITAL, **fields).json()
    assert whole["content"] == [{"type": "text", "text": TORTURE}]
    deltas = [
        each["delta"]["text"]
        for each in events(llama_site.alice, CAPITAL, **fields)
        if each["type"].endswith("block_delta")
    ]
    assert "".join(deltas) == TORTURE
    assert not any("\ufffd" in delta for delta in deltas)


def test_thoughts_are_told_apart(llama_site: LlamaSite) -> None:
    fields = {"grammar": r'root ::= "<think>\nFrance.\n</think>\n\nParis."', "max_tokens": 60, "model": MODEL}
    whole = message(llama_site.alice, CAPITAL, **fields).json()
    thought, text = whole["content"]
    assert (thought["type"], thought["thinking"], text["text"]) == ("thinking", "France.", "Paris.")
    kinds = [
        each["delta"]["type"]
        for each in events(llama_site.alice, CAPITAL, **fields)
        if "index" in each and "delta" in each
    ]
    assert list(dict.fromkeys(kinds)) == ["thinking_delta", "signature_delta", "text_delta"]


def test_an_adapter_is_named_by_the_model(client: anthropic.Anthropic) -> None:
    adapted = next(model.id for model in client.models.list() if model.id.startswith(f"{MODEL}:"))
    assert client.models.retrieve(adapted).id == adapted
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "Look in thy glass"}], "max_tokens": 24}
    plain = client.messages.create(model=MODEL, **ask, extra_body=GREEDY)
    styled = client.messages.create(model=adapted, **ask, extra_body=GREEDY)
    assert styled.model == adapted
    assert styled.content != plain.content
