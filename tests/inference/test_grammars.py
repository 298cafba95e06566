"""What a request says of its answer's form: one grammar, or a refusal with the place; and what is remembered of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from accounts.trail.refusals import Refusal
from inference.intake import grammars
from inference.intake.grammars import BAD_SECONDS, Verdicts, form_from, grammar_from
from inference.structured import JsonForm
from inference.tokenizers.pool import TokenizerPool

pytestmark = pytest.mark.unit

CHILD = Path(__file__).parent / "children" / "tokenizer.py"
LETTERS = "root ::= [a-z]+"


@dataclass(frozen=True)
class Vocabulary:
    digest: str = "d"
    name: str = "small"
    vocabulary_path: Path = Path("good.gguf")


GOOD = Vocabulary()


def refused(grammar: str | None = None, schema: dict[str, Any] | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        grammar_from(grammar, schema)
    return caught.value


# From the request to one grammar


def test_a_grammar_stays_as_it_is_and_nothing_stays_nothing() -> None:
    assert grammar_from(LETTERS, None) == LETTERS
    assert grammar_from(None, None) is None
    assert grammar_from("", None) is None


def test_a_schema_becomes_a_grammar_and_an_empty_one_any_json() -> None:
    made = grammar_from(None, {"type": "boolean"})
    assert made is not None
    assert '"true" | "false"' in made
    assert "root ::=" in (grammar_from("", {}) or "")


def test_the_order_of_properties_is_part_of_a_schema() -> None:
    one = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}}
    other = {"type": "object", "properties": {"b": {"const": 2}, "a": {"const": 1}}}
    assert grammar_from(None, one) != grammar_from(None, other)


def test_both_are_refused() -> None:
    refusal = refused(LETTERS, {})
    assert (refusal.code, refusal.extra["reason"]) == ("invalid_grammar", "both_given")


def test_a_wrong_grammar_is_refused_with_line_and_column() -> None:
    refusal = refused('root ::= "a"\n  b\n')
    assert refusal.code == "invalid_grammar"
    assert refusal.message.startswith("Field 'grammar': line 2, column 4: ")
    assert (refusal.extra["line"], refusal.extra["column"], refusal.extra["reason"]) == (2, 4, "syntax")


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("root ::= " + '"a" ' * 5_000, "too_large"),
        ("root ::= " + "(" * 33 + '"a"' + ")" * 33, "too_deep"),
        ('root ::= "a"{2000}', "repetition"),
        ('root ::= root "a" | "b"', "left_recursion"),
    ],
)
def test_the_bounds_of_a_grammar_are_said(grammar: str, reason: str) -> None:
    assert refused(grammar).extra["reason"] == reason


def test_a_wrong_schema_is_refused_with_its_path() -> None:
    refusal = refused(schema={"type": "object", "properties": {"a": {"type": "text"}}})
    assert (refusal.code, refusal.extra["path"]) == ("invalid_schema", "/properties/a/type")
    assert refusal.message.startswith("Field 'json_schema': at /properties/a/type: ")


@pytest.mark.parametrize(
    "schema", [{"enum": []}, {"type": "string", "pattern": "("}, {"x" * 20_000: 1}, {"minLength": 2**70}]
)
def test_no_schema_is_an_unexpected_error(schema: dict[str, Any]) -> None:
    assert refused(schema=schema).code == "invalid_schema"


def test_a_schema_that_json_cannot_hold_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(5_000):
        nested = {"not": nested}
    assert refused(schema=nested).code == "invalid_schema"
    assert refused(schema={"const": {1, 2}}).code == "invalid_schema"


def test_the_form_of_a_schema_is_its_text_in_order() -> None:
    assert form_from({"type": "object", "properties": {"b": {}, "a": {}}}) == JsonForm(
        b'{"type":"object","properties":{"b":{},"a":{}}}'
    )
    assert form_from(None) is None


# What is remembered


class Trials:
    """In the place of a pool of children: says what it is told to, and counts."""

    def __init__(self, *problems: Refusal | None) -> None:
        self.problems = list(problems)
        self.asked: list[str] = []

    def ask(self, model: Any, message: dict[str, Any]) -> dict[str, Any]:
        assert message["op"] == "grammar"
        self.asked.append(message["grammar"])
        if problem := self.problems.pop(0):
            raise problem
        return {"ok": True, "num_tokens": 3}


class Hand:
    """A clock in the test's hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


KILLED = Refusal("tokenizer_failed", "This text cannot be tokenized.")


def desk(*problems: Refusal | None) -> tuple[Verdicts, Trials, Hand]:
    trials, clock = Trials(*problems), Hand()
    return Verdicts(lambda: trials, clock), trials, clock  # type: ignore[arg-type, return-value]


def test_a_good_grammar_is_tried_once_a_vocabulary() -> None:
    verdicts, trials, clock = desk(None, None)
    for _ in range(3):
        verdicts.check(GOOD, LETTERS)
        clock.now += BAD_SECONDS
    assert len(trials.asked) == 1
    verdicts.check(Vocabulary(digest="other"), LETTERS)
    assert len(trials.asked) == 2


def test_one_that_ended_its_child_is_given_to_no_other_for_a_while() -> None:
    verdicts, trials, clock = desk(KILLED, None)
    for _ in range(3):
        with pytest.raises(Refusal, match="takes too long") as caught:
            verdicts.check(GOOD, LETTERS)
        assert caught.value.code == "invalid_grammar"
    assert len(trials.asked) == 1
    clock.now = BAD_SECONDS + 1
    verdicts.check(GOOD, LETTERS)
    assert len(trials.asked) == 2


def test_what_the_child_says_is_passed_on() -> None:
    verdicts, _, _ = desk(Refusal("tokenizer_failed", "llama.cpp cannot read it", reason="grammar_refused"))
    with pytest.raises(Refusal, match="cannot read it"):
        verdicts.check(GOOD, LETTERS)


def test_a_busy_pool_says_nothing_of_the_grammar() -> None:
    verdicts, trials, _ = desk(Refusal("service_unavailable", "busy", retry_after=1), None)
    with pytest.raises(Refusal) as caught:
        verdicts.check(GOOD, LETTERS)
    assert caught.value.code == "service_unavailable"
    verdicts.check(GOOD, LETTERS)
    assert len(trials.asked) == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "MAX_VERDICTS", 2)
    verdicts, trials, _ = desk(None, None, None, None)
    for name in ("a", "b", "a", "c"):
        verdicts.check(GOOD, name)
    assert trials.asked == ["a", "b", "c"]
    verdicts.check(GOOD, "a")
    assert len(trials.asked) == 3
    verdicts.check(GOOD, "b")
    assert len(trials.asked) == 4


@pytest.fixture
def pool() -> Iterator[TokenizerPool]:
    made = TokenizerPool(processes=1, timeout_seconds=0.5, command=[sys.executable, str(CHILD)])
    yield made
    made.close()


@pytest.mark.parametrize("manners", ["hang", "die", "nonsense"])
def test_whatever_a_child_does_the_grammar_is_refused(pool: TokenizerPool, manners: str) -> None:
    with pytest.raises(Refusal, match="takes too long") as caught:
        Verdicts(lambda: pool).check(GOOD, manners)
    assert caught.value.code == "invalid_grammar"
