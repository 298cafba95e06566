"""What a forced answer's grammar is, once it is known how long the answer may be; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from accounts.trail.refusals import Refusal
from inference.chat.thinking import THINK, Opening, Tags
from inference.engine.types import SamplingParams, ThoughtBound
from inference.intake import forms
from inference.orders import GenerateOrder
from inference.structured import JsonForm, fit
from tests.structured.derivations import Matcher, Sampler

pytestmark = pytest.mark.unit
SERVED: Any = SimpleNamespace(name="m")
FORM = JsonForm(b'{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}')
SHORTEST = '{"city":""}'
OPENS = Opening(THINK, has_begun=False, may_begin=True)


class Letters:
    """A token for every two letters; a prompt of ones ends within thoughts."""

    def encode(self, model: Any, text: str, *, add_special: bool) -> tuple[int, ...]:
        return tuple(range((len(text) + 1) // 2))

    def control_tokens(self, model: Any, texts: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(99 for text in texts if text == "[/THINK]")

    def decode(self, model: Any, tokens: tuple[int, ...], *, special: bool) -> str:
        return "<think>\n" if tokens[-1] == 1 else "assistant\n"


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms.pool, "tokenizer_pool", Letters)


def grammar_for(max_tokens: int, *, opening: Opening | None = None, last: int = 1) -> str:
    order = GenerateOrder(prompt="x", form=FORM, opening=opening)
    grammar = forms.fitted(order, SERVED, (7, last), max_tokens).sampling.grammar
    assert grammar is not None
    return grammar


def test_an_order_without_a_form_stays_as_it_is() -> None:
    order = GenerateOrder(prompt="x", opening=OPENS)
    assert forms.fitted(order, SERVED, (1,), 8) is order


def test_a_prompt_that_is_only_computed_needs_no_room() -> None:
    order = GenerateOrder(prompt="x", form=FORM, max_tokens=0)
    assert forms.fitted(order, SERVED, (1,), 0) is order


@pytest.mark.parametrize("max_tokens", [40, 64, 200, 1000])
def test_the_longest_answer_leaves_a_token_for_its_end(max_tokens: int) -> None:
    assert grammar_for(max_tokens) == fit(FORM, max_tokens - 1).grammar
    sampler = Sampler(grammar_for(max_tokens), seed=3)
    assert all(len(sampler.text().encode()) < max_tokens for _ in range(20))


def test_what_cannot_fit_is_refused_and_what_may_is_not() -> None:
    needed = (len(SHORTEST) + 1) // 2 + 1
    with pytest.raises(Refusal) as caught:
        grammar_for(needed - 1)
    assert (caught.value.code, caught.value.extra["field"]) == ("bad_request", "max_tokens")
    assert (caught.value.extra["needed_tokens"], caught.value.extra["max_tokens"]) == (needed, needed - 1)
    assert Matcher(grammar_for(needed)).matches(SHORTEST)


def test_thoughts_come_first_where_the_prompt_ends_in_them_and_the_whole_fits() -> None:
    for max_tokens in (80, 300, 3000):
        grammar = grammar_for(max_tokens, opening=OPENS)
        matcher, sampler = Matcher(grammar), Sampler(grammar, seed=4)
        assert matcher.matches(f"Rome.\n</think>\n\n{SHORTEST}")
        assert not matcher.matches(SHORTEST)
        for _ in range(20):
            text = sampler.text()
            assert len(text.encode()) < max_tokens
            assert text.partition("</think>")[2].lstrip("\n").startswith("{")


def test_thoughts_are_none_where_no_room_is_left_for_them() -> None:
    needed = (len("</think>" + SHORTEST) + 1) // 2 + 1
    assert Matcher(grammar_for(needed, opening=OPENS)).matches("</think>" + SHORTEST)
    with pytest.raises(Refusal) as caught:
        grammar_for(needed - 1, opening=OPENS)
    assert caught.value.extra["needed_tokens"] == needed


@pytest.mark.parametrize(
    ("opening", "last", "is_open"),
    [
        (OPENS, 1, True),
        (OPENS, 2, False),
        (Opening(THINK, has_begun=True, may_begin=False), 2, True),
        (Opening(THINK, has_begun=False, may_begin=False), 1, False),
        (None, 1, False),
    ],
)
def test_thoughts_are_open_as_the_prompt_s_end_says(opening: Opening | None, last: int, is_open: bool) -> None:
    assert Matcher(grammar_for(100, opening=opening, last=last)).matches(f"</think>{SHORTEST}") is is_open


def test_bounds_that_are_near_have_the_same_thoughts() -> None:
    assert len({grammar_for(max_tokens, opening=OPENS) for max_tokens in range(1500, 1600)}) <= 3


# Bounded thoughts


def bound_of(opening: Opening | None, max_thought: int | None = 7, last: int = 1, **sampling: Any) -> Any:
    order = GenerateOrder(prompt="x", opening=opening, max_thought=max_thought, sampling=SamplingParams(**sampling))
    return forms.with_bounded_thoughts(order, SERVED, (7, last)).sampling.thoughts


def test_the_engine_is_told_how_to_end_thoughts() -> None:
    end = tuple(range(4))
    bound = ThoughtBound(num_tokens=7, start="<think>", end="</think>", end_tokens=end, is_open=True)
    assert bound_of(OPENS) == bound
    assert bound_of(OPENS, last=2) == replace(bound, is_open=False)  # the answer itself may begin them
    assert bound_of(OPENS, max_thought=0) == replace(bound, num_tokens=0)
    assert bound_of(OPENS, max_thought=None) is None
    assert bound_of(None) is None


def test_a_tag_that_is_one_token_is_taken_where_its_text_is_shown() -> None:
    magistral = Opening(Tags("[THINK]", "[/THINK]"), has_begun=True, may_begin=False)
    assert bound_of(magistral, shown_tokens=(98, 99)).end_tokens == (99,)
    assert bound_of(magistral).end_tokens == tuple(range(4))
