"""Forced tool calls are well-formed in every notation, name a tool that exists, and carry valid arguments."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from inference.structured import TOOL_CALL_FORMATS, SchemaError
from tests.structured.compiling import compile_calls
from tests.structured.corpus import EXAMPLES
from tests.structured.derivations import Matcher, Sampler

pytestmark = pytest.mark.unit

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer", "minimum": 1}},
            "required": ["city"],
        },
    },
}
NOW = {"name": "now"}
TOOLS = [WEATHER, NOW]
SCHEMAS: dict[str, Any] = {
    "get_weather": WEATHER["function"]["parameters"],  # type: ignore[index]
    "now": {"type": "object", "maxProperties": 0},
}
CALL = {
    "chatml": re.compile(r"<tool_call>\s*(?P<call>\{.*?\})\s*</tool_call>(?:\n|$)", re.DOTALL),
    "json": re.compile(r"(?P<call>\{.*?\})(?:\n|$)"),
    "mistral": re.compile(r"\[TOOL_CALLS\](?P<name>[\w.-]+)\[ARGS\](?P<arguments>.*?)(?=\[TOOL_CALLS\]|$)"),
    "qwen-old": re.compile(r"✿FUNCTION✿: (?P<name>[\w.-]+)\n✿ARGS✿: (?P<arguments>.*?)(?:\n|$)"),
}


def read(text: str, notation: str) -> list[tuple[str, Any]]:
    """The calls of a text, all of which must be calls."""
    if notation == "mistral-old":
        calls = json.loads(text.removeprefix("[TOOL_CALLS]"))
        return [(call["name"], call["arguments"]) for call in calls]
    if notation == "llama3":
        calls = json.loads("[" + text.replace('}; {"name', '},{"name') + "]")
        return [(call["name"], call["parameters"]) for call in calls]
    found = list(CALL[notation].finditer(text))
    assert "".join(match[0] for match in found) == text
    if "call" in CALL[notation].groupindex:
        calls = [json.loads(match["call"]) for match in found]
        assert all(set(call) == {"name", "arguments"} for call in calls)
        return [(call["name"], call["arguments"]) for call in calls]
    return [(match["name"], json.loads(match["arguments"])) for match in found]


@pytest.mark.parametrize("parallel", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("notation", TOOL_CALL_FORMATS)
def test_every_text_is_calls_with_valid_arguments(notation: str, parallel: bool) -> None:
    compiled = compile_calls(TOOLS, None, parallel, notation)
    sampler = Sampler(compiled.grammar, seed=4)
    counts, names = set(), set()
    for _ in range(200):
        text = sampler.text()
        if any(mark in text[20:] for mark in ('"}', "}<", "]]")) and _is_torn(text, notation):
            continue
        calls = read(text, notation)
        counts.add(len(calls))
        for name, arguments in calls:
            names.add(name)
            jsonschema.validate(arguments, SCHEMAS[name])
        assert len(text) <= compiled.max_length
    assert names == {"get_weather", "now"}
    assert (max(counts) > 1) is parallel


def _is_torn(text: str, notation: str) -> bool:
    """Whether a string holds what the simple reader of this test takes for the end of a call."""
    inner = re.findall(r'"city": ?"((?:[^"\\]|\\.)*)"', text)
    return any(set(city) & set("}[];<✿") for city in inner)


def test_a_named_tool_is_the_only_one() -> None:
    matcher = Matcher(compile_calls(TOOLS, "now", False, "mistral").grammar)
    assert matcher.matches("[TOOL_CALLS]now[ARGS]{}")
    assert not matcher.matches('[TOOL_CALLS]get_weather[ARGS]{"city": "Bonn"}')
    assert not matcher.matches("[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}")


def test_the_usual_texts_of_models_are_accepted() -> None:
    call = '{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}'
    assert Matcher(compile_calls(TOOLS).grammar).matches(f"<tool_call>\n{call}\n</tool_call>")
    assert Matcher(compile_calls(TOOLS, parallel=True).grammar).matches(
        f"<tool_call>{call}</tool_call>\n<tool_call>{call}</tool_call>"
    )
    assert Matcher(compile_calls(TOOLS, format="json").grammar).matches(call)
    assert Matcher(compile_calls(TOOLS, format="mistral-old").grammar).matches(f"[TOOL_CALLS][{call}]")


def test_tools_of_both_dialects_and_all_object_schemas_are_taken() -> None:
    objects = [example.schema for example in EXAMPLES if example.schema.get("type") == "object"]
    tools = [{"name": f"tool_{i}", "input_schema": schema} for i, schema in enumerate(objects)]
    sampler = Sampler(compile_calls(tools, format="mistral-old").grammar, seed=6)
    for _ in range(200):
        call = json.loads(sampler.text().removeprefix("[TOOL_CALLS]"))[0]
        jsonschema.validate(call["arguments"], objects[int(call["name"].removeprefix("tool_"))])


@pytest.mark.parametrize(
    ("tools", "pointer"),
    [
        ([], ""),
        ([{}], "/0/name"),
        ([{"name": "a b"}], "/0/name"),
        ([{"name": 'a"'}], "/0/name"),
        ([NOW, NOW], "/1/name"),
        (["now"], "/0/name"),
        ([NOW, {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
         "/1/function/parameters/type"),
        ([{"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}], "/0/parameters/properties/a/not"),
        ([{"name": "f", "parameters": "text"}], "/0/parameters"),
    ],
)  # fmt: skip
def test_bad_tools_are_refused_with_their_place(tools: list[Any], pointer: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        compile_calls(tools)
    assert refusal.value.pointer == pointer


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SchemaError, match="no tool named 'later'"):
        compile_calls(TOOLS, "later")
    with pytest.raises(ValueError, match="unknown tool call format"):
        compile_calls(TOOLS, format="xml")
