"""The official anthropic client against a site with a fake model: every method, sync and async, streaming and not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import anthropic
import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter

from tests.anthropic_calls import HELLO, async_sdk, events, message, sdk
from tests.conftest import make_customer
from tests.in_process import MODEL, OTHER_MODEL, FakeSpeed, InProcessSite, wait_until

pytestmark = pytest.mark.api
ASK: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "extra_body": {"temperature": 0}}


@pytest.fixture
def alice(site: InProcessSite) -> Iterator[anthropic.Anthropic]:
    with sdk(site.base_url, site.cast.alice.text) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_the_client_reads_answers_and_their_request_id(alice: anthropic.Anthropic) -> None:
    raw = alice.messages.with_raw_response.create(**ASK)
    message = raw.parse()
    assert message._request_id == raw.headers["request-id"]
    assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "max_tokens")
    assert text_of(message)
    assert message.usage.output_tokens == 8


def test_the_client_reads_streams(alice: anthropic.Anthropic) -> None:
    whole = alice.messages.create(**ASK)
    found = list(alice.messages.create(**ASK, stream=True))
    deltas = [each.delta for each in found if each.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == text_of(whole)
    with alice.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(final) == text_of(whole)
    assert (final.usage, final.stop_reason) == (whole.usage, whole.stop_reason)
    assert stream.request_id == final.id.removeprefix("msg_")


def test_answers_have_every_field_that_the_clients_forms_demand(site: InProcessSite) -> None:
    """The client itself looks at nothing; whoever validates with its forms, or reads a field that lacks, does."""
    alice = site.client(site.cast.alice)
    thinking = {"model": site.serve_thinker(), "thinking": {"type": "adaptive"}}
    event = TypeAdapter[Any](RawMessageStreamEvent)
    for fields in cast(list[dict[str, Any]], [{}, thinking]):
        Message.model_validate(message(alice, **fields).json())
        for each in events(alice, **fields):
            if each["type"] != "ping":
                event.validate_python(each)
    for model in alice.get("/v1/models").json()["data"]:
        ModelInfo.model_validate(model)


async def test_the_asynchronous_client_does_the_same(site: InProcessSite) -> None:
    async with async_sdk(site.base_url, site.cast.alice.text) as client:
        whole = await client.messages.create(**ASK)
        events = [event async for event in await client.messages.create(**ASK, stream=True)]
        assert [event.type for event in events][-1] == "message_stop"
        async with client.messages.stream(**ASK) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == text_of(final) == text_of(whole)
        assert final.usage == whole.usage
        counted = await client.messages.count_tokens(model=MODEL, messages=HELLO)
        assert counted.input_tokens == whole.usage.input_tokens
        assert MODEL in [model.id async for model in client.models.list()]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**ASK, "model": "nothing"})


def test_tokens_are_counted(alice: anthropic.Anthropic) -> None:
    counted = alice.messages.count_tokens(model=MODEL, messages=HELLO, system="Be brief")
    message = alice.messages.create(**ASK, system="Be brief")
    assert counted.input_tokens == message.usage.input_tokens


def test_models_are_listed_and_retrieved(site: InProcessSite, alice: anthropic.Anthropic) -> None:
    found = list(alice.models.list(limit=1))
    assert {model.id for model in found} == {MODEL, OTHER_MODEL}
    assert {(model.type, model.lifecycle) for model in found} == {("model", "active")}
    assert found[0].created_at.tzinfo is not None
    assert alice.models.retrieve(MODEL).display_name == MODEL
    with sdk(site.base_url, site.cast.charlie.text) as charlie:
        assert [model.id for model in charlie.models.list()] == [MODEL]
        with pytest.raises(anthropic.NotFoundError):
            charlie.models.retrieve(OTHER_MODEL)


def test_a_bearer_token_is_a_key_too(site: InProcessSite) -> None:
    with anthropic.Anthropic(base_url=site.base_url, auth_token=site.cast.alice.text, max_retries=0) as client:
        assert text_of(client.messages.create(**ASK))


def test_errors_are_of_their_class_with_type_and_code(site: InProcessSite, alice: anthropic.Anthropic) -> None:
    with sdk(site.base_url, "sk-ant-unknown") as nobody, pytest.raises(anthropic.AuthenticationError) as unknown:
        nobody.messages.create(**ASK)
    assert (unknown.value.type, unknown.value.error_code) == ("authentication_error", "invalid_api_key")
    assert unknown.value.request_id
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]
    with pytest.raises(anthropic.BadRequestError) as bad:
        alice.messages.create(**{**ASK, "messages": image})
    assert bad.value.type == "invalid_request_error"
    assert (bad.value.api_message or "").startswith("messages.0.content.0: ")
    with pytest.raises(anthropic.NotFoundError) as batches:
        alice.messages.batches.list()
    assert batches.value.type == "not_found_error"


def test_an_exhausted_quota_is_asked_for_once(site: InProcessSite, plan: Any) -> None:
    poor = make_customer("Poor", plan, monthly_tokens=3, requests_per_minute=100)
    with sdk(site.base_url, poor.text, max_retries=3) as client:
        with pytest.raises(anthropic.PaymentRequiredError) as caught:
            client.messages.create(**ASK)
        assert caught.value.type == "billing_error"
        remaining = caught.value.response.headers["anthropic-ratelimit-requests-remaining"]
        assert remaining == "99", "the client has not tried it again"


def test_an_error_in_the_middle_of_a_stream_is_raised(
    site: InProcessSite, fake_speed: FakeSpeed, alice: anthropic.Anthropic
) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    stream = alice.messages.create(**{**ASK, "max_tokens": 200}, stream=True)
    found = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        for event in stream:
            found.append(event)
            if len(found) == 5:
                site.stop_worker()
    assert len(found) >= 5
    assert caught.value.type == "api_error"
    assert caught.value.error_code


def test_a_closed_stream_cancels_its_request(
    site: InProcessSite, fake_speed: FakeSpeed, alice: anthropic.Anthropic
) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    with alice.messages.stream(**{**ASK, "max_tokens": 200}) as stream:
        next(iter(stream))
    wait_until(lambda: site.num_running() == 0)
