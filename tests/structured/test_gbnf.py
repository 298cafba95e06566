"""Which grammars are let through to llama.cpp, which are refused, where the blame is put, and how long that takes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.structured import GENERATED_LIMITS, GrammarError, Limits, validate
from inference.structured.gbnf_parser import parse
from inference.structured.gbnf_tree import Chars, Group, Literal, Repeat, RuleRef, TokenRef
from tests.structured.derivations import Matcher, Sampler
from tests.structured.grammars import BOMBS, FINE, WRONG

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("grammar", FINE.values(), ids=FINE.keys())
def test_a_grammar_that_llama_cpp_takes_is_let_through(grammar: str) -> None:
    validate(grammar)


@pytest.mark.parametrize(("grammar", "code", "line", "column"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_grammar_is_refused_with_its_place(grammar: str, code: str, line: int, column: int) -> None:
    with pytest.raises(GrammarError) as refusal:
        validate(grammar)
    assert (refusal.value.code, refusal.value.line, refusal.value.column) == (code, line, column)
    assert not line or f"line {line}, column {column}" in str(refusal.value)


@pytest.mark.parametrize(("grammar", "code"), BOMBS.values(), ids=BOMBS.keys())
def test_a_grammar_bomb_is_refused_within_50_milliseconds(grammar: str, code: str) -> None:
    times = []
    for _ in range(3):
        start = time.thread_time()
        with pytest.raises(GrammarError) as refusal:
            validate(grammar)
        times.append(time.thread_time() - start)
    assert refusal.value.code == code
    assert min(times) < 0.050


def test_the_tree_says_what_the_text_says() -> None:
    rules = parse('root ::= ("a" | x){2,3} !<[7]> # end\nx ::= [^a-c\\x41\\-]').rules
    group = Group(((Literal("a"),), (RuleRef("x"),)))
    assert rules["root"] == ((Repeat(group, 2, 3), TokenRef("<[7]>", negated=True)),)
    assert rules["x"] == ((Chars(((97, 99), (65, 65), (45, 45)), negated=True),),)


def test_the_limits_can_be_widened_for_grammars_of_our_own() -> None:
    grammar = "root ::= " + '"' + "a" * 20_000 + '"'
    with pytest.raises(GrammarError, match="20011 bytes"):
        validate(grammar)
    validate(grammar, GENERATED_LIMITS)
    with pytest.raises(GrammarError, match="more than 10 rules"):
        validate('root ::= "a"{0,10}', Limits(num_rules=10))


@given(st.text(alphabet='root::=ab|()[]{}*+?.,<>!-^"\\x41u\n\r #09é\ud800\0', max_size=60))
def test_any_text_is_a_grammar_or_a_grammar_error(text: str) -> None:
    try:
        validate("root ::= " + text)
    except GrammarError as error:
        assert error.code


@given(st.sampled_from(sorted(FINE)), st.integers(0, 10_000), st.characters())
def test_an_edited_grammar_is_a_grammar_or_a_grammar_error(name: str, place: int, char: str) -> None:
    grammar = FINE[name]
    at = place % (len(grammar) + 1)
    try:
        validate(grammar[:at] + char + grammar[at + 1 :])
    except GrammarError as error:
        assert error.code


@pytest.mark.parametrize("name", ["arithmetic", "json", "quantifiers"])
def test_the_readers_of_these_tests_agree_with_each_other(name: str) -> None:
    sampler, matcher = Sampler(FINE[name], seed=1), Matcher(FINE[name])
    texts = [_shallow(sampler) for _ in range(50)]
    assert all(matcher.matches(text) for text in texts)
    assert not any(matcher.matches(text + "\x7f") for text in texts)


def _shallow(sampler: Sampler) -> str:
    while True:
        try:
            return sampler.text()
        except RecursionError:
            continue
