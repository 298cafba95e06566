"""What a response makes of an answer's text: items in their order; the same whole or event by event."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.trail.refusals import Refusal
from inference.api.errors import OPENAI_RESPONSES
from inference.api.following import Collected, Ending
from inference.api.openai.replies import Tally
from inference.api.openai.response_frames import ResponseFrames
from inference.api.openai.response_items import StoredItems, messages_of
from inference.api.openai.response_output import AskedResponse, OutputWriter
from inference.api.openai.response_schemas import ResponsesBody
from inference.engine.types import TokenProbs
from inference.tools import plan_tools
from tests.inference.api.test_openai_answers import CALL, OTHER_CALL

pytestmark = pytest.mark.unit
SERVED: Any = SimpleNamespace(name="m", digest="d" * 64)
TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("add", "find")]


def test_a_forced_call_is_told_as_it_is_written() -> None:
    text, form = f"{CALL}\n{OTHER_CALL}", asked(tool_choice="required")
    whole = form.reply([Collected(text, Ending("eos"))], Tally())["output"]
    writer = OutputWriter(form)
    events = [event for character in text for event in writer.write(character)] + writer.end(Ending("eos"))
    assert writer.items == whole
    for place, item in enumerate(whole):
        mine = [event for event in events if event.get("output_index") == place]
        kinds = [event["type"].removeprefix("response.") for event in mine]
        deltas = [event["delta"] for event in mine if event["type"].endswith("arguments.delta")]
        assert kinds[0] == "output_item.added"
        assert kinds[-2:] == ["function_call_arguments.done", "output_item.done"]
        assert "".join(deltas) == item["arguments"] == mine[-2]["arguments"]
        assert len(deltas) > len(item["arguments"]) / 2


def test_a_forced_call_that_was_cut_is_incomplete() -> None:
    (item,) = asked(tool_choice="required").reply([Collected(CALL[:60], Ending("length"))], Tally())["output"]
    assert (item["type"], item["status"], item["name"]) == ("function_call", "incomplete", "add")
    assert '{"a": {"b": [1, 2]}, "c": "}"}'.startswith(item["arguments"])


def asked(**fields: Any) -> AskedResponse:
    body = ResponsesBody.model_validate({"input": "x", "tools": TOOLS, **fields})
    prompt = body.chat_prompt(messages_of(body.input or (), body.instructions))
    plan = plan_tools(None, prompt.tools, body.choice, name=body.named_tool)
    return AskedResponse(
        request_id="r", served=SERVED, model="m", body=body, prompt=prompt, plan=plan, items=(), keeps=False
    )


def output_of(text: str, reason: str = "eos") -> list[dict[str, Any]]:
    response = asked().reply([Collected(text, Ending(reason))], Tally())
    output: list[dict[str, Any]] = response["output"]
    return output


def added_up(pieces: list[str]) -> list[dict[str, Any]]:
    """The items of a stream, made of its events alone, as a client does."""
    writer = OutputWriter(asked())
    events = [event for piece in pieces for event in writer.write(piece)] + writer.end(Ending("eos"))
    items: list[dict[str, Any]] = []
    for event in events:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items)
                items.append({**event["item"]})
            case "content_part.added":
                items[event["output_index"]]["content"] = [{**event["part"]}]
            case "output_text.delta" | "reasoning_text.delta":
                items[event["output_index"]]["content"][0]["text"] += event["delta"]
            case "function_call_arguments.delta":
                items[event["output_index"]]["arguments"] += event["delta"]
            case "output_item.done":
                assert event["item"] == items[event["output_index"]] | {"status": event["item"]["status"]}
                items[event["output_index"]] = event["item"]
    assert items == writer.items
    return items


def without_ids(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "call_id": ""} for item in items]


def test_items_come_in_the_order_in_which_they_are_said() -> None:
    items = output_of(f"<think>Add.</think>\nOne moment.\n{CALL}\nAnd\n{OTHER_CALL}")
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "message", "function_call"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Add."}]
    assert items[1]["content"][0]["text"] == "One moment."
    assert (items[2]["name"], items[4]["name"]) == ("add", "find")
    assert items[2]["call_id"] != items[4]["call_id"]
    assert len({item["id"] for item in items}) == 5
    assert [item["id"].split("_")[0] for item in items] == ["rs", "msg", "fc", "msg", "fc"]
    assert {item["status"] for item in items} == {"completed"}


def test_what_an_answer_was_cut_in_is_incomplete() -> None:
    items = output_of("<think>Add.</think>One mo", "length")
    assert [item["status"] for item in items] == ["completed", "incomplete"]


def test_an_answer_without_a_word_is_an_empty_message() -> None:
    (item,) = output_of("")
    assert (item["type"], item["content"][0]["text"], item["status"]) == ("message", "", "completed")


@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", " ", "\n", "a😀é", CALL, OTHER_CALL, CALL[:30], "<tool", "{", '"']),
        max_size=6,
    ),
    st.integers(1, 9),
)
def test_events_add_up_to_the_whole_answer(parts: list[str], size: int) -> None:
    text = "".join(parts)
    whole = without_ids(output_of(text))
    assert without_ids(added_up([text[at : at + size] for at in range(0, len(text), size)])) == whole


@given(st.lists(st.sampled_from(["a😀é", CALL, "\n", OTHER_CALL]), max_size=4))
def test_an_answer_is_taken_back_as_input(parts: list[str]) -> None:
    """Its text and its calls are one turn of the assistant."""
    items = output_of("<think>Hm.</think>" + "".join(parts))
    messages = messages_of(StoredItems.model_validate({"items": items}).items, None)
    (message,) = messages
    assert message.role == "assistant"
    assert message.reasoning_content == "Hm."
    assert len(message.tool_calls or ()) == sum(item["type"] == "function_call" for item in items)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_probabilities_are_those_of_the_text_and_not_of_the_thoughts(size: int) -> None:
    pieces = ["<think>", "Yes", ".", "</think>", "\n", "Yes", " it is"]
    writer = OutputWriter(asked(tools=None, include=["message.output_text.logprobs"]))
    for start in range(0, len(pieces), size):
        some = pieces[start : start + size]
        writer.write("".join(some), [TokenProbs(1, -0.5, piece.encode()) for piece in some])
    writer.end(Ending("eos"))
    thought, message = writer.items
    assert [part["text"] for part in (*thought["content"], *message["content"])] == ["Yes.", "Yes it is"]
    assert [each["token"] for each in message["content"][0]["logprobs"]] == ["Yes", " it is"]


def test_what_fails_says_so_in_its_last_event() -> None:
    codes: list[str] = []
    frames = ResponseFrames(asked(), OPENAI_RESPONSES, on_error=codes.append)
    said = frames.error(Refusal("worker_lost", "The worker died during this request; nothing is charged."))
    assert said.count(b"event: ") == 3, "created and in progress before it"
    assert b"event: response.failed" in said
    assert b'"code":"worker_lost"' in said
    assert codes == ["worker_lost"]


def test_thoughts_and_calls_are_part_of_the_turn_behind_them() -> None:
    body = ResponsesBody.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "system", "content": "And kind."},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "Hm"}],
                },
                {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 1}'},
                {"type": "function_call", "call_id": "2", "name": "find", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "two"},
                {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "it"}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                {"role": "user", "content": "c"},
            ],
        }
    )
    system, first, calls, *rest = messages_of(body.input or (), body.instructions)
    assert system.content == "Be brief.\n\nAnd kind."
    assert first.content == "a\nb"
    assert (calls.role, calls.content) == ("assistant", None)
    assert calls.role == "assistant"
    assert [(call.id, call.function.name) for call in calls.tool_calls or ()] == [("1", "add"), ("2", "find")]
    assert calls.reasoning_content == "Hm"
    assert [(each.role, each.content) for each in rest] == [
        ("tool", "two"),
        ("tool", "it"),
        ("assistant", "No."),
        ("user", "c"),
    ]
