"""Whose turn it is, as tables of integers, and as a game in which nobody may starve."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.plan import Candidate, Turn
from inference.engine.turns import (
    MIN_STEPS,
    OVERDUE_ROUNDS,
    TURN_SECONDS,
    URGENT_STEPS,
    next_vector,
    turn_steps,
)
from inference.engine.types import AdapterVector

pytestmark = pytest.mark.unit

BASE: AdapterVector = ()
POET: AdapterVector = (("poet", 1.0),)
CLERK: AdapterVector = (("clerk", 0.5),)


def decoding(adapters: AdapterVector, last_step: int = 9) -> Candidate:
    return Candidate(f"{adapters} {last_step}", 1, True, adapters, last_step)


def prompt(adapters: AdapterVector, last_step: int = -1, arrived_step: int = 9) -> Candidate:
    return Candidate(f"{adapters} prompt", 50, False, adapters, last_step, arrived_step)


def choose(*candidates: Candidate, step: int = 10, **turn: Any) -> AdapterVector:
    return next_vector(candidates, Turn(**{"adapters": POET, **turn}), step)


def test_a_lone_vector_keeps_its_turn_for_ever() -> None:
    assert choose(decoding(POET), num_steps=10_000, seconds=1000.0) == POET


def test_a_vector_without_work_leaves_the_turn_to_the_one_left_out_longest() -> None:
    assert choose(decoding(BASE, 7), decoding(CLERK, 6)) == CLERK


@pytest.mark.parametrize(("num_steps", "chosen"), [(1, POET), (15, POET), (16, CLERK)])
def test_two_vectors_take_turns_of_16_steps(num_steps: int, chosen: AdapterVector) -> None:
    assert choose(decoding(POET), decoding(CLERK, 0), num_steps=num_steps) == chosen


@pytest.mark.parametrize(("num_vectors", "steps"), [(1, 32), (2, 16), (3, 10), (4, 8), (8, 4), (100, MIN_STEPS)])
def test_the_more_vectors_wait_the_shorter_is_a_turn(num_vectors: int, steps: int) -> None:
    assert turn_steps(num_vectors) == steps


def test_a_turn_of_long_steps_ends_by_the_clock() -> None:
    assert choose(decoding(POET), decoding(CLERK), num_steps=1, seconds=TURN_SECONDS) == CLERK
    assert choose(decoding(POET), decoding(CLERK), num_steps=1, seconds=0.9 * TURN_SECONDS) == POET


def test_a_first_token_is_worth_a_switch_after_two_steps() -> None:
    assert choose(decoding(POET), prompt(CLERK), num_steps=URGENT_STEPS - 1) == POET
    assert choose(decoding(POET), prompt(CLERK), num_steps=URGENT_STEPS) == CLERK


def test_prompts_of_the_turn_are_done_before_those_of_others() -> None:
    assert choose(prompt(POET, last_step=9), prompt(CLERK), num_steps=5) == POET


def test_a_first_token_goes_before_those_that_only_wait_for_their_next() -> None:
    assert choose(decoding(POET), decoding(BASE, 0), prompt(CLERK), num_steps=16) == CLERK


def test_a_prompt_that_has_begun_waits_for_its_turn_like_others() -> None:
    assert choose(decoding(POET), decoding(BASE, 5), prompt(CLERK, last_step=8), num_steps=16) == BASE


def test_an_overdue_vector_goes_before_any_first_token() -> None:
    overdue = 10 - OVERDUE_ROUNDS * 3 * turn_steps(3) - 1
    assert choose(decoding(POET), decoding(BASE, overdue + 1), prompt(CLERK), num_steps=16) == CLERK
    long_ago = Candidate("waits", 1, True, BASE, 0)
    step = OVERDUE_ROUNDS * 3 * turn_steps(3) + 1
    assert choose(decoding(POET), long_ago, prompt(CLERK), num_steps=16, step=step) == BASE


def test_a_vector_that_has_just_come_is_not_overdue() -> None:
    step = 10_000
    came = Candidate("came", 1, True, BASE, -1, arrived_step=step)
    assert choose(decoding(POET, step), came, decoding(CLERK, step - 20), num_steps=16, step=step) == CLERK


VECTORS: tuple[AdapterVector, ...] = tuple((("adapter", float(number)),) for number in range(8))


@given(st.integers(2, 8), st.lists(st.sets(st.integers(0, 7)), min_size=200, max_size=400))
def test_no_vector_starves_however_prompts_arrive(num_vectors: int, arrivals: list[set[int]]) -> None:
    """Every vector always decodes one sequence, and new prompts come in any pattern; a step finishes a prompt."""
    turn, carried, prompts = Turn(), [-1] * num_vectors, [False] * num_vectors
    bound = (OVERDUE_ROUNDS + 2) * num_vectors * max(turn_steps(num_vectors), MIN_STEPS)
    for step, arriving in enumerate(arrivals):
        for number in arriving & set(range(num_vectors)):
            prompts[number] = True
        candidates = []
        for number in range(num_vectors):
            candidates.append(Candidate(f"d{number}", 1, True, VECTORS[number], carried[number]))
            if prompts[number]:
                candidates.append(Candidate(f"p{number}", 5, False, VECTORS[number], -1, step))
        chosen = VECTORS.index(next_vector(candidates, turn, step))
        turn = turn.after(VECTORS[chosen], 0.0)
        carried[chosen], prompts[chosen] = step, False
        assert all(step - last <= bound for last in carried)
