"""Schemas become grammars whose texts are valid, judged by the independent jsonschema package, and that have an end."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.structured import JsonForm, SchemaError, fit
from inference.structured.json_schema import Bounds
from tests.structured.compiling import compile_schema, to_grammar
from tests.structured.corpus import BASED, EXAMPLES, EXPRESSION, LINKED, ORDER, PERSON, PHONE, SHAPE, TREE, Example
from tests.structured.derivations import Matcher, Sampler

pytestmark = pytest.mark.unit

NAMES = [example.name for example in EXAMPLES]
CHECKER = jsonschema.Draft202012Validator.FORMAT_CHECKER


def usual_texts(value: Any) -> list[str]:
    """A value as json.dumps writes it, and without spaces."""
    return [json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, separators=(",", ":"))]


def assert_valid(schema: Any, texts: list[str]) -> None:
    validator = jsonschema.Draft202012Validator(_without_old_tuples(schema), format_checker=CHECKER)
    for text in texts:
        errors = list(validator.iter_errors(json.loads(text)))
        assert not errors, (text, errors)


def _without_old_tuples(schema: Any) -> Any:
    """The same schema in the newest draft, which the validator speaks."""
    if isinstance(schema.get("items"), list):
        rest = {key: value for key, value in schema.items() if key not in {"items", "additionalItems"}}
        return {**rest, "prefixItems": schema["items"], "items": schema.get("additionalItems", True)}
    return schema


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_every_text_of_the_grammar_is_valid(example: Example) -> None:
    compiled = compile_schema(example.schema)
    sampler = Sampler(compiled.grammar, seed=7)
    texts = [sampler.text() for _ in range(200)]
    assert_valid(example.schema, texts)
    assert max(map(len, texts)) <= compiled.max_length


@pytest.mark.parametrize("example", EXAMPLES, ids=NAMES)
def test_known_valid_values_are_accepted_and_others_are_not(example: Example) -> None:
    matcher = Matcher(to_grammar(example.schema))
    assert all(matcher.matches(text) for value in example.good for text in usual_texts(value))
    assert not any(matcher.matches(text) for value in example.bad for text in usual_texts(value))


def test_the_corpus_is_large_enough_to_mean_something() -> None:
    assert len(EXAMPLES) >= 25
    rich = [PERSON, TREE, ORDER, LINKED, BASED, EXPRESSION, SHAPE, {"type": "object"}, PHONE, {"type": "number"}]
    assert all(_num_texts(schema) > 1_000 for schema in rich)


def _num_texts(schema: dict[str, Any]) -> int:
    sampler = Sampler(to_grammar(schema), seed=3)
    texts: set[str] = set()
    for _ in range(10_000):
        texts.add(sampler.text())
        if len(texts) > 1_000:
            break
    return len(texts)


def test_any_object_is_an_object_of_bounded_depth() -> None:
    grammar = to_grammar({"type": "object"}, Bounds(max_depth=1))
    matcher, sampler = Matcher(grammar), Sampler(grammar, seed=5)
    assert all(isinstance(json.loads(sampler.text()), dict) for _ in range(200))
    assert matcher.matches('{"a": [1, -2.5e3, "x"], "b": {"c": null}}')
    assert not matcher.matches('{"a": [[1]]}')
    assert not matcher.matches("[]")


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**6), 10**6), st.integers(0, 10**6), st.integers(-(10**6), 2 * 10**6))
def test_integer_ranges_are_exact(low: int, width: int, value: int) -> None:
    high = low + width
    matcher = Matcher(to_grammar({"type": "integer", "minimum": low, "maximum": high}))
    for number in {value, low, high, low - 1, high + 1, low // 10, high // 10, (low + high) // 2}:
        assert matcher.matches(str(number)) is (low <= number <= high), number


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_number_ranges_hold_what_they_should_and_nothing_else(data: st.DataObject) -> None:
    hundredths = st.integers(-30_000, 30_000)
    low, high = sorted([data.draw(hundredths), data.draw(hundredths)])
    low_open, high_open = data.draw(st.booleans()), data.draw(st.booleans())
    schema: dict[str, Any] = {"type": "number"}
    schema["exclusiveMinimum" if low_open else "minimum"] = low / 100
    schema["exclusiveMaximum" if high_open else "maximum"] = high / 100
    values = [low, high, low + 1, high - 1, (low + high) // 2, low - 1, high + 1, 0]
    inside = [v for v in values if (low < v if low_open else low <= v) and (v < high if high_open else v <= high)]
    try:
        grammar = to_grammar(schema)
    except SchemaError as error:
        assert error.code == "unsatisfiable"
        assert not inside
        return
    matcher, sampler = Matcher(grammar), Sampler(grammar, seed=1)
    assert_valid(schema, [sampler.text() for _ in range(50)])
    for value in values:
        assert matcher.matches(_short(value)) is (value in inside), value


def _short(hundredths: int) -> str:
    text = json.dumps(hundredths / 100)
    return text.removesuffix(".0")


SCALARS = st.sampled_from([
    {"type": "boolean"}, {"type": "null"}, {"type": "string", "maxLength": 4}, {"enum": ["x", 1, None]},
    {"type": "integer", "minimum": -3, "maximum": 40}, {"type": "number", "minimum": 0.5}, {"const": "c"},
    {"type": ["integer", "string"], "maxLength": 2}, {"type": "string", "format": "date"},
])  # fmt: skip


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    objects = st.dictionaries(st.sampled_from(["a", "b", 'q"', "é", "a b"]), inner, max_size=4).flatmap(
        lambda properties: (
            st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                lambda required: {"type": "object", "properties": properties, "required": required}
            )
            if properties
            else st.just({"type": "object", "properties": {}, "additionalProperties": False})
        )
    )
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(2, 4)).map(
        lambda parts: {"type": "array", "items": parts[0], "minItems": parts[1], "maxItems": parts[2]}
    )
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    merged = st.tuples(inner, inner).map(lambda parts: {"allOf": list(parts)})
    return st.one_of(objects, arrays, unions, merged)


@settings(max_examples=150, deadline=None)
@given(st.recursive(SCALARS, _larger, max_leaves=8))
def test_texts_of_any_schema_are_valid(schema: dict[str, Any]) -> None:
    try:
        compiled = compile_schema(schema)
    except SchemaError as error:
        assert error.code in {"unsatisfiable", "unsupported", "too_complex"}
        return
    sampler = Sampler(compiled.grammar, seed=11)
    texts = [sampler.text() for _ in range(20)]
    assert_valid(schema, texts)
    assert max(map(len, texts)) <= compiled.max_length


REFUSED = {
    "not": ({"not": {"type": "string"}}, "unsupported", "/not"),
    "if": ({"properties": {"a": {"if": {}, "then": {}}}}, "unsupported", "/properties/a/if"),
    "contains": ({"type": "array", "contains": {"const": 1}}, "unsupported", "/contains"),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 3}}, "unsupported", "/propertyNames"),
    "patternProperties": ({"patternProperties": {"^a": {}}}, "unsupported", "/patternProperties"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "unsupported", "/dependentRequired"),
    "uniqueItems": ({"items": {"type": "integer"}, "uniqueItems": True}, "unsupported", "/uniqueItems"),
    "unevaluated": ({"allOf": [{}], "unevaluatedProperties": False}, "unsupported", "/unevaluatedProperties"),
    "format": ({"items": {"type": "string", "format": "iri"}}, "unsupported", "/items/format"),
    "format too long": ({"type": "string", "format": "uuid", "maxLength": 10}, "unsupported", "/format"),
    "pattern": ({"type": "string", "pattern": "^(?=a)"}, "unsupported", "/pattern"),
    "pattern too short": ({"type": "string", "pattern": "^ab?$", "minLength": 2}, "unsupported", "/pattern"),
    "pattern and format": ({"type": "string", "pattern": "a", "format": "date"}, "unsupported", "/pattern"),
    "pattern and enum": ({"enum": ["a"], "pattern": "a"}, "unsupported", ""),
    "two patterns": ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "unsupported", "/pattern"),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, "unsupported", "/multipleOf"),
    "fraction": ({"type": "number", "multipleOf": 0.1}, "unsupported", "/multipleOf"),
    "minProperties": ({"properties": {"a": {}, "b": {}}, "minProperties": 2}, "unsupported", "/minProperties"),
    "remote": ({"$ref": "https://schemas.example/a"}, "unsupported", "/$ref"),
    "missing": ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "invalid", "/properties/a/$ref"),
    "no reference": ({"$ref": 5}, "invalid", "/$ref"),
    "bad type": ({"properties": {"a/b": {"type": "text"}}}, "invalid", "/properties/a~1b/type"),
    "bad count": ({"type": "string", "maxLength": -1}, "invalid", "/maxLength"),
    "bad branches": ({"anyOf": {}}, "invalid", "/anyOf"),
    "bad schema": ({"items": 3}, "invalid", "/items"),
    "bad properties": ({"properties": []}, "invalid", "/properties"),
    "infinity": ({"maximum": float("inf")}, "invalid", ""),
    "huge numbers": ({"type": "number", "minimum": 1e30}, "unsupported", ""),
    "long strings": ({"type": "string", "minLength": 5000}, "unsupported", "/minLength"),
    "long arrays": ({"type": "array", "minItems": 5000}, "unsupported", ""),
    "overlap": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "unsupported", "/oneOf/0"),
    "overlapping texts": ({"oneOf": [{"enum": ["a", "b"]}, {"type": "string"}]}, "unsupported", "/oneOf/0"),
    "empty enum": ({"enum": []}, "unsatisfiable", ""),
    "impossible": ({"type": "integer", "minimum": 2, "maximum": 1}, "unsatisfiable", ""),
    "impossible object": ({"type": "object", "required": ["a"], "additionalProperties": False}, "unsatisfiable", ""),
    "impossible tuple": ({"type": "array", "prefixItems": [False], "minItems": 1}, "unsatisfiable", ""),
    "different types": ({"allOf": [{"type": "string"}, {"type": "null"}]}, "unsatisfiable", ""),
    "endless": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "unsatisfiable", ""),
    "itself": ({"$ref": "#"}, "unsatisfiable", ""),
    "combinations": ({"allOf": [{"anyOf": [{"minimum": i} for i in range(9)]} for _ in range(2)]}, "too_complex", ""),
    "too large": ({"enum": ["a" * 17_000]}, "too_large", ""),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "code", "pointer"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_kept_is_refused_with_its_place(schema: dict[str, Any], code: str, pointer: str) -> None:
    start = time.thread_time()
    with pytest.raises(SchemaError) as refusal:
        to_grammar(schema)
    assert (refusal.value.code, refusal.value.pointer) == (code, pointer)
    assert time.thread_time() - start < 0.5


def test_a_deep_schema_is_refused_before_it_is_walked() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(SchemaError, match="too deep"):
        to_grammar(schema)


def test_what_is_no_schema_is_refused() -> None:
    for document in ([], "a", None, {1: 2}, {"const": {1, 2}}):
        with pytest.raises(SchemaError) as refusal:
            to_grammar(document)  # type: ignore[arg-type]
        assert refusal.value.code == "invalid"


def test_references_that_multiply_stay_small() -> None:
    defs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
    start = time.thread_time()
    with pytest.raises(SchemaError) as refusal:
        to_grammar({"$ref": "#/$defs/d0", "$defs": {**defs, "d30": {"type": "null"}}})
    assert refusal.value.code == "too_complex"
    assert time.thread_time() - start < 1.0


def test_one_of_is_told_apart_by_keys_constants_and_ranges() -> None:
    keys = {"oneOf": [{"type": "object", "properties": {k: {"type": "null"}}, "required": [k]} for k in "ab"]}
    ranges = {"type": "integer", "oneOf": [{"maximum": 3}, {"minimum": 4, "maximum": 9}]}
    lengths = {"type": "string", "oneOf": [{"maxLength": 3}, {"minLength": 4, "maxLength": 9}]}
    for schema in (keys, ranges, lengths):
        sampler = Sampler(to_grammar(schema), seed=2)
        assert_valid(schema, [sampler.text() for _ in range(100)])


def test_bounds_are_for_what_the_schema_leaves_open_and_nothing_else() -> None:
    def longest(schema: dict[str, Any], **bounds: Any) -> int:
        return compile_schema(schema, Bounds(**bounds)).max_length

    assert longest({"type": "string"}, max_string=10) == 2 + 2 * 10
    assert longest({"type": "string", "maxLength": 30}, max_string=10) == 2 + 2 * 30
    assert longest({"type": "array", "items": {"const": 1}}, max_items=3) == len("[1, 1, 1]")
    assert longest({"type": "integer"}, max_digits=4) == len("-9999")
    assert longest(LINKED, max_recursion=1) < longest(LINKED, max_recursion=2)
    with pytest.raises(ValueError, match="max_depth must be between 1 and 8"):
        Bounds(max_depth=9)


@pytest.mark.parametrize("schema", [PERSON, TREE, ORDER, {"type": "object"}, {"type": "string", "maxLength": 900}])
def test_a_grammar_within_a_length_never_needs_more(schema: dict[str, Any]) -> None:
    compiled = fit(JsonForm(json.dumps(schema).encode()), 1_200)
    assert compiled.max_length <= 1_200
    sampler = Sampler(compiled.grammar, seed=9)
    texts = [sampler.text() for _ in range(100)]
    assert_valid(schema, texts)
    assert max(map(len, texts)) <= 1_200


def test_an_ordinary_schema_is_compiled_quickly() -> None:
    start = time.thread_time()
    for _ in range(5):
        to_grammar(ORDER)
    assert (time.thread_time() - start) / 5 < 0.1
