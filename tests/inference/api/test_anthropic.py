"""Anthropic's dialect on a whole site with a fake model: shapes, streams, usage, bounds, errors and their headers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from inference.intake import forms
from inference.models import Receipt
from tests.anthropic_calls import HELLO, error_of, events, message
from tests.conftest import make_customer
from tests.in_process import MODEL, N_CTX, OTHER_MODEL, FakeSpeed, InProcessSite, wait_until

pytestmark = pytest.mark.api
NUM_PROMPT = 6
"""Tokens of HELLO in the fake model's template."""
TOOL = {"name": "look_up", "input_schema": {"type": "object"}}


# Whole answers


def test_a_message_has_anthropics_shape(site: InProcessSite) -> None:
    response = message(site.client(site.cast.alice), model="default-chat")
    body = response.json()
    assert response.status_code == 200, body
    assert body["id"] == f"msg_{response.headers['request-id']}"
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "default-chat"), (
        "as it was asked for"
    )
    (block,) = body["content"]
    assert set(block) == {"type", "text"}
    assert block["text"]
    assert (body["stop_reason"], body["stop_sequence"]) == ("max_tokens", None)
    assert body["usage"] == {
        "input_tokens": NUM_PROMPT,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 8,
    }
    site.settle()
    assert Receipt.objects.get().route == "/v1/messages"
    assert site.charged(site.cast.alice) == (NUM_PROMPT + 8, 0)


