"""A forced answer ends within the tokens that it may have, for schemas of every kind; thoughts before it, too."""

from __future__ import annotations

import json

import jsonschema
import pytest

from inference.structured import (
    GENERATED_LIMITS,
    CallsForm,
    EitherForm,
    Form,
    JsonForm,
    SchemaError,
    behind_thoughts,
    fit,
    string_forms,
    thought_overhead,
    validate,
    widest,
)
from inference.structured.json_schema import Bounds, schema_piece
from inference.structured.pieces import Rules
from tests.structured.derivations import Matcher, Sampler
from tests.structured.tool_corpus import TOOLS, tool

pytestmark = pytest.mark.unit

NUM_TOKENS = 383
JSON_FORMS = {name: JsonForm(json.dumps(schema).encode()) for name, (_, schema) in TOOLS.items()}
TEXT = JsonForm(b'{"type": "string"}')


def calls_of(*names: str, tool_name: str | None = None, parallel: bool = False) -> CallsForm:
    return CallsForm(json.dumps([tool(name) for name in names]).encode(), tool_name, parallel, "chatml")


@pytest.mark.parametrize("name", TOOLS)
def test_no_answer_and_no_call_is_longer_than_the_tokens_it_may_have(name: str) -> None:
    """A token has at least a byte."""
    compiled = fit(JSON_FORMS[name], NUM_TOKENS)
    assert compiled.num_bytes <= NUM_TOKENS
    assert fit(calls_of(name, parallel=True), NUM_TOKENS).num_bytes <= NUM_TOKENS
    sampler = Sampler(compiled.grammar, seed=5)
    for _ in range(30):
        text = sampler.text()
        assert len(text.encode()) <= compiled.num_bytes
        jsonschema.validate(json.loads(text), TOOLS[name][1])


@pytest.mark.parametrize("name", TOOLS)
def test_a_shortest_answer_is_one(name: str) -> None:
    compiled = fit(JSON_FORMS[name], 1)
    assert compiled.shortest is not None
    assert Matcher(compiled.grammar).matches(compiled.shortest)
    jsonschema.validate(json.loads(compiled.shortest), TOOLS[name][1])
    sampler = Sampler(compiled.grammar, seed=6)
    assert all(len(sampler.text()) >= len(compiled.shortest) for _ in range(30))


@pytest.mark.parametrize("num_tokens", [20, 50, 130])
def test_a_string_has_as_many_bytes_as_there_is_room_for_whatever_it_is_written_in(num_tokens: int) -> None:
    compiled = fit(TEXT, num_tokens)
    room = compiled.num_bytes - 2
    assert num_tokens / 2 <= compiled.num_bytes <= num_tokens
    matcher = Matcher(compiled.grammar)
    for char in ("a", "é", "漢", "🦉", "\\n"):
        number = room // len(char.encode())
        assert matcher.matches(f'"{char * number}"')
        assert not matcher.matches(f'"{char * (number + 1)}"')
    assert matcher.matches('"aé漢🦉\\n"')


def test_where_there_is_room_nothing_is_narrowed() -> None:
    assert fit(TEXT, 10_000) == widest(TEXT)


def test_fewer_calls_come_before_narrower_ones() -> None:
    form = calls_of("now", parallel=True)
    one, eight = fit(calls_of("now"), 10_000).num_bytes, widest(form).num_bytes
    assert one < fit(form, 2 * one + 10).num_bytes <= 2 * one + 10 < eight
    assert fit(form, eight).num_bytes == eight


def test_what_must_be_long_is_counted_as_models_write_it_and_then_left_to_its_luck() -> None:
    """Two bytes a token, before strings are cut to a few letters."""
    names = [f"a_rather_long_name_of_a_property_{number}" for number in range(4)]
    properties = {name: {"type": "string"} for name in names}
    form = JsonForm(json.dumps({"type": "object", "properties": properties, "required": names}).encode())
    least = len(fit(form, 1).shortest or "")
    assert 150 < least < 200
    assert 180 < fit(form, 180).num_bytes <= 360
    assert fit(form, 20).num_bytes > 40


@pytest.mark.parametrize("name", TOOLS)
def test_more_tokens_never_narrow_an_answer(name: str) -> None:
    widths = [fit(JSON_FORMS[name], num_tokens).num_bytes for num_tokens in range(8, 400, 4)]
    assert widths == sorted(widths)


def test_a_bad_schema_is_refused() -> None:
    for form in (
        JsonForm(b'{"not": {}}'),
        CallsForm(b'[{"name": "f", "parameters": {"not": {}}}]', None, True, "json"),
    ):
        with pytest.raises(SchemaError, match="not"):
            widest(form)


