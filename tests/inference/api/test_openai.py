"""OpenAI's dialect on a whole site with a fake model: shapes, streams, usage, bounds, errors and their headers."""

from __future__ import annotations

from typing import Any

import pytest

from inference.engine.fake_backend import PIECES
from inference.models import Receipt
from tests.conftest import make_customer
from tests.in_process import MODEL, N_CTX, OTHER_MODEL, FakeSpeed, InProcessSite, wait_until
from tests.openai_calls import HELLO, chat, chunks, complete, error_of, respond, text_of

pytestmark = pytest.mark.api
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NUM_PROMPT = 6
"""Tokens of HELLO in the fake model's template."""
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


# Whole answers


def test_a_chat_completion_has_openais_shape(site: InProcessSite) -> None:
    response = chat(site.client(site.cast.alice), model=MODEL)
    body = response.json()
    assert response.status_code == 200, body
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    assert isinstance(body["created"], int)
    assert body["system_fingerprint"] == "fp_aaaaaaaaaa"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert set(choice["message"]) == {"role", "content", "refusal"}
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert body["usage"] == {
        "prompt_tokens": NUM_PROMPT,
        "completion_tokens": 8,
        "total_tokens": NUM_PROMPT + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["timings"]["predicted_n"] == 8
    site.settle()
    assert Receipt.objects.get().route == CHAT
    assert site.charged(site.cast.alice) == (NUM_PROMPT + 8, 0)


def test_a_completion_has_openais_shape(site: InProcessSite) -> None:
    response = complete(site.client(site.cast.alice), model="default-chat")
    body = response.json()
    assert body["id"] == f"cmpl-{response.headers['x-request-id']}"
    assert (body["object"], body["model"]) == ("text_completion", "default-chat"), "as it was asked for"
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["logprobs"], choice["finish_reason"]) == (None, "length")
    assert body["usage"]["total_tokens"] == 4 + 8


