"""The official openai client against a site with a fake model: which exception each refusal is, and what it retries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.conftest import make_customer
from tests.in_process import MODEL, N_CTX, OTHER_MODEL, FakeSpeed, InProcessSite, read_events, wait_until
from tests.openai_calls import HELLO, async_sdk, chat, chunks, complete, respond, sdk

pytestmark = pytest.mark.api
ASK: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "temperature": 0}


@pytest.fixture
def alice(site: InProcessSite) -> Iterator[openai.OpenAI]:
    with sdk(site.base_url, site.cast.alice.text) as client:
        yield client


def test_the_client_reads_answers_and_their_request_id(alice: openai.OpenAI) -> None:
    raw = alice.chat.completions.with_raw_response.create(**ASK)
    completion = raw.parse()
    assert completion._request_id == raw.headers["x-request-id"]
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    text = alice.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=4, n=2)
    assert [choice.index for choice in text.choices] == [0, 1, 2, 3]


def test_the_client_reads_streams(alice: openai.OpenAI) -> None:
    whole = alice.chat.completions.create(**ASK)
    found = list(alice.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in found for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert found[-1].usage == whole.usage
    texts = alice.completions.create(model=MODEL, prompt="one", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts)


def test_answers_have_every_field_that_the_clients_forms_demand(site: InProcessSite) -> None:
    """The client itself looks at nothing; whoever validates with its forms, or reads a field that lacks, does."""
    alice = site.client(site.cast.alice)
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    asked: list[dict[str, Any]] = [{}, {"logprobs": True, "top_logprobs": 2}, {"tools": tools}, {"n": 2}]
    for fields in asked:
        ChatCompletion.model_validate(chat(alice, **fields).json())
        for each in chunks(alice, "/v1/chat/completions", **fields, stream_options={"include_usage": True}):
            ChatCompletionChunk.model_validate(each)
    Completion.model_validate(complete(alice, logprobs=1).json())
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    function = {"type": "function", **tools[0]["function"]}
    event = TypeAdapter[Any](ResponseStreamEvent)
    for more in ({}, {"include": ["message.output_text.logprobs"]}, {"tools": [function], "text": text}):
        Response.model_validate(respond(alice, **more).json())
        with alice.stream(
            "POST", "/v1/responses", json={"input": "Hello", "max_output_tokens": 8, "stream": True, **more}
        ) as answer:
            for _, data in read_events(answer):
                event.validate_python(data)


async def test_the_asynchronous_client_does_the_same(site: InProcessSite) -> None:
    async with async_sdk(site.base_url, site.cast.alice.text) as client:
        whole = await client.chat.completions.create(**ASK)
        stream = await client.chat.completions.create(**ASK, stream=True)
        pieces = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        text = await client.completions.create(model=MODEL, prompt="one two", max_tokens=4)
        assert text.choices[0].text
        models = [model.id async for model in await client.models.list()]
        assert MODEL in models
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("nothing")


def test_models_are_listed_and_retrieved(site: InProcessSite, alice: openai.OpenAI) -> None:
    assert {model.id for model in alice.models.list()} == {MODEL, OTHER_MODEL}
    found = alice.models.retrieve(MODEL)
    assert (found.object, found.owned_by) == ("model", "llmsite")
    with sdk(site.base_url, site.cast.charlie.text) as charlie:
        assert [model.id for model in charlie.models.list()] == [MODEL]
        with pytest.raises(openai.NotFoundError) as caught:
            charlie.models.retrieve(OTHER_MODEL)
    assert caught.value.code == "model_not_found"


def test_a_key_that_is_not_known_is_an_authentication_error(site: InProcessSite) -> None:
    with sdk(site.base_url, "sk-unknown") as client:
        for call in (lambda: client.chat.completions.create(**ASK), lambda: client.models.list()):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.code == "invalid_api_key"
            assert caught.value.request_id


def test_a_key_that_may_not_is_a_permission_error(site: InProcessSite) -> None:
    with sdk(site.base_url, site.cast.operator.text) as client, pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(**ASK)


def test_bad_requests_carry_param_and_code(alice: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        alice.chat.completions.create(**{**ASK, "temperature": 7})
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as caught:
        alice.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": "word " * N_CTX}]})
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
    with pytest.raises(openai.BadRequestError) as caught:
        alice.completions.create(model=MODEL, prompt="x", echo=True)
    assert caught.value.param == "echo"
    with pytest.raises(openai.NotFoundError) as missing:
        alice.chat.completions.create(**{**ASK, "model": "nothing"})
    assert missing.value.param == "model"


def test_an_exhausted_quota_is_asked_for_once(site: InProcessSite, plan: Any) -> None:
    poor = make_customer("Poor", plan, monthly_tokens=3, requests_per_minute=100)
    with sdk(site.base_url, poor.text, max_retries=3) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**ASK)
        assert (caught.value.code, caught.value.type) == ("insufficient_quota", "insufficient_quota")
        remaining = caught.value.response.headers["x-ratelimit-remaining-requests"]
        assert remaining == "99", "the client has not tried it again"


def test_a_rate_limit_says_when(site: InProcessSite, plan: Any) -> None:
    hasty = make_customer("Hasty", plan, requests_per_minute=1)
    with sdk(site.base_url, hasty.text) as client, pytest.raises(openai.RateLimitError) as caught:
        for _ in range(3):  # the minute may turn once
            client.chat.completions.create(**ASK)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_an_error_in_the_middle_of_a_stream_is_raised(
    site: InProcessSite, fake_speed: FakeSpeed, alice: openai.OpenAI
) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    stream = alice.chat.completions.create(**{**ASK, "max_tokens": 200}, stream=True)
    found = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in stream:
            found.append(chunk)
            if len(found) == 4:
                site.stop_worker()
    assert len(found) >= 4
    assert caught.value.message


def test_a_closed_stream_cancels_its_request(site: InProcessSite, fake_speed: FakeSpeed, alice: openai.OpenAI) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    stream = alice.chat.completions.create(**{**ASK, "max_tokens": 200}, stream=True, n=2)
    next(stream)
    stream.close()
    wait_until(lambda: site.num_running() == 0)
