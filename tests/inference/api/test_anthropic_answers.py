"""What Anthropic's dialect makes of an answer's text: blocks of thoughts, text and calls, whole or in pieces."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inference.api.anthropic.asked import AskedMessage
from inference.api.anthropic.blocks import messages_of
from inference.api.anthropic.schemas import MessagesBody
from inference.api.anthropic.writer import blocks_of
from inference.api.async_view import json_response
from inference.api.following import Collected, Ending
from inference.chat.prompt import Message, ToolCall
from inference.chat.thinking import THINK
from inference.tools import plan_tools

pytestmark = pytest.mark.unit
SERVED: Any = SimpleNamespace(name="m", digest="d" * 64)
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("add", "find")]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": {"b": [1, 2]}, "c": "}"}}\n</tool_call>'
OTHER_CALL = '<tool_call>{"name": "find", "arguments": {}}</tool_call>'
TORTURE = 'Zoë 😀👩‍👩‍👧‍👦 漢字 \u0301e עִברִית नमस्ते \u200d🏳️‍🌈 ﷽ <think> {"a": "}"} <tool_call>x'


def body_of(**fields: Any) -> MessagesBody:
    given_fields = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "tools": TOOLS, **fields}
    return MessagesBody.model_validate(given_fields)


def asked(*, is_open: bool = False, **fields: Any) -> AskedMessage:
    body = body_of(**fields)
    prompt = body.prompt()
    plan = plan_tools(None, prompt.tools, body.choice, name=body.named_tool, parallel=body.parallel)
    return AskedMessage(
        request_id="r",
        served=SERVED,
        model="m",
        prompt=prompt,
        plan=plan,
        tags=THINK,
        parallel=body.parallel,
        is_open=is_open,
    )


def reply(text: str, reason: str = "eos", **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = as_sent(asked(**fields).reply(Collected(text, Ending(reason))))
    return found


def as_sent(value: Any) -> Any:
    """As a client reads it."""
    return json.loads(json_response(value).content)


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in block.items() if name != "id"} for block in as_sent(blocks)]


def test_blocks_come_in_their_order() -> None:
    found = reply(f"<think>Add.</think>\nOne moment.\n{CALL}\n{OTHER_CALL} Done.")
    thought, text, first, second, rest = found["content"]
    assert thought == {"type": "thinking", "thinking": "Add.", "signature": "msg_r"}
    assert text == {"type": "text", "text": "One moment."}
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "add", {"a": {"b": [1, 2]}, "c": "}"})
    assert (second["name"], second["input"]) == ("find", {})
    assert first["id"] != second["id"]
    assert rest["text"].strip() == "Done."
    assert (found["stop_reason"], found["stop_sequence"]) == ("tool_use", None)


@pytest.mark.parametrize("value", ["123456789012345678901234567890", "1e999", '"\\ud83d"', '"\\u00e9"'])
def test_the_input_of_a_call_is_what_the_model_wrote(value: str) -> None:
    """Numbers of more than 64 bits and halves of a character are JSON, too."""
    (block,) = reply(f'<tool_call>{{"name": "add", "arguments": {{"a": {value}}}}}</tool_call>')["content"]
    assert block["input"] == {"a": json.loads(value)}


def test_a_cut_answer_does_not_wait_for_tools() -> None:
    assert reply(CALL, "length")["stop_reason"] == "max_tokens"
    cut = reply(CALL[:40], "length")
    assert [block["type"] for block in cut["content"]] == ["text"]


def test_one_call_is_all_where_several_are_not_wanted() -> None:
    found = reply(CALL + OTHER_CALL, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block["name"] for block in found["content"]] == ["add"]


def test_without_tools_a_call_is_text() -> None:
    for fields in ({"tools": None}, {"tool_choice": {"type": "none"}}):
        found = reply(CALL, **fields)
        assert [block["type"] for block in found["content"]] == ["text"]
        assert found["stop_reason"] == "end_turn"


@given(data=st.data())
@pytest.mark.parametrize("is_open", [False, True])
def test_pieces_add_up_to_the_whole(is_open: bool, data: st.DataObject) -> None:
    parts = ["Some text. ", CALL, OTHER_CALL, "<think>hm</think>", "</think>", "\n\n", TORTURE, CALL[:30]]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = asked(is_open=is_open).reply(Collected(text, Ending("eos")))["content"]
    writer = asked(is_open=is_open).writer()
    events = [event for piece in pieces for event in writer.feed(piece)] + writer.finish()
    assert without_ids(blocks_of(events)) == without_ids(whole)
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    stops = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert starts == stops == list(range(len(starts)))
    assert all(event["index"] == max(index for index in starts if index <= event["index"]) for event in events)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_forced_call_is_told_as_it_is_written(is_open: bool) -> None:
    text = ("Rain.</think>" if is_open else "") + f"{CALL}\n{OTHER_CALL}"
    form = asked(is_open=is_open, tool_choice={"type": "any"})
    writer = form.writer()
    told = [event for character in text for event in writer.feed(character)] + writer.finish()
    whole = form.reply(Collected(text, Ending("eos")))
    assert as_sent(blocks_of(told)) == as_sent(whole["content"])
    assert whole["stop_reason"] == "tool_use"
    kinds = [block["type"] for block in whole["content"]]
    assert kinds == [*(["thinking"] if is_open else []), "tool_use", "tool_use"]
    first = len(kinds) - 2
    deltas = [event["delta"] for event in told if event["type"] == "content_block_delta" and event["index"] == first]
    assert "".join(delta["partial_json"] for delta in deltas) == '{"a": {"b": [1, 2]}, "c": "}"}'
    assert len(deltas) > 20


def test_of_a_forced_call_that_was_cut_a_stream_has_the_beginning_and_a_whole_answer_the_text() -> None:
    form = asked(tool_choice={"type": "any"})
    (block,) = form.reply(Collected(CALL[:60], Ending("length")))["content"]
    assert block == {"type": "text", "text": CALL[:60]}
    writer = form.writer()
    told = [*writer.feed(CALL[:60]), *writer.finish()]
    assert [event["type"] for event in (told[0], told[-1])] == ["content_block_start", "content_block_stop"]
    assert told[0]["content_block"]["name"] == "add"
    assert not any(event.get("delta", {}).get("type") == "text_delta" for event in told)


def test_tools_of_agents_have_long_names_and_descriptions() -> None:
    long = {"name": "mcp__" + "n" * 123, "description": "x" * 65_536, "input_schema": {"type": "object"}}
    (found,) = body_of(tools=[long]).prompt().tools
    assert found["function"]["name"] == long["name"]
    for field in ("name", "description"):
        with pytest.raises(ValidationError):
            body_of(tools=[{**long, field: f"{long[field]}x"}])


def test_a_conversation_with_tools_is_what_templates_expect() -> None:
    turns = [
        {"role": "user", "content": "What is 1 + 2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Add.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}, "caller": {"type": "direct"}},
                {"type": "tool_use", "id": "toolu_2", "name": "find", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "3"}]},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True},
                {"type": "text", "text": "Go on."},
            ],
        },
        {"role": "user", "content": "Now."},
        {"role": "assistant", "content": "It is"},
    ]
    body = body_of(messages=turns, system=[{"type": "text", "text": "Be brief."}])
    prompt = body.prompt()
    calls = (ToolCall(id="toolu_1", name="add", arguments={"a": 1}), ToolCall(id="toolu_2", name="find", arguments={}))
    assert prompt.messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="What is 1 + 2?"),
        Message(role="assistant", content="One moment.", reasoning_content="Add.", tool_calls=calls),
        Message(role="tool", content="3", tool_call_id="toolu_1", name="add"),
        Message(role="tool", content="Error: no", tool_call_id="toolu_2", name="find"),
        Message(role="user", content="Go on.\nNow."),
        Message(role="assistant", content="It is"),
    )
    assert prompt.continue_final_message
    assert not prompt.add_generation_prompt
    assert prompt.tools[0] == {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert messages_of("", body.messages)[0].role == "user"


@pytest.mark.parametrize(
    ("choice", "plan"),
    [
        ({"type": "auto"}, ("auto", None, True)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", None, False)),
        ({"type": "tool", "name": "add"}, ("required", "add", True)),
        ({"type": "none"}, ("none", None, True)),
    ],
)
def test_choices_of_tools_are_those_of_every_dialect(choice: Any, plan: Any) -> None:
    body = body_of(tool_choice=choice)
    assert (body.choice, body.named_tool, body.parallel) == plan


def test_thinking_is_the_templates_to_do() -> None:
    kinds = {"adaptive": True, "between_tools": True, "disabled": False}
    for kind, wanted in kinds.items():
        assert body_of(thinking={"type": kind}).prompt().variables == {"enable_thinking": wanted}
    assert body_of().prompt().variables == {"enable_thinking": False}
