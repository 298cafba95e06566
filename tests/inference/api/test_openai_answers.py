"""What OpenAI's dialect makes of an answer's text: thoughts, content, calls of tools; the same whole or in pieces."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from accounts.trail.refusals import Refusal
from inference.api.errors import EVERY, OPENAI, path_of
from inference.api.following import Collected, Ending
from inference.api.openai.asked import AskedChat, AskedText
from inference.api.openai.replies import Tally, TextLogprobs, chat_logprobs, token_text
from inference.api.openai.schemas import ChatBody, CompletionsBody
from inference.engine.types import TokenProbs
from inference.tools import plan_tools

pytestmark = pytest.mark.unit
SERVED: Any = SimpleNamespace(name="m", digest="d" * 64)
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("add", "find")]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": {"b": [1, 2]}, "c": "}"}}\n</tool_call>'
OTHER_CALL = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'


def asked(**fields: Any) -> AskedChat:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields})
    prompt = body.prompt()
    plan = plan_tools(None, prompt.tools, body.choice, name=body.named_tool)
    return AskedChat(request_id="r", served=SERVED, model="m", body=body, prompt=prompt, plan=plan)


def choice_of(text: str, reason: str = "eos", **fields: Any) -> dict[str, Any]:
    return asked(**fields).choice(0, Collected(text, Ending(reason)))


def streamed(pieces: list[str], **fields: Any) -> dict[str, Any]:
    """The deltas of a stream added up, as a client does."""
    writer = asked(**fields).writer(0)
    choices = [choice for piece in pieces for choice in writer.delta(piece, ())] + writer.end(Ending("eos"))
    found: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for choice in choices:
        delta = choice["delta"]
        found["content"] += delta.get("content", "")
        found["reasoning_content"] += delta.get("reasoning_content", "")
        found["tool_calls"] += delta.get("tool_calls", [])
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return {**found, "finish_reason": choices[-1]["finish_reason"]}


def test_calls_of_tools_are_no_content() -> None:
    choice = choice_of(f"<think>Add.</think>\nOne moment.\n{CALL}\n{OTHER_CALL}")
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("One moment.", "Add.")
    first, second = message["tool_calls"]
    assert set(first) == {"id", "type", "function"}
    assert first["type"] == "function"
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert orjson.loads(first["function"]["arguments"]) == {"a": {"b": [1, 2]}, "c": "}"}
    assert (first["function"]["name"], second["function"]["name"]) == ("add", "find")
    assert choice["finish_reason"] == "tool_calls"


def test_a_single_call_is_all_that_there_is_where_several_are_not_wanted() -> None:
    message = choice_of(CALL + OTHER_CALL, parallel_tool_calls=False)["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add"]


def test_what_is_cut_is_no_call() -> None:
    choice = choice_of(CALL[:40], "length")
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert choice_of(CALL + "and", "length")["finish_reason"] == "length"


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("length", [None, 60])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_forced_call_is_told_as_it_is_written(size: int, length: int | None, is_open: bool) -> None:
    """The same as the whole answer, also where it was cut."""
    form = replace(asked(tool_choice="required"), is_open=is_open)
    text = ("Rain.\n</think>\n" if is_open else "") + f"{CALL}\n{OTHER_CALL}"[:length]
    ending = Ending("length" if length else "eos")
    whole = form.choice(0, Collected(text, ending))
    writer = form.writer(0)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    choices = [choice for piece in pieces for choice in writer.delta(piece, ())] + writer.end(ending)
    deltas = [call for choice in choices for call in choice["delta"].get("tool_calls", ())]
    for chunk in choices:
        indices = [call["index"] for call in chunk["delta"].get("tool_calls", ())]
        assert len(set(indices)) == len(indices), "clients add up one delta of each call in a chunk"
    calls = whole["message"]["tool_calls"]
    assert len(calls) == (1 if length else 2)
    for index, call in enumerate(calls):
        mine = [delta for delta in deltas if delta["index"] == index]
        assert {name: mine[0][name] for name in ("id", "type")} == {"id": call["id"], "type": "function"}
        assert mine[0]["function"]["name"] == call["function"]["name"]
        assert "".join(each["function"]["arguments"] for each in mine) == call["function"]["arguments"]
    assert len([delta for delta in deltas if delta["index"] == 0]) > 5 or size > 1
    assert whole["message"]["content"] == "".join(choice["delta"].get("content", "") for choice in choices) == ""
    assert whole["message"].get("reasoning_content", "") == ("Rain." if is_open else "")
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == ("length" if length else "tool_calls")


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}])
def test_without_tools_there_are_no_calls(fields: dict[str, Any]) -> None:
    choice = choice_of(CALL, **fields)
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert "tool_calls" not in choice["message"]


@pytest.mark.parametrize("text", ["hello", "<tool_call>{broken", "<think>x", "", f"<think>\n{CALL}</think>ok"])
def test_content_is_never_null(text: str) -> None:
    assert isinstance(choice_of(text)["message"]["content"], str)


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", " ", "\n", "a😀é", CALL, OTHER_CALL, CALL[:30], "<tool", "{", '"']),
    max_size=6,
)


@given(PIECES, st.integers(1, 9), st.sampled_from(["auto", "none"]))
def test_a_stream_adds_up_to_the_whole_answer(pieces: list[str], size: int, reasoning: str) -> None:
    text = "".join(pieces)
    whole = choice_of(text, reasoning_format=reasoning)
    cut = [text[start : start + size] for start in range(0, len(text), size)]
    found = streamed(cut, reasoning_format=reasoning)
    message = whole["message"]
    assert found["content"] == message["content"]
    assert found["reasoning_content"] == message.get("reasoning_content", "")
    assert found["finish_reason"] == whole["finish_reason"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    assert [call["function"] for call in found["tool_calls"]] == calls
    assert [call["index"] for call in found["tool_calls"]] == list(range(len(calls)))


# Probabilities

SMILE = "😀".encode()
PROBS = [
    TokenProbs(1, -0.5, b" a", (TokenProbs(1, -0.5, b" a"), TokenProbs(2, -math.inf, SMILE[:2]))),
    TokenProbs(2, -1.0, SMILE[:2]),
    TokenProbs(3, -2.0, SMILE[2:]),
    TokenProbs(4, -3.0, b"b"),
]


def test_parts_of_characters_are_spelled() -> None:
    assert token_text("é".encode()) == "é"
    assert token_text(SMILE[:2]) == "bytes:\\xf0\\x9f"


def test_probabilities_of_a_chat_have_openais_shape() -> None:
    (first, *_) = chat_logprobs(PROBS, 1)["content"]
    assert first == {
        "token": " a",
        "logprob": -0.5,
        "bytes": [32, 97],
        "top_logprobs": [{"token": " a", "logprob": -0.5, "bytes": [32, 97]}],
    }
    assert chat_logprobs(PROBS, 2)["content"][0]["top_logprobs"][1]["logprob"] == -9999.0
    assert [each["top_logprobs"] for each in chat_logprobs(PROBS, 0)["content"]] == [[]] * 4


def test_probabilities_of_a_text_say_where_its_tokens_begin() -> None:
    whole = TextLogprobs(2).of(PROBS)
    assert whole["text_offset"] == [0, 2, 2, 3], "the smile is there when its second token is"
    assert whole["top_logprobs"][0] == {" a": -0.5, "bytes:\\xf0\\x9f": -9999.0}
    assert TextLogprobs(0).of(PROBS)["top_logprobs"] is None
    piecewise = TextLogprobs(2)
    parts = [piecewise.of([each]) for each in PROBS]
    assert {name: [item for part in parts for item in part[name]] for name in whole} == whole


def test_logprobs_0_reports_the_chosen_tokens() -> None:
    body = CompletionsBody.model_validate({"prompt": "x", "logprobs": 0})
    choice = AskedText(request_id="r", served=SERVED, model="m", body=body).choice(0, Collected("", Ending("eos")))
    assert body.num_probs == 1
    assert choice["logprobs"]["tokens"] == []


def test_a_prompt_that_several_share_counts_once() -> None:
    tally = Tally()
    ending = Ending("eos", receipt={"prompt_tokens": 5, "completion_tokens": 2, "cached_tokens": 3})
    tally.add(ending)
    assert "timings" in tally.timings()
    tally.add(ending, shares_prompt=True)
    assert tally.timings() == {}
    assert tally.usage() == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


# Bodies


def test_seeds_of_64_bits_are_folded() -> None:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "seed": -5})
    assert body.sampling().seed == 2**32 - 5
    assert body.model_copy(update={"seed": -1}).sampling().seed is None
    assert body.model_copy(update={"seed": 2**40 + 7}).sampling().seed == 7


def test_a_context_is_shifted_only_where_it_is_asked_for() -> None:
    body = CompletionsBody.model_validate({"prompt": "x", "max_tokens": 5})
    assert not body.decoding().context_shift
    assert body.model_copy(update={"context_shift": True}).decoding().context_shift
    assert not body.model_copy(update={"context_shift": True, "max_tokens": None}).decoding().context_shift


def test_what_clients_add_to_messages_and_tools_is_left_out() -> None:
    call = {"id": "c1", "index": 0, "type": "function", "function": {"name": "add", "arguments": "{}", "parsed": {}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}], "sentiment": 1},
        {"role": "assistant", "content": None, "parsed": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3", "is_error": False},
    ]
    tools = [{**TOOLS[0], "defer_loading": True}]
    body = ChatBody.model_validate({"messages": messages, "tools": tools})
    user, assistant, tool = body.prompt().messages
    assert (user.content, assistant.tool_calls[0].name, tool.content) == ("x", "add", "3")
    assert body.prompt().tools == (TOOLS[0],)


@pytest.mark.parametrize(
    "messages", [None, 5, "x", [], [5], [{}], [{"role": 5}], [{"role": "user", "content": [5]}], [{"role": ["user"]}]]
)
def test_what_is_no_message_is_told_by_its_form(messages: Any) -> None:
    with pytest.raises(ValidationError):
        ChatBody.model_validate({"messages": messages})


@pytest.mark.parametrize("tools", [5, [5], [{"function": 5}], [{"type": "function"}]])
def test_what_is_no_tool_is_told_by_its_form(tools: Any) -> None:
    with pytest.raises(ValidationError):
        ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": tools})


# Errors


@pytest.mark.parametrize(
    ("loc", "path"),
    [
        (["messages", "0", "user", "content", "str"], "messages[0].content"),
        (["messages", "1", "user", "content", "list[TextPart]", "0", "text"], "messages[1].content"),
        (["logit_bias", "by_id", "7"], "logit_bias"),
        (["prompt", "constrained-str"], "prompt"),
        (["speculative.n_min"], "speculative.n_min"),
        (["tools", "0", "function", "name"], "tools[0].function.name"),
        ([], None),
    ],
)
def test_fields_are_named_as_their_sender_knows_them(loc: list[str], path: str | None) -> None:
    assert path_of(loc) == path


@pytest.mark.parametrize(
    ("refusal", "status", "kind", "code"),
    [
        (Refusal("queue_full", "x", retry_after=1), 503, "server_error", "server_is_overloaded"),
        (Refusal("llm_not_loaded", "x"), 503, "server_error", "model_loading"),
        (Refusal("internal_error", "x"), 500, "server_error", None),
        (Refusal("worker_lost", "x"), 503, "server_error", "worker_lost"),
        (Refusal("conflict", "x"), 409, "invalid_request_error", "conflict"),
        (Refusal("quota_exhausted", "x"), 429, "insufficient_quota", "insufficient_quota"),
        (Refusal("too_many_concurrent_requests", "x", limit="concurrent_requests"), 429, "requests", ...),
        (Refusal("rate_limit_exceeded", "x", limit="tokens_per_minute"), 429, "tokens", "rate_limit_exceeded"),
    ],
)
def test_codes_have_the_types_that_clients_know(refusal: Refusal, status: int, kind: str, code: Any) -> None:
    error = OPENAI.error(refusal)
    assert OPENAI.status(refusal.code) == status
    assert (error["type"], error["code"]) == (kind, refusal.code if code is ... else code)
    both = orjson.loads(EVERY.body(refusal, "id"))
    assert (both["code"], both["error"]) == (refusal.code, error)
