"""Calls of tools are found in answers, whole or however cut; what is no call stays text; nothing raises."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference.tools import (
    FORMATS,
    ArgumentsDelta,
    CallBroken,
    CallEnded,
    CallStarted,
    Content,
    Event,
    ToolCallFormat,
    ToolCallStream,
    collect,
    formats_of,
    new_call_id,
    parse,
)
from inference.tools.stream import MAX_BROKEN

pytestmark = pytest.mark.unit

BY_NAME = {each.name: each for each in FORMATS}
NAMES = ("get_weather", "now", "run.code-1")
Calls = list[tuple[str, dict[str, Any]]]


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def tagged(calls: Calls) -> str:
    return "\n".join(
        f"<tool_call>\n{dumped({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    )


def mistral(calls: Calls) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumped(arguments)}" for name, arguments in calls)


def mistral_old(calls: Calls) -> str:
    return "[TOOL_CALLS]" + dumped([{"name": name, "arguments": arguments} for name, arguments in calls])


def qwen_old(calls: Calls) -> str:
    return "\n".join(f"✿FUNCTION✿: {name}\n✿ARGS✿: {dumped(arguments)}" for name, arguments in calls)


def llama3(calls: Calls) -> str:
    return "<|python_tag|>" + "; ".join(dumped({"name": name, "parameters": value}) for name, value in calls)


def bare(calls: Calls) -> str:
    return "\n".join(dumped({"name": name, "arguments": arguments}) for name, arguments in calls)


WRITERS = {
    "chatml": tagged,
    "mistral": mistral,
    "mistral-old": mistral_old,
    "qwen-old": qwen_old,
    "llama3": llama3,
    "json": bare,
}
ONE: Calls = [("get_weather", {"city": "Bonn"})]
NESTED = {"a": {"b": [1, -2.5e3, {"c": [[], {}]}], "d": None}, "e": [True, {"f": '"}]{['}]}
TRICKY = {
    "unicode": "Köln 東京 👍 \u2028",
    "quotes": 'he said "hi"',
    "escapes": "a\\b\\\\ \n\t\x01 \\u0041",
    "braces": "}]{[ </tool_call> [ARGS] ✿ARGS✿ <tool_call> [TOOL_CALLS] ;",
    "": "",
}
SEVERAL: Calls = [("get_weather", NESTED), ("now", {}), ("run.code-1", TRICKY)]


def read(text: str, formats: Sequence[ToolCallFormat] = FORMATS, **options: Any) -> tuple[str, Calls]:
    content, calls = parse(text, formats, rng=random.Random(1), names=NAMES, **options)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def events_of(
    pieces: Sequence[str], formats: Sequence[ToolCallFormat] = FORMATS, *, eager: bool = False
) -> list[Event]:
    stream = ToolCallStream(formats, rng=random.Random(1), names=NAMES, eager=eager)
    return [*(event for piece in pieces for event in stream.feed(piece)), *stream.finish()]


each_format = pytest.mark.parametrize("name", WRITERS)


# Every format


@each_format
@pytest.mark.parametrize("calls", [ONE, [("now", {})], [("now", NESTED)], [("now", TRICKY)], SEVERAL, SEVERAL * 3])
def test_calls_are_read_by_their_own_format_and_by_all_in_turn(name: str, calls: Calls) -> None:
    text = WRITERS[name](calls)
    assert read(text, [BY_NAME[name]]) == ("", calls)
    assert read(text) == ("", calls)
    assert collect(events_of(list(text))) == parse(text, FORMATS, rng=random.Random(1), names=NAMES)


@each_format
def test_text_around_calls_is_the_content(name: str) -> None:
    text = WRITERS[name](ONE)
    assert read(f"{text}\nThat is all.\n") == ("That is all.", ONE)
    if name != "json":  # JSON in the middle of a text is only JSON
        assert read(f"Let me see.\n\n{text}") == ("Let me see.", ONE)
        assert read(f"One {text} two") == ("One  two", ONE)
    else:
        assert read(f"Let me see.\n\n{text}") == (f"Let me see.\n\n{text}", [])


@each_format
def test_calls_may_follow_a_block_of_thinking_and_none_stand_in_it(name: str) -> None:
    text = WRITERS[name](ONE)
    thought = f"<think>\nPerhaps {text}?\n</think>"
    assert read(f"{thought}\n\n{text}") == (thought, ONE)
    assert read(f"\n{thought}") == (f"\n{thought}", [])
    assert read(f"so {text} </think>{text}", is_thinking=True) == (f"so {text} </think>", ONE)
    assert read(f"<think>{text}") == (f"<think>{text}", [])


@each_format
def test_an_answer_that_is_cut_keeps_its_whole_calls_and_the_rest_is_text(name: str) -> None:
    text = WRITERS[name](SEVERAL)
    for length in range(len(text)):
        content, calls = read(text[:length])
        assert calls == SEVERAL[: len(calls)]
        assert length < len(WRITERS[name](SEVERAL[:1])) or calls
        assert content in text
        assert not content.startswith("</tool")


@each_format
def test_without_tools_nothing_is_a_call_and_nothing_is_changed(name: str) -> None:
    text = f" \n<think>x</think> {WRITERS[name](SEVERAL)}\n "
    assert read(text, []) == (text, [])
    assert collect(events_of(list(text), [])) == (text, ())


def broken_texts() -> list[str]:
    bodies = [
        '{"name": "now", "arguments": {"a": }}',
        '{"name": "now", "arguments": {"a": 1,}}',
        '{"name": "now", "arguments": {a: 1}}',
        '{"name": "now", "arguments": {"a": 01}}',
        '{"name": "now", "arguments": {"a": NaN}}',
        '{"name": "now", "arguments": {"a": "\n"}}',
        '{"name": "now", "arguments": {"a": "\\x"}}',
        '{"name": "now", "arguments": {"a": "\\u12g4"}}',
        '{"name": "now", "arguments": {"a": [1}}}',
        '{"name": "now", "arguments": {"a": [1]]}}',
        '{"name": "now" "arguments": {}}',
        '{"name": "now", "arguments": [1]}',
        '{"name": "now", "arguments": "no object"}',
        '{"name": "now", "arguments": "{} and more"}',
        '{"name": "now", "arguments": 3}',
        '{"name": "now", "arguments": {}, "parameters": {}}',
        '{"name": "now", "name": "now", "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "now\\ud83d", "arguments": {}}',
        '{"name": "now\\n", "arguments": {}}',
        f'{{"name": "{"n" * 129}", "arguments": {{}}}}',
        '{"name": "now", "arguments": "{\\"a\\": \\"\\ud83d\\"}"}',
        '{"name": 3, "arguments": {}}',
        '{"name": null, "arguments": {}}',
        '{"arguments": {"a": 1}}',
        '{"name": "now", "arguments": {"a": "cut',
        '{"name": "now", "arguments": {"a": ' + "[" * 100 + "]" * 100 + "}}",
        "not JSON",
        "{}",
        "",
    ]
    tags = [f"<tool_call>{body}</tool_call>" for body in bodies]
    arrays = [f"[TOOL_CALLS][{body}]" for body in bodies]
    arguments = ["{", '{"a" 1}', "[]", "3", "", '"{}"']
    names = [f"[TOOL_CALLS]now[ARGS]{each}" for each in arguments] + [
        f"✿FUNCTION✿: now\n✿ARGS✿: {a}" for a in arguments
    ]
    others = ["[TOOL_CALLS]", "[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS]now {", "✿FUNCTION✿", "✿FUNCTION✿: \n✿ARGS✿: {}"]
    return [*tags, *arrays, *names, *others, *bodies, "<|python_tag|>print(1)", "<tool", "a <", "[1, 2]", "[TOOL", "✿"]


@pytest.mark.parametrize("text", broken_texts())
def test_what_is_no_call_stays_text(text: str) -> None:
    assert read(text) == (text, [])
    assert read(f"Well: {text}") == (f"Well: {text}", [])
    assert collect(events_of(list(text), eager=True)) == (text, ())
    good = f"<tool_call>{dumped({'name': 'now', 'arguments': {}})}</tool_call>"
    if not text.endswith("cut"):
        content, calls = read(f"{text}.\n{good}")
        assert (content.rstrip("\n"), calls) == (f"{text}.", [("now", {})])


def test_forms_that_models_drift_into_are_read() -> None:
    assert read('<tool_call>{"name": "now"}</tool_call>') == ("", [("now", {})])
    assert read('<tool_call>{"name": "now", "arguments": null}</tool_call>') == ("", [("now", {})])
    assert read('<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>') == ("", [("now", {"a": 1})])
    assert read('<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}') == ("", [("now", {"a": 1})])
    assert read('<tool_call>{"name":"now","arguments":{}}') == ("", [("now", {})])
    assert read('[TOOL_CALLS] [{"name":"now","arguments":{},"id":"abc123def"}]') == ("", [("now", {})])
    assert read("[TOOL_CALLS]now[CALL_ID]abc123def[ARGS]{}") == ("", [("now", {})])
    assert read('[TOOL_CALLS]now{"a": 1}') == ("", [("now", {"a": 1})])
    assert read('{"type": "function", "name": "now", "parameters": {}}') == ("", [("now", {})])
    assert read('[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]') == ("", [("now", {})] * 2)
    assert read("✿FUNCTION✿: now\n✿ARGS✿: {}\n✿RESULT✿: ") == ("", [("now", {})])


@pytest.mark.parametrize(
    "text", ['{"name": "Ada", "arguments": {}}', '{"name": "now"}', '{"name": "now", "arguments": {}, "age": 3}']
)
def test_json_alone_is_a_call_only_if_it_can_be_nothing_else(text: str) -> None:
    assert read(text) == (text, [])


def test_json_that_is_no_call_is_let_go_at_its_first_foreign_name() -> None:
    stream = ToolCallStream(FORMATS, rng=random.Random(1), names=NAMES)
    assert stream.feed('{"name": "now", "ar') == []
    assert stream.feed('ea"') == [Content('{"name": "now", "area"')]
    assert stream.feed(": 3") == [Content(": 3")]


def test_blanks_are_kept_where_there_is_no_call() -> None:
    for text in (" ", "\n a\n\n", "a \n", " <", "a  b "):
        assert read(text) == (text, [])


def test_an_answer_full_of_beginnings_is_given_up_on() -> None:
    text = "<tool_call>{" * (MAX_BROKEN + 5) + tagged(ONE)
    assert read(text) == (text, [])
    assert collect(events_of(list(text))) == (text, ())


# Ids


def test_ids_have_the_form_that_the_template_takes_back() -> None:
    for formats, form in ((FORMATS, r"call_[0-9a-f]{8}"), ([BY_NAME["mistral"]], r"[A-Za-z0-9]{9}")):
        text = mistral([("now", {})] * 20)
        _, calls = parse(text, formats, rng=random.Random(3))
        assert len({call.id for call in calls}) == 20
        assert all(re.fullmatch(form, call.id) for call in calls)
    assert new_call_id(random.Random(1)) == new_call_id(random.Random(1)) != new_call_id(random.Random(2))


# In pieces


def test_a_call_is_told_when_it_is_whole() -> None:
    stream = ToolCallStream(FORMATS, rng=random.Random(1), names=NAMES)
    assert stream.feed("Hm. <to") == [Content("Hm.")]
    assert stream.feed('ol_call>{"name": "now", "arguments": {"a": 1}') == []
    started, arguments, ended = stream.feed("}")
    assert isinstance(started, CallStarted)
    assert (started.index, started.name) == (0, "now")
    assert (arguments, ended) == (ArgumentsDelta(0, '{"a": 1}'), CallEnded(0))
    assert stream.num_calls == 1
    assert stream.feed("</tool_") == []
    assert stream.feed("call> More") == [Content("  More")]


def test_an_eager_stream_tells_a_call_while_it_is_written() -> None:
    stream = ToolCallStream(FORMATS, rng=random.Random(1), names=NAMES, eager=True)
    assert stream.feed('<tool_call>{"name": "now", "arg') == []
    started, first = stream.feed('uments": {"a"')
    assert isinstance(started, CallStarted)
    assert first == ArgumentsDelta(0, '{"a"')
    assert stream.feed(': "x') == [ArgumentsDelta(0, ': "x')]
    assert stream.feed('y"}') == [ArgumentsDelta(0, 'y"}')]
    assert stream.feed("}") == [CallEnded(0)]
    assert stream.num_calls == 1


def test_an_eager_stream_takes_back_what_turns_out_to_be_no_call() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": 1'
    events = events_of([text], eager=True)
    assert [type(event) for event in events] == [CallStarted, ArgumentsDelta, CallBroken, Content]
    assert collect(events) == (text, ())


def told(events: Sequence[Event]) -> tuple[str, list[tuple[str, str]]]:
    """What is told, but for the ids: an eager stream gives one to a call that is none."""
    content, calls = collect(events)
    return content, [(call.name, call.arguments) for call in calls]


FRAGMENTS = st.sampled_from(
    [
        *(write(calls) for write in WRITERS.values() for calls in (ONE, SEVERAL)),
        *broken_texts(),
        "<think>", "</think>", "Hello ", "\n", "; ", " ", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]",
        "✿FUNCTION✿: now", "✿ARGS✿:", "✿RESULT✿", "<|python_tag|>", "{", "}", "[", '"', "\\", "now", ",",
    ]
)  # fmt: skip


@settings(deadline=None, max_examples=250)
@given(
    fragments=st.lists(FRAGMENTS, max_size=5),
    cuts=st.sets(st.integers(0, 600), max_size=12),
    end=st.integers(0, 600),
    names=st.sampled_from([[each] for each in FORMATS] + [list(FORMATS), list(FORMATS[::-1])]),
)
@example(fragments=["Hello ", tagged(SEVERAL), "\n"], cuts=set(), end=600, names=list(FORMATS))
def test_cuts_change_nothing(fragments: list[str], cuts: set[int], end: int, names: list[ToolCallFormat]) -> None:
    text = "".join(fragments)[:end] if end < 500 else "".join(fragments)
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[start:stop] for start, stop in pairwise(places)]
    whole = events_of([text], names)
    for way in (pieces, list(text)):
        assert collect(events_of(way, names)) == collect(whole)
        assert told(events_of(way, names, eager=True)) == told(whole)
    content, calls = collect(whole)
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
    rest = iter(text)
    assert all(character in rest for character in content)  # in their order, and none invented


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(arguments=st.dictionaries(st.text(), VALUES, max_size=4), name=st.sampled_from(sorted(WRITERS)))
def test_whatever_the_arguments_are_they_come_back(arguments: dict[str, Any], name: str) -> None:
    text = WRITERS[name]([("now", arguments), ("now", {})])
    assert read(text) == ("", [("now", arguments), ("now", {})])
    assert told(events_of(list(text), eager=True))[1][0] == ("now", dumped(arguments))


@settings(deadline=None, max_examples=150)
@given(text=st.text(alphabet='<>[]{}":,;\\ atool_cTOOL_CALLS✿1eE+-.\n'))
def test_any_text_is_read(text: str) -> None:
    assert collect(events_of(list(text))) == collect(events_of([text]))


# Which formats


@pytest.mark.parametrize(
    ("template", "first"),
    [
        ("{{ '<tool_call>' }}", "chatml"),
        ("[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}", "mistral"),
        ("[TOOL_CALLS] [", "mistral-old"),
        ("✿FUNCTION✿: ", "qwen-old"),
        ('{"name": "x", "parameters": {{ p }}}', "llama3"),
        ("<|python_tag|>", "llama3"),
    ],
)
def test_a_template_says_how_its_model_calls(template: str, first: str) -> None:
    assert formats_of(template)[0].name == first


@pytest.mark.parametrize("template", [None, "", "{{ messages }}"])
def test_a_template_that_says_nothing_leaves_all_to_be_tried(template: str | None) -> None:
    assert formats_of(template) == FORMATS
