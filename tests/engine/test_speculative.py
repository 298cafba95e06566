"""Prompt lookup, and which vocabularies go together."""

from __future__ import annotations

import time

import pytest

from inference.engine import speculative
from inference.engine.speculative import Ask, PromptLookup, vocabulary_problem


def guess(tokens: list[int], num_max: int = 4, lookup: PromptLookup | None = None, slot_id: int = 0) -> list[int]:
    return (lookup or PromptLookup()).propose([Ask(slot_id, tokens, num_max)])[0]


def test_what_followed_before_follows_again() -> None:
    assert guess([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3]) == [4, 5, 6, 7]
    assert guess([1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3], num_max=2) == [4, 5]


def test_new_words_are_not_guessed() -> None:
    assert guess([1, 2, 3, 4, 5, 6]) == []
    assert guess([1, 2, 9, 1, 2]) == []
    for length in range(4):
        assert guess([1] * length) == []


def test_the_longest_match_wins_over_the_latest() -> None:
    tokens = [7, 1, 2, 3, 50, 8, 1, 2, 3, 60, 7, 1, 2, 3]
    assert guess(tokens, num_max=1) == [50]
    tokens = [8, 1, 2, 3, 50, 8, 1, 2, 3, 60, 8, 1, 2, 3]
    assert guess(tokens, num_max=1) == [60]


def test_a_text_that_repeats_itself_is_guessed_as_far_as_wanted() -> None:
    assert guess([1, 2, 1, 2, 1, 2, 1], num_max=5) == [2, 1, 2, 1, 2]
    assert guess([5, 5, 5, 5], num_max=6) == [5] * 6


def test_it_keeps_up_with_a_sequence_as_with_one_that_it_sees_at_once() -> None:
    text = [number % 7 + number % 3 for number in range(120)]
    lookup = PromptLookup()
    for end in range(1, len(text)):
        assert guess(text[:end], lookup=lookup) == guess(text[:end])


def test_tokens_that_are_no_continuation_are_learned_anew() -> None:
    lookup = PromptLookup()
    long = list(range(100)) + list(range(100))
    guess(long, lookup=lookup)
    shifted = long[:10] + long[60:]
    assert guess([*shifted, 97, 98, 99], lookup=lookup) == guess([*shifted, 97, 98, 99])
    assert guess([3, 4, 5, 6, 3, 4, 5], lookup=lookup) == [6, 3, 4, 5]


def test_slots_know_nothing_of_each_other_nor_of_who_sat_there_before() -> None:
    lookup = PromptLookup()
    guess([1, 2, 3, 4, 5], lookup=lookup, slot_id=0)
    assert guess([9, 1, 2, 3], lookup=lookup, slot_id=1) == []
    lookup.open(0, 0)
    assert guess([9, 1, 2, 3], lookup=lookup, slot_id=0) == []


def test_a_long_sequence_costs_bounded_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculative, "MAX_INDEXED", 1000)
    lookup = PromptLookup()
    text = [number * number % 251 for number in range(20_000)]
    for end in range(300, len(text), 100):
        found = guess(text[:end], lookup=lookup)
        assert found == text[end - 251 : end - 247]  # the text has this period
    assert len(lookup._indexes[0]._previous) <= 1000


def test_the_worst_text_is_looked_up_in_constant_time() -> None:
    lookup = PromptLookup()
    text = [1] * 20_000
    guess(text, lookup=lookup)
    started = time.thread_time()
    for _ in range(100):
        text.append(1)
        assert guess(text, lookup=lookup) == [1] * 4
    assert time.thread_time() - started < 1.0


def test_vocabularies_must_be_the_same_but_for_padding() -> None:
    vocabulary = [b"a", b"b", b"c"]
    assert vocabulary_problem(vocabulary, list(vocabulary)) == ""
    assert vocabulary_problem(vocabulary, [*vocabulary, b"[unused]"]) == ""
    assert "token 1 is 'x', not 'b'" in vocabulary_problem(vocabulary, [b"a", b"x", b"c"])
    assert "203 tokens" in vocabulary_problem(vocabulary, [*vocabulary, *[b"?"] * 200])