def test_what_was_held_is_counted_apart(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    turns = [{"role": "user", "content": "word " * 100}]
    first, again = (message(alice, turns).json()["usage"] for _ in range(2))
    assert again["cache_read_input_tokens"] > 50
    assert again["input_tokens"] + again["cache_read_input_tokens"] == first["input_tokens"] == NUM_PROMPT + 98
    found = events(alice, turns)
    assert found[0]["message"]["usage"] == again | {"output_tokens": 0}
    assert found[-2]["usage"] == again


def test_an_answer_ends_at_a_stop_sequence_or_by_itself(site: InProcessSite, fake_speed: FakeSpeed) -> None:
    alice = site.client(site.cast.alice)
    word = message(alice).json()["content"][0]["text"].split()[3]
    stopped = message(alice, stop_sequences=["never", word]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", word)
    assert word not in stopped["content"][0]["text"]
    last = events(alice, stop_sequences=[word])[-2]
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": word}
    fake_speed.answer_tokens = 3
    site.stop_worker()
    site.start_worker()
    ended = message(alice).json()
    assert (ended["stop_reason"], ended["usage"]["output_tokens"]) == ("end_turn", 4), "the end is a token"


def test_a_prompt_alone_can_be_computed(site: InProcessSite) -> None:
    body = message(site.client(site.cast.alice), max_tokens=0).json()
    assert (body["content"], body["stop_reason"], body["usage"]["output_tokens"]) == ([], "max_tokens", 0)


def test_the_system_prompt_is_a_text_or_blocks(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    blocks = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief"}]
    counts = [count(alice, system=system) for system in ("Be brief", blocks)]
    assert counts == [NUM_PROMPT + 4, NUM_PROMPT + 4]


def test_neighbouring_turns_of_one_role_are_one(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    turns = [{"role": "user", "content": "Hello"}, {"role": "user", "content": [{"type": "text", "text": "there"}]}]
    assert count(alice, turns) == NUM_PROMPT


def count(client: Any, messages: Any = HELLO, **fields: Any) -> int:
    response = client.post("/v1/messages/count_tokens", json={"messages": messages, **fields})
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"input_tokens"}
    return int(response.json()["input_tokens"])


def test_counting_is_exact_and_free(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    turns = [*HELLO, {"role": "assistant", "content": "Well, hello"}, *HELLO]
    assert count(alice, turns, model=MODEL) == message(alice, turns).json()["usage"]["input_tokens"]
    site.settle()
    assert Receipt.objects.count() == 1
    with_tools = count(alice, tools=[TOOL])
    assert with_tools > NUM_PROMPT
    assert count(alice, tools=[TOOL], tool_choice={"type": "none"}) == NUM_PROMPT


def test_an_answer_in_a_schema_leaves_the_model_its_tools(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    message(alice, tools=[TOOL], **form)
    message(alice, tools=[TOOL], tool_choice={"type": "any"}, **form)
    both, forced = site.tokenizers.tried
    assert ("sum" in both, "look_up" in both) == (True, True)
    assert ("sum" in forced, "look_up" in forced) == (False, True)


def test_whatever_a_model_has_called_can_be_sent_back(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    tool_use = {"type": "tool_use", "id": "call_1", "name": "mcp__" + "s" * 120, "input": {"wei": 10**30}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "ok"}
    turns = [*HELLO, {"role": "assistant", "content": [tool_use]}, {"role": "user", "content": [result]}]
    tools = [{"name": tool_use["name"], "input_schema": {"type": "object"}}]
    assert message(alice, turns, tools=tools).status_code == 200


def test_thoughts_are_blocks_of_their_own(site: InProcessSite) -> None:
    """The fake template asks for them; they are opened here, and the fake model never ends them."""
    alice = site.client(site.cast.alice)
    begun = [*HELLO, {"role": "assistant", "content": "<think> Well,"}]
    body = message(alice, begun).json()
    assert [block["type"] for block in body["content"]] == ["thinking"]
    assert body["content"][0]["thinking"]
    assert body["content"][0]["signature"]
    assert count(alice, thinking={"type": "enabled", "budget_tokens": 1024}) == NUM_PROMPT + 1
    assert count(alice, thinking={"type": "disabled"}) == NUM_PROMPT
    found = events(alice, begun)
    assert found[2]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert found[-4]["delta"]["type"] == "signature_delta"


def test_the_budget_of_thoughts_goes_with_the_order(site: InProcessSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine makes of it is tested there: its least is more than this model's context."""
    found: list[int | None] = []

    def note(order: Any, *_: Any) -> Any:
        found.append(order.max_thought if order.opening else None)
        return order

    monkeypatch.setattr(forms, "with_bounded_thoughts", note)
    alice = site.client(site.cast.alice)
    kinds: list[Any] = [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}, None]
    for thinking in kinds:
        assert message(alice, max_tokens=1100, thinking=thinking).status_code == 200
    assert found == [1024, None, None, None]


# Streams


def test_a_stream_has_anthropics_events(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    whole = message(alice, model=MODEL).json()
    found = events(alice, model=MODEL)
    kinds = [each["type"] for each in found]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    head = found[0]["message"]
    assert (head["content"], head["stop_reason"], head["model"]) == ([], None, MODEL)
    assert head["usage"]["input_tokens"] == NUM_PROMPT
    text = "".join(each["delta"]["text"] for each in found[3:-3])
    assert text == whole["content"][0]["text"]
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"] == head["usage"] | {"output_tokens": 8}
    assert whole["usage"]["output_tokens"] == 8


def test_events_have_ids(site: InProcessSite) -> None:
    body = {"messages": HELLO, "max_tokens": 4, "stream": True}
    text = site.client(site.cast.alice).post("/v1/messages", json=body).text
    frames = [frame.splitlines() for frame in text.strip().split("\n\n")]
    assert [frame[1] for frame in frames if frame[0].startswith("id: ")][-1] == "event: message_stop"


def test_an_answer_from_the_cache_is_the_same(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    first = message(alice, cache=True)
    again = message(alice, cache=True)
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    assert first.json()["content"] == again.json()["content"]
    found = events(alice, cache=True)
    assert (
        "".join(each["delta"].get("text", "") for each in found if "delta" in each)
        == first.json()["content"][0]["text"]
    )


def test_a_failure_in_the_middle_is_an_event(site: InProcessSite, fake_speed: FakeSpeed) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    body = {"messages": HELLO, "max_tokens": 200, "stream": True}
    with site.client(site.cast.alice).stream("POST", "/v1/messages", json=body) as response:
        lines = response.iter_lines()
        for line in lines:
            if line == "event: content_block_delta":
                break
        site.stop_worker()
        rest = list(lines)
    assert "event: error" in rest
    assert "event: message_stop" not in rest


def test_a_client_that_goes_ends_its_request(site: InProcessSite, fake_speed: FakeSpeed) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    body = {"messages": HELLO, "max_tokens": 200, "stream": True}
    with site.client(site.cast.alice).stream("POST", "/v1/messages", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: site.num_running() == 0)


# Errors


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": -1}, "max_tokens: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0: "),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text: "),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0: "),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "messages.0."),
        ({"system": [{"type": "image"}]}, "system.0: "),
        ({"temperature": 1.2}, "temperature: "),
        ({"top_k": "many"}, "top_k: "),
        ({"stop_sequences": "one"}, "stop_sequences: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0: "),
        ({"tools": [{"name": "no schema"}]}, "tools.0.name: "),
        ({"tools": [TOOL, TOOL]}, "tools: "),
        ({"tool_choice": {"type": "any"}}, "tool_choice: "),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "thinking.budget_tokens: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "thinking.budget_tokens: "),
        ({"metadata": {"user_id": 7}}, "metadata.user_id: "),
        ({"n": 2}, "n: "),
    ],
)
def test_a_wrong_field_is_named(site: InProcessSite, fields: dict[str, Any], words: str) -> None:
    response = message(site.client(site.cast.alice), **fields)
    assert error_of(response, 400, "invalid_request_error", "validation_error").startswith(words)


def test_what_nobody_knows_is_ignored(site: InProcessSite) -> None:
    fields = {
        "service_tier": "auto",
        "container": None,
        "metadata": {"user_id": "u"},
        "output_config": {"effort": "low"},
    }
    turn = {"role": "user", "content": [{"type": "text", "text": "Hello", "citations": None, "new": 1}], "new": 2}
    assert message(site.client(site.cast.alice), [turn], **fields).status_code == 200


def test_refusals_have_anthropics_words(site: InProcessSite, plan: Any) -> None:
    alice, nobody = site.client(site.cast.alice), site.client()
    error_of(message(nobody), 401, "authentication_error", "missing_api_key")
    nobody.headers["x-api-key"] = "sk-ant-unknown"
    assert error_of(message(nobody), 401, "authentication_error", "invalid_api_key") == "invalid x-api-key"
    error_of(message(site.client(site.cast.operator)), 403, "permission_error", "forbidden")
    error_of(message(alice, model="nothing"), 404, "not_found_error", "model_not_found")
    error_of(message(site.client(site.cast.charlie), model=OTHER_MODEL), 404, "not_found_error", "model_not_found")
    long = [{"role": "user", "content": "word " * N_CTX}]
    found = error_of(message(alice, long), 400, "invalid_request_error", "context_length_exceeded")
    assert found == f"prompt is too long: {N_CTX + 4} tokens > {N_CTX - 1} maximum"
    error_of(alice.post("/v1/messages", content=b"{"), 400, "invalid_request_error", "invalid_json")
    error_of(alice.get("/v1/messages"), 405, "invalid_request_error", "method_not_allowed")
    error_of(alice.post("/v1/messages/batches", json={}), 404, "not_found_error", "not_found")
    poor = site.client(make_customer("Poor", plan, monthly_tokens=3))
    response = message(poor)
    error_of(response, 402, "billing_error", "quota_exhausted")
    assert response.headers["x-should-retry"] == "false"
    site.stop_worker()
    impatient = site.client(make_customer("Impatient", plan, queue_length=0))
    response = message(impatient)
    error_of(response, 529, "overloaded_error", "queue_full")
    assert response.headers["retry-after"] == "1"
    assert response.headers["retry-after-ms"] == "1000"


def test_a_body_that_is_too_large_is_told_in_both_forms(site: InProcessSite) -> None:
    response = message(site.client(site.cast.alice), [{"role": "user", "content": "x" * (3 << 20)}])
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "request_too_large"
    assert response.json()["type"] == "error"
    assert response.headers["request-id"] == response.headers["x-request-id"]


def test_headers_come_with_good_answers_and_bad_ones(site: InProcessSite, plan: Any) -> None:
    hasty = make_customer("Hasty", plan, requests_per_minute=50, tokens_per_minute=5000)
    client = site.client(hasty)
    client.headers["anthropic-version"] = "2023-06-01"
    started_at = datetime.now(UTC).replace(microsecond=0)
    for number, response in enumerate((message(client), message(client, []), client.get("/v1/messages")), 1):
        assert response.headers["request-id"] == response.headers["x-request-id"]
        if number == 3:
            continue  # nobody asked whose it is
        assert response.headers["anthropic-ratelimit-requests-limit"] == "50"
        assert response.headers["anthropic-ratelimit-requests-remaining"] == str(50 - number)
        assert response.headers["anthropic-ratelimit-tokens-limit"] == "5000"
        for kind in ("requests", "tokens"):
            reset = datetime.fromisoformat(response.headers[f"anthropic-ratelimit-{kind}-reset"])
            assert 0 <= (reset - started_at).total_seconds() <= 121
