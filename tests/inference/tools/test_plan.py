"""What a request's tools and its tool_choice make of prompt, grammar and reader, and what is refused with its place."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from accounts.trail.refusals import Refusal
from inference.chat.prompt import ChatTemplate
from inference.structured import EitherForm, JsonForm, validate
from inference.tools import FORMATS, ToolPlan, plan_tools
from tests.structured.derivations import Matcher, Sampler

pytestmark = pytest.mark.unit


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


WEATHER = tool("get_weather", city={"type": "string"})
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]


def template(source: str, *, has_tools: bool = True) -> ChatTemplate:
    return ChatTemplate(
        source=source, digest="", has_system=True, has_tools=has_tools, has_tool_calls=has_tools, has_thinking=False
    )


QWEN = template("<tool_call>")
SILENT = template("{{ messages }}", has_tools=False)
CHATML_CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
CALLS = {
    "<tool_call>": CHATML_CALL,
    "[TOOL_CALLS][ARGS]": "[TOOL_CALLS]now[ARGS]{}",
    "[TOOL_CALLS]": '[TOOL_CALLS][{"name": "now", "arguments": {}}]',
    "✿FUNCTION✿": "✿FUNCTION✿: now\n✿ARGS✿: {}",
    "<|python_tag|>": '{"name": "now", "parameters": {}}',
}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_tools_are_shown_and_their_calls_are_read(choice: str) -> None:
    plan = plan_tools(QWEN, TOOLS, choice)
    assert plan.prompt_tools == tuple(TOOLS)
    assert plan.names == {"get_weather", "now"}
    assert plan.is_forced is (choice == "required")
    content, calls = plan.read(f"So.\n{CHATML_CALL}", rng=random.Random(1))
    assert (content, [(call.name, call.arguments) for call in calls]) == ("So.", [("now", "{}")])


@pytest.mark.parametrize(("tools", "choice"), [([], "auto"), ([], "none"), (TOOLS, "none")])
def test_without_tools_or_with_none_nothing_is_shown_forced_or_read(tools: list[Any], choice: str) -> None:
    plan = plan_tools(QWEN, tools, choice)
    assert plan == ToolPlan()
    assert plan.read(CHATML_CALL, rng=random.Random(1)) == (CHATML_CALL, ())
    assert plan.shown_texts == ()


@pytest.mark.parametrize(("source", "call"), CALLS.items())
def test_a_forced_call_has_the_form_of_the_template_and_is_read_again(source: str, call: str) -> None:
    plan = plan_tools(template(source), TOOLS, "required", parallel=False)
    assert plan.grammar is not None
    validate(plan.grammar)
    assert Matcher(plan.grammar).matches(call)
    sampler = Sampler(plan.grammar, seed=1)
    for _ in range(50):
        text = sampler.text()
        content, calls = plan.read(text, rng=random.Random(1))
        assert (content, len(calls)) == ("", 1), text
        assert set(json.loads(calls[0].arguments)) == ({"city"} if calls[0].name == "get_weather" else set())


def test_a_template_without_tools_is_asked_for_tagged_calls() -> None:
    for silent in (SILENT, None):
        plan = plan_tools(silent, TOOLS, name="now", parallel=False)
        assert plan.grammar is not None
        assert Matcher(plan.grammar).matches(CHATML_CALL)
        assert set(plan.formats) == set(FORMATS)


def test_a_named_tool_is_the_only_one_that_can_be_called() -> None:
    for choice in ("auto", "none", "required"):
        plan = plan_tools(QWEN, TOOLS, choice, name="now")
        assert plan.grammar is not None
        assert "get_weather" not in plan.grammar


def test_several_calls_only_if_the_request_takes_them() -> None:
    two = f"{CHATML_CALL}\n{CHATML_CALL}"
    for parallel in (True, False):
        plan = plan_tools(QWEN, TOOLS, "required", parallel=parallel)
        assert plan.grammar is not None
        assert Matcher(plan.grammar).matches(two) is parallel


@pytest.mark.parametrize(("source", "call"), CALLS.items())
def test_beside_an_answer_in_a_schema_a_call_stays_possible_and_is_read_again(source: str, call: str) -> None:
    answer = JsonForm(b'{"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}')
    plan = plan_tools(template(source), TOOLS, "auto", parallel=False, answer=answer)
    assert isinstance(plan.form, EitherForm)
    assert plan.grammar is not None
    assert not plan.is_forced
    matcher = Matcher(plan.grammar)
    assert matcher.matches(call)
    assert matcher.matches('{"sum": 4}')
    assert not matcher.matches("It is 4.")
    _, calls = plan.read(call, rng=random.Random(1))
    assert [each.name for each in calls] == ["now"]
    assert plan.read('{"sum": 4}', rng=random.Random(1)) == ('{"sum": 4}', ())
    forced = plan_tools(template(source), TOOLS, "required", parallel=False, answer=answer)
    assert forced == plan_tools(template(source), TOOLS, "required", parallel=False)
    assert plan_tools(template(source), TOOLS, "none", answer=answer) == ToolPlan()


def test_marks_that_may_be_control_tokens_are_named() -> None:
    assert plan_tools(QWEN, TOOLS).shown_texts == ("<tool_call>", "</tool_call>")
    assert "[TOOL_CALLS]" in plan_tools(template("[TOOL_CALLS]"), TOOLS).shown_texts
    assert "<|python_tag|>" in plan_tools(SILENT, TOOLS).shown_texts


def test_calls_are_told_eagerly_where_a_grammar_makes_them_whole() -> None:
    start = '<tool_call>{"name": "now", "arguments": {"a'
    assert len(plan_tools(QWEN, TOOLS, "required").stream(rng=random.Random(1)).feed(start)) == 2
    assert plan_tools(QWEN, TOOLS).stream(rng=random.Random(1)).feed(start) == []
    assert len(plan_tools(QWEN, TOOLS).stream(rng=random.Random(1), eager=True).feed(start)) == 2


# Refused


@pytest.mark.parametrize(
    ("tools", "options", "code", "said"),
    [
        ([], {"choice": "required"}, "bad_request", "there are no tools"),
        ([], {"name": "now"}, "bad_request", "there are no tools"),
        (TOOLS, {"name": "later"}, "bad_request", "'later'"),
        (TOOLS, {"choice": "perhaps"}, "bad_request", "one of none, auto, required"),
        ([*TOOLS, tool("f", a={"not": {}})], {"choice": "required"}, "invalid_schema",
         "Field 'tools': tool 'f', at parameters/properties/a/not: "),
        ([NOW, NOW], {"choice": "required"}, "invalid_schema", "two tools named 'now'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_place(tools: list[Any], options: Any, code: str, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        plan_tools(QWEN, tools, **options)
    assert refused.value.code == code
    assert said in refused.value.message


def test_a_refused_schema_names_tool_and_path_for_programs() -> None:
    with pytest.raises(Refusal) as refused:
        plan_tools(QWEN, [NOW, tool("f", a={"type": "strange"})], "required")
    extra = refused.value.extra
    assert (extra["field"], extra["tool"], extra["path"]) == ("tools", "f", "/1/function/parameters/properties/a/type")


def test_a_schema_that_no_grammar_can_keep_is_no_matter_where_nothing_is_forced() -> None:
    assert plan_tools(QWEN, [tool("f", a={"not": {}})]).grammar is None