def test_headers_come_with_good_answers_and_bad_ones(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for response in (chat(alice), chat(alice, []), complete(alice), alice.get(CHAT), alice.get("/v1/models")):
        assert response.headers["x-request-id"]
        assert response.headers["openai-version"] == "2020-10-01"
        assert int(response.headers["openai-processing-ms"]) >= 0
    for response in (chat(alice), chat(alice, [])):
        for kind in ("requests", "tokens"):
            assert int(response.headers[f"x-ratelimit-limit-{kind}"]) > 0
            assert response.headers[f"x-ratelimit-reset-{kind}"].endswith("s")


def test_both_names_of_the_output_bound_hold(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    for fields in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
        assert chat(alice, **fields).json()["usage"]["completion_tokens"] == 3
    unbounded = chat(alice, max_tokens=None).json()
    assert unbounded["usage"]["total_tokens"] == N_CTX
    assert unbounded["choices"][0]["finish_reason"] == "length"


def test_a_stop_word_ends_the_answer_and_is_no_part_of_it(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    word = complete(alice).json()["choices"][0]["text"].split()[2]
    for stop in (word, [word]):
        choice = complete(alice, stop=stop).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert word not in choice["text"]


def test_several_answers_share_one_prompt_and_its_price(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = chat(alice, n=3, seed=5, temperature=1).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (NUM_PROMPT, 24)
    assert "timings" not in body
    assert site.charged(site.cast.alice) == (NUM_PROMPT + 24, 0)


def test_prompts_are_texts_or_tokens_or_arrays_of_them(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    tokens = alice.post("/tokenize", json={"content": "one two"}).json()["tokens"]
    alone = [complete(alice, prompt).json()["choices"][0]["text"] for prompt in ("one two", "three")]
    assert complete(alice, tokens).json()["choices"][0]["text"] == alone[0]
    for prompts in (
        ["one two", "three"],
        [tokens, alice.post("/tokenize", json={"content": "three"}).json()["tokens"]],
    ):
        body = complete(alice, prompts, n=2).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in body["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
        assert body["usage"]["prompt_tokens"] == 3


def test_the_completion_cache_is_used_where_it_is_asked_for(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    first = chat(alice, cache=True)
    site.settle()
    again = chat(alice, cache=True)
    assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
    assert again.json()["choices"] == first.json()["choices"]
    assert text_of(chunks(alice, CHAT, cache=True)) == first.json()["choices"][0]["message"]["content"]
    assert chat(alice).headers["x-cache"] == "miss"


def test_tools_are_shown_and_a_forced_call_has_a_grammar(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    plain = chat(alice).json()["usage"]["prompt_tokens"]
    assert chat(alice, tools=[TOOL]).json()["usage"]["prompt_tokens"] > plain
    assert chat(alice, tools=[TOOL], tool_choice="none").json()["usage"]["prompt_tokens"] == plain
    assert not site.tokenizers.tried
    chat(alice, tools=[TOOL], tool_choice="required")
    assert "look_up" in site.tokenizers.tried[0]
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "what"}}}
    error_of(chat(alice, tools=[bad], tool_choice="required"), 400, "invalid_schema", "tools")
    refused = chat(alice, tools=[TOOL], tool_choice="required", grammar='root ::= "a"')
    error_of(refused, 400, "invalid_value", "tool_choice")


def test_an_answer_in_a_schema_leaves_the_model_its_tools(site: InProcessSite) -> None:
    """Agents send both in each turn: a call, or in the end the answer."""
    alice = site.client(site.cast.alice)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    chat(alice, tools=[TOOL], response_format=form)
    respond(
        alice,
        tools=[{"type": "function", "name": "find", "parameters": {"type": "object"}}],
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    )
    chat(alice, tools=[TOOL], response_format=form, tool_choice="none")
    chat(alice, tools=[TOOL], response_format=form, tool_choice="required")
    words = ('\\"a\\"', "look_up", "find")
    assert [[word for word in words if word in grammar] for grammar in site.tokenizers.tried] == [
        ['\\"a\\"', "look_up"],
        ['\\"a\\"', "find"],
        ['\\"a\\"'],
        ["look_up"],
    ]
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}}
    error_of(
        chat(alice, tools=[TOOL], response_format=bad), 400, "invalid_schema", "response_format.json_schema.schema"
    )


def test_an_effort_is_told_to_the_template(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    plain, none, explicit = (
        chat(alice, **fields).json()["usage"]["prompt_tokens"]
        for fields in (thinks, {"reasoning_effort": "none"}, {**thinks, "reasoning_effort": "none"})
    )
    assert plain == none + 1
    assert explicit == plain, "what the request says of the template has the last word"
    error_of(chat(alice, reasoning_effort="a b"), 400, "invalid_value", "reasoning_effort")


def test_a_part_that_refuses_is_text(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    said = [{"type": "text", "text": "No"}], [{"type": "refusal", "refusal": "No"}]
    counts = [
        chat(alice, [*HELLO, {"role": "assistant", "content": parts}, *HELLO]).json()["usage"]["prompt_tokens"]
        for parts in said
    ]
    assert counts[0] == counts[1]


def test_fields_that_nobody_knows_are_ignored(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    new = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "u", "of_tomorrow": {"x": 1}}
    assert chat(alice, **new).status_code == 200
    assert complete(alice, **new).status_code == 200


def test_llamacpps_fields_are_taken(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    fields = {
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.1,
        "dry_multiplier": 0.5,
        "mirostat": 0,
        "cache_prompt": False,
        "speculative": False,
        "context_shift": False,
        "lora": [],
        "adapters": None,
        "logit_bias": {"5": -100},
    }
    for call in (chat, complete):
        response = call(alice, **fields)
        assert response.status_code == 200, response.text
    assert complete(alice, logit_bias=[[5, False]]).status_code == 200


# Streams


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_says_what_one_object_says(site: InProcessSite, path: str) -> None:
    alice = site.client(site.cast.alice)
    whole = (chat if path == CHAT else complete)(alice).json()
    found = chunks(alice, path, stream_options={"include_usage": True})
    *told, last = found
    answer = whole["choices"][0]
    assert text_of(found) == (answer["message"]["content"] if path == CHAT else answer["text"])
    assert {chunk["id"] for chunk in found} == {found[0]["id"]}
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in told)
    assert told[-1]["choices"][0]["finish_reason"] == answer["finish_reason"]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in told[:-1])
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert all("usage" not in chunk for chunk in chunks(alice, path))


def test_a_chat_stream_begins_with_the_role_and_ends_with_nothing_but_the_reason(site: InProcessSite) -> None:
    first, *middle, last = chunks(site.client(site.cast.alice), CHAT)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["object"] == "chat.completion.chunk"
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in middle)
    assert all(chunk["choices"][0]["delta"]["content"] for chunk in middle)
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_several_answers_share_one_stream(site: InProcessSite, path: str) -> None:
    alice = site.client(site.cast.alice)
    fields = {"n": 3, "seed": 3, "temperature": 1}
    whole = (chat if path == CHAT else complete)(alice, **fields).json()
    found = chunks(alice, path, stream_options={"include_usage": True}, **fields)
    for index, choice in enumerate(whole["choices"]):
        assert text_of(found, index) == (choice["message"]["content"] if path == CHAT else choice["text"])
    ends = [each for chunk in found for each in chunk["choices"] if each["finish_reason"]]
    assert sorted(each["index"] for each in ends) == [0, 1, 2]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 24
    assert found[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_worker_that_stops_is_an_error_in_the_stream(site: InProcessSite, fake_speed: FakeSpeed, number: int) -> None:
    fake_speed.seconds_per_step = 0.05
    site.stop_worker()
    site.start_worker()
    found: list[str] = []
    body = {"messages": HELLO, "max_tokens": 200, "stream": True, "n": number}
    with site.client(site.cast.alice).stream("POST", CHAT, json=body) as response:
        for line in response.iter_lines():
            found.append(line)
            if len(found) == 6:
                site.stop_worker()
    said = [line for line in found if line.startswith("data: ")]
    assert said[-1] == "data: [DONE]"
    assert '"error":{"message":' in said[-2]
    assert '"finish_reason":"error"' in said[-2]
    assert not any('"finish_reason":"stop"' in line for line in said)


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_went_well_is_logged_without_an_error(
    site: InProcessSite, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr("llmsite.guard.log_request", lines.append)
    chunks(site.client(site.cast.alice), CHAT, n=number)
    wait_until(lambda: len(lines) == 1)
    assert lines[0]["route"] == CHAT
    assert "error_type" not in lines[0]


# Thoughts


@pytest.fixture
def thinking(site: InProcessSite) -> str:
    return site.serve_thinker()


def test_thoughts_are_not_the_content(site: InProcessSite, thinking: str) -> None:
    alice = site.client(site.cast.alice)
    message = chat(alice, model=thinking).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    found = chunks(alice, CHAT, model=thinking)
    assert text_of(found, name="reasoning_content") == message["reasoning_content"]
    assert text_of(found) == ""
    plain = chat(alice, model=thinking, reasoning_format="none").json()["choices"][0]["message"]
    assert plain["content"].strip() == message["reasoning_content"]
    assert "reasoning_content" not in plain


def test_thoughts_that_are_longer_than_their_budget_are_ended(
    site: InProcessSite, thinking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of the tag the fake model has two words."""
    alice, words = site.client(site.cast.alice), (PIECES.index(b" river"), PIECES.index(b" light"))
    encode = site.tokenizers.encode

    def encoded(model: Any, text: str, **options: Any) -> tuple[int, ...]:
        return words if text == "</think>" else encode(model, text, **options)

    monkeypatch.setattr(site.tokenizers, "encode", encoded)

    def thoughts(**fields: Any) -> list[str]:
        message = chat(alice, model=thinking, max_tokens=20, temperature=0, **fields).json()["choices"][0]["message"]
        return str(message["reasoning_content"]).split()

    free = thoughts()
    for name in ("thinking_budget_tokens", "reasoning_budget_tokens"):
        found = thoughts(**{name: 5})
        assert (found[:5], found[5:7], found[7:]) == (free[:5], ["river", "light"], free[7:])
        assert thoughts(**{name: 0})[:2] == ["river", "light"]
        assert thoughts(**{name: -1}) == free
    assert thoughts(thinking_budget_tokens=0, reasoning_budget_tokens=5)[:2] == ["river", "light"]
    assert chat(alice, model=thinking, thinking_budget_tokens=-2).status_code == 400


# What is wrong

WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no messages": ({"messages": []}, "invalid_value", "messages"),
    "messages that are none": ({"messages": "hello"}, "invalid_type", "messages"),
    "an unknown role": ({"messages": [{"role": "chef", "content": "x"}]}, "invalid_value", "messages[0]"),
    "no content": ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "invalid_value",
        "messages",
    ),
    "too hot": ({"temperature": 2.5}, "invalid_value", "temperature"),
    "a temperature in letters": ({"temperature": "hot"}, "invalid_type", "temperature"),
    "top_p over 1": ({"top_p": 1.5}, "invalid_value", "top_p"),
    "a penalty": ({"presence_penalty": 3}, "invalid_value", "presence_penalty"),
    "no answers": ({"n": 0}, "invalid_value", "n"),
    "a bound below -1": ({"max_tokens": -2}, "invalid_value", "max_tokens"),
    "a bias of a word": ({"logit_bias": {"word": 1}}, "invalid_value", "logit_bias"),
    "a bias that is none": ({"logit_bias": 5}, "invalid_type", "logit_bias"),
    "an unknown form": ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
    "a form in a word": ({"response_format": "json"}, "invalid_type", "response_format"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
    "two forms": ({"response_format": {"type": "json_object"}, "json_schema": {}}, "invalid_value", "response_format"),
    "probabilities that nobody asked for": ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
    "too many probabilities": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    "functions of old": ({"functions": [{"name": "f"}]}, "invalid_value", "functions"),
    "a call without tools": ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
    "a choice that is none": ({"tool_choice": "always"}, "invalid_value", "tool_choice"),
    "a tool that is not there": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        "invalid_value",
        "tool_choice",
    ),
    "a tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "missing_required_parameter", None),
    "audio": ({"modalities": ["audio"]}, "invalid_value", "modalities[0]"),
    "stream in letters": ({"stream": "yes"}, "invalid_type", "stream"),
    "both ways to name adapters": ({"adapters": [], "lora": []}, "invalid_value", "adapters"),
    "an empty model": ({"model": ""}, "invalid_value", "model"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_a_400_that_names_the_field(site: InProcessSite, name: str) -> None:
    fields, code, param = WRONG[name]
    response = chat(site.client(site.cast.alice), **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["type"]) == (code, "invalid_request_error"), error
    assert param is None or error["param"] == param, error
    assert error["message"]
    assert site.charged(site.cast.alice) == (0, 0)


UNSUPPORTED = {"echo": True, "suffix": "end", "best_of": 3, "logprobs": 6, "prompt": [], "temperature": 9}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_completions_refuse_what_they_would_not_do(site: InProcessSite, name: str) -> None:
    error_of(complete(site.client(site.cast.alice), **{name: UNSUPPORTED[name]}), 400, "invalid_value", name)


def test_completions_take_what_changes_nothing(site: InProcessSite) -> None:
    fields = {"echo": False, "suffix": None, "best_of": 2, "n": 2}
    assert complete(site.client(site.cast.alice), **fields).status_code == 200


def test_a_wrong_schema_names_its_place(site: InProcessSite) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}}
    response = chat(site.client(site.cast.alice), response_format=form)
    error_of(response, 400, "invalid_schema", "response_format.json_schema.schema")
    error_of(chat(site.client(site.cast.alice), grammar="root ::= ("), 400, "invalid_grammar", "grammar")


def test_forms_become_grammars(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    forms: list[Any] = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
    ]
    for form in forms:
        chat(alice, response_format=form)
    assert len(site.tokenizers.tried) == 2
    assert '\\"a\\"' in site.tokenizers.tried[1]
    chat(alice, response_format={"type": "text"})
    assert len(site.tokenizers.tried) == 2


def test_a_conversation_that_does_not_fit_says_both_lengths(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    long = [{"role": "user", "content": "word " * N_CTX}]
    for stream in (False, True):
        error = error_of(chat(alice, long, stream=stream), 400, "context_length_exceeded", "messages")
        assert f"maximum context length is {N_CTX} tokens" in error["message"]
        assert f"your messages resulted in {N_CTX + 4} tokens" in error["message"]
    error_of(complete(alice, ["one", "word " * N_CTX]), 400, "context_length_exceeded", "prompt")


def test_a_model_that_is_not_granted_does_not_exist(site: InProcessSite) -> None:
    charlie = site.client(site.cast.charlie)
    for name in (OTHER_MODEL, "nothing", f"{MODEL}:poet"):
        error = error_of(chat(charlie, model=name), 404, "model_not_found", "model")
        assert error["message"] == f"The model `{name}` does not exist or you do not have access to it."
        error_of(charlie.get(f"/v1/models/{name}"), 404, "model_not_found", "model")
    error_of(chat(charlie, adapters=[{"name": "poet"}]), 404, "adapter_not_found", "adapters")


def test_keys_that_are_missing_or_wrong(site: InProcessSite) -> None:
    error = error_of(chat(site.client()), 401, "missing_api_key")
    assert error["type"] == "invalid_request_error"
    client = site.client()
    client.headers["Authorization"] = "Bearer sk-unknown"
    response = chat(client)
    assert error_of(response, 401, "invalid_api_key")["message"] == "Incorrect API key provided."
    assert "sk-unknown" not in response.text
    assert response.headers["www-authenticate"] == "Bearer"


def test_an_exhausted_quota_is_a_429_that_is_not_tried_again(site: InProcessSite, plan: Any) -> None:
    poor = site.client(make_customer("Poor", plan, monthly_tokens=3))
    response = chat(poor)
    error = error_of(response, 429, "insufficient_quota")
    assert error["type"] == "insufficient_quota"
    assert error["message"].startswith("You exceeded your current quota")
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers
    assert "retry-after-ms" not in response.headers


def test_too_many_requests_say_when_to_come_back(site: InProcessSite, plan: Any) -> None:
    hasty = site.client(make_customer("Hasty", plan, requests_per_minute=1))
    chat(hasty)
    response = chat(hasty)
    if response.status_code == 200:  # the minute has just turned
        response = chat(hasty)
    error = error_of(response, 429, "rate_limit_exceeded")
    assert error["type"] == "requests"
    wait = int(response.headers["retry-after"])
    assert 1 <= wait <= 60
    assert response.headers["retry-after-ms"] == str(wait * 1000)
    assert error["message"].startswith("Rate limit reached on requests per min (RPM): Limit 1, Used 1, Requested 1.")
    assert "x-should-retry" not in response.headers
    assert response.headers["x-ratelimit-remaining-requests"] == "0"


def test_more_tokens_than_any_minute_has_are_not_tried_again(site: InProcessSite, plan: Any) -> None:
    narrow = site.client(make_customer("Narrow", plan, tokens_per_minute=10))
    response = chat(narrow)
    assert error_of(response, 429, "rate_limit_exceeded")["type"] == "tokens"
    assert response.headers["x-should-retry"] == "false"


def test_a_key_without_the_scope_may_not_generate(site: InProcessSite) -> None:
    error = error_of(chat(site.client(site.cast.operator)), 403, "forbidden")
    assert error["type"] == "permission_error"


def test_what_is_no_json_and_what_is_no_post(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    error_of(alice.post(CHAT, content=b"{"), 400, "invalid_json")
    error_of(alice.post(CHAT, content=b"[]"), 400, "invalid_type")
    response = alice.get(CHAT)
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


# Models


def test_a_model_is_found_by_name_and_by_alias(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    listed = {entry["id"]: entry for entry in alice.get("/v1/models").json()["data"]}
    assert alice.get(f"/v1/models/{MODEL}").json() == listed[MODEL]
    assert alice.get("/v1/models/default-chat").json()["id"] == "default-chat"
    assert {"id", "object", "created", "owned_by"} <= listed[MODEL].keys()


def test_llamacpps_short_addresses_are_the_same(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    short, long = (alice.post(path, json=body).json() for path in ("/chat/completions", CHAT))
    assert short["choices"] == long["choices"]
    assert alice.get("/models").json()["data"] == alice.get("/v1/models").json()["data"]


def test_errors_of_the_list_are_in_both_shapes(site: InProcessSite) -> None:
    response = site.client().get("/v1/models")
    body = response.json()
    assert (response.status_code, body["code"], body["error"]["code"]) == (401, "missing_api_key", "missing_api_key")
    assert body["message"]
    assert body["request_id"] == response.headers["x-request-id"]


def test_a_conversation_is_counted_without_an_answer(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = {"messages": HELLO, "tools": [TOOL], "max_tokens": 8}
    expected = chat(alice, tools=[TOOL]).json()["usage"]["prompt_tokens"]
    charged = site.charged(site.cast.alice)
    for path in (f"{CHAT}/input_tokens", "/chat/completions/input_tokens"):
        counted = alice.post(path, json=body)
        assert counted.json() == {"object": "response.input_tokens", "input_tokens": expected}
    assert site.charged(site.cast.alice) == charged
    assert (
        site.client(site.cast.bob).post(f"{CHAT}/input_tokens", json={**body, "model": OTHER_MODEL}).status_code == 404
    )


def test_128_prompts_are_answered_in_their_order_a_few_at_a_time(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    body = complete(alice, [f"word{number}" for number in range(128)], max_tokens=2).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(128))
    assert body["choices"][77]["text"] == complete(alice, "word77", max_tokens=2).json()["choices"][0]["text"]
    assert body["usage"]["prompt_tokens"] == 128
    assert site.charged(site.cast.alice) == (128 * 3 + 3, 0)


def test_128_answers_of_one_prompt_are_charged_one_prompt(site: InProcessSite) -> None:
    alice = site.client(site.cast.alice)
    assert len(complete(alice, n=128, max_tokens=1, temperature=1).json()["choices"]) == 128
    assert len(chat(alice, n=20, max_tokens=1).json()["choices"]) == 20
    assert site.charged(site.cast.alice) == (4 + 128 + NUM_PROMPT + 20, 0)


@pytest.mark.parametrize("fields", [{"prompt": ["one"] * 129}, {"prompt": ["one"] * 2, "n": 65}, {"n": 129}])
def test_more_than_128_answers_are_refused(site: InProcessSite, fields: dict[str, Any]) -> None:
    alice = site.client(site.cast.alice)
    assert complete(alice, **fields).status_code == 400
    assert site.charged(site.cast.alice) == (0, 0)
