"""Patterns become pieces whose texts match them, judged by Python's re; what is outside the subset is refused."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.structured import SchemaError
from inference.structured.json_schema import Bounds
from tests.structured.compiling import to_grammar
from tests.structured.derivations import Matcher, Sampler

pytestmark = pytest.mark.unit

PATTERNS = {
    "^abc$": ["abc"],
    "b": ["b"],
    "^(a|bc|)d?$": ["a", "bcd", "d", ""],
    "^a|b$": ["a", "b"],
    "^(?:x{2,3}y*?)+$": ["xx", "xxxyyxx"],
    "^[^a-y]+$": ["z", "Z\"", "é\\"],
    "^[\\d\\-_.]{3}$": ["1-_", "..."],
    "^\\D\\W\\S$": ["a!b", '"-c'],
    "^[^\\d]$": ["a"],
    "^\\x41\\u00e9\\.\\/\\t\\n$": ["Aé./\t\n"],
    '^["\\\\]$': ['"', "\\"],
    "^.{2,4}$": ["ab", "a\\\"é"],
    "^\\w+@\\w+\\.(com|org)$": ["a@b.com", "x_1@y2.org"],
    "^[A-Za-z][\\s]\\v?\\f?\\r?$": ["a ", "b\t"],
    "": [""],
}  # fmt: skip


@pytest.mark.parametrize(("pattern", "texts"), PATTERNS.items())
def test_every_text_matches_and_known_ones_are_accepted(pattern: str, texts: list[str]) -> None:
    grammar = to_grammar({"type": "string", "pattern": pattern}, Bounds(max_string=40))
    sampler, matcher = Sampler(grammar, seed=3), Matcher(grammar)
    for _ in range(100):
        value = json.loads(sampler.text())
        assert re.search(pattern, value), value
        assert len(value) <= 40
    for text in texts:
        assert matcher.matches(json.dumps(text, ensure_ascii=False)), text


@pytest.mark.parametrize(
    "pattern",
    [
        "(?=a)b", "(?!a)b", "(?<n>a)", "\\bword", "(a)\\1", "a**", "a{2}{3}", "a++", "(a", "a)", "[a", "[]", "a^b",
        "a$b", "(^a)", "*a", "a{5,2}", "a{5000}", "\\p{L}", "\\", "[z-a]", "[\\d-z]", "\\ud800", "\\x4", "[^ -~\\d]",
        "a" * 600, "(" * 20 + "a" + ")" * 20, "}", "(a{900}){900}", "\\cA",
    ],
)  # fmt: skip
def test_what_is_outside_the_subset_is_refused(pattern: str) -> None:
    with pytest.raises(SchemaError) as refusal:
        to_grammar({"type": "string", "pattern": pattern})
    assert refusal.value.pointer == "/pattern"


@pytest.mark.parametrize(
    ("pattern", "low", "high"), [("^a{3}$", 0, 2), ("^a{3}$", 4, 9), ("^ab$", 3, 9), ("^abc$", 0, 2)]
)
def test_lengths_that_no_match_has_are_refused(pattern: str, low: int, high: int) -> None:
    with pytest.raises(SchemaError):
        to_grammar({"type": "string", "pattern": pattern, "minLength": low, "maxLength": high})


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet='ab1^$.|()[]{}*+?\\dwsx-,é"', max_size=14))
def test_any_pattern_is_kept_or_refused(pattern: str) -> None:
    try:
        grammar = to_grammar({"type": "string", "pattern": pattern}, Bounds(max_string=12))
    except SchemaError:
        return
    sampler = Sampler(grammar, seed=8)
    compiled = re.compile(pattern)
    for _ in range(5):
        value = json.loads(sampler.text())
        assert compiled.search(value), value