# Calls or an answer


@pytest.mark.parametrize("name", TOOLS)
def test_where_a_call_may_be_an_answer_both_are_within_the_tokens(name: str) -> None:
    form = EitherForm(calls_of(*dict.fromkeys((name, "now")), parallel=True), JSON_FORMS["get_weather"])
    compiled = fit(form, NUM_TOKENS)
    validate(compiled.grammar, GENERATED_LIMITS)
    assert compiled.num_bytes <= NUM_TOKENS
    sampler, seen = Sampler(compiled.grammar, seed=9), set()
    for _ in range(60):
        text = sampler.text()
        assert len(text.encode()) <= compiled.num_bytes
        seen.add(text.startswith("<tool_call>"))
        if not text.startswith("<tool_call>"):
            jsonschema.validate(json.loads(text), TOOLS["get_weather"][1])
    assert seen == {True, False}


def test_long_calls_shorten_no_answer() -> None:
    answer = JsonForm(b'{"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}')
    properties = {f"field_{number}": {"type": "string"} for number in range(6)}
    long = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    compiled = fit(EitherForm(CallsForm(json.dumps([long]).encode(), None, True, "chatml"), answer), NUM_TOKENS)
    assert compiled.num_bytes <= NUM_TOKENS
    assert Matcher(compiled.grammar).matches(json.dumps({"text": "a" * 80}))


def test_strings_of_one_length_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools of agents have hundreds of them, and each byte of one is a rule."""
    made: list[int] = []
    counted = string_forms.at_most
    monkeypatch.setattr(
        string_forms, "at_most", lambda rules, widths, number: made.append(number) or counted(rules, widths, number)
    )
    properties = {f"field_{number}": {"type": "string"} for number in range(20)}
    rules = Rules()
    schema_piece(rules, {"type": "object", "properties": properties}, Bounds(strict=True))
    assert made == [256]


def test_a_tool_that_no_grammar_can_keep_may_be_called_with_any_object_where_nothing_is_forced() -> None:
    odd = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = [tool("now"), {"type": "function", "function": {"name": "odd", "parameters": odd}}]
    either = EitherForm(CallsForm(json.dumps(tools).encode(), None, False, "chatml"), TEXT)
    matcher = Matcher(widest(either).grammar)
    assert matcher.matches('<tool_call>{"name": "odd", "arguments": {"b": [1, {}]}}</tool_call>')
    assert matcher.matches('<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    assert not matcher.matches('<tool_call>{"name": "now", "arguments": {"b": 1}}</tool_call>')
    with pytest.raises(SchemaError, match="not"):
        widest(either.calls)


def test_a_tool_whose_arguments_do_not_fit_is_not_widened_for_it() -> None:
    long = {"type": "object", "properties": {"a": {"const": "x" * 400}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "long", "parameters": long}}]
    compiled = fit(EitherForm(CallsForm(json.dumps(tools).encode(), None, False, "chatml"), TEXT), 50)
    assert not Matcher(compiled.grammar).matches('<tool_call>{"name": "long", "arguments": {}}</tool_call>')


# Thoughts


@pytest.mark.parametrize("end", ["</think>", "[/THINK]", "</seed:think>"])
@pytest.mark.parametrize("num_bytes", [0, 1, 100, 127, 128, 1000])
def test_thoughts_are_bounded_and_the_first_tag_ends_them(end: str, num_bytes: int) -> None:
    form: Form = JSON_FORMS["get_weather"]
    compiled = fit(form, 200)
    grammar = behind_thoughts(compiled.grammar, end, num_bytes)
    validate(grammar, GENERATED_LIMITS)
    sampler, answer = Sampler(grammar, seed=7), Matcher(compiled.grammar)
    for _ in range(20):
        text = sampler.text()
        assert len(text.encode()) <= num_bytes + thought_overhead(end) + compiled.num_bytes
        thought, _, rest = text.partition(end)
        assert len(thought.encode()) <= num_bytes
        assert answer.matches(rest.lstrip("\n"))
    matcher, said = Matcher(grammar), f'{end}\n\n{{"city": "Bonn"}}'
    assert matcher.matches(said)
    assert matcher.matches("x" * max(num_bytes - 127, min(num_bytes, 127)) + said)
    assert not matcher.matches("x" * (num_bytes + 1) + said)
    assert matcher.matches(f"a {end[0]} b 🦉\n" + said) is (num_bytes >= 12)
    assert not matcher.matches(f"x{end[0]}{said}")
