"""Which slot a waiting request gets, as tables of integers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.plan import Candidate, ScheduleView, Seat
from inference.engine.prefix import common_prefix
from inference.engine.seating import (
    MAX_WAIT_STEPS,
    MIN_COPY_TOKENS,
    MIN_SAVED_TOKENS,
    MIN_SHARED_TOKENS,
    copy_threshold,
    seat,
)

pytestmark = pytest.mark.unit


def waiting(request_id: str = "new", num_pending: int = 1000, **fields: Any) -> Candidate:
    return Candidate(request_id, num_pending, **fields)


def seats(*candidates: Candidate, free: set[int], **fields: Any) -> tuple[Seat, ...]:
    defaults: dict[str, Any] = {"num_slots": 8, "n_ctx": 1024}
    return seat(ScheduleView(waiting=candidates, free_slots=frozenset(free), **{**defaults, **fields}))[0]


@given(st.lists(st.integers(0, 2), max_size=20), st.lists(st.integers(0, 2), max_size=20))
def test_a_common_prefix_is_the_longest(one: list[int], other: list[int]) -> None:
    number = common_prefix(one, other)
    assert one[:number] == other[:number]
    assert number == min(len(one), len(other)) or one[number] != other[number]


def test_the_slot_that_has_the_longest_prefix_is_taken_over() -> None:
    held, used = {0: 40, 1: 100, 2: 90}, {0: 1, 1: 2, 2: 3}
    chosen = seats(waiting(prefixes={0: 40, 1: 100, 2: 60}), free={0, 1, 2, 3}, held=held, used=used)
    assert chosen == (Seat("new", 1, 100),)


def test_without_a_prefix_an_empty_slot_is_taken_then_the_one_used_longest_ago() -> None:
    held, used = {0: 40, 1: 40, 2: 40}, {0: 7, 1: 3, 2: 5}
    assert seats(waiting(), free={0, 1, 2, 3}, held=held, used=used) == (Seat("new", 3),)
    assert seats(waiting(), free={0, 1, 2}, held=held, used=used) == (Seat("new", 1),)


def test_of_the_slots_that_nobody_has_used_for_long_the_one_with_most_of_the_prompt_is_lost() -> None:
    held, used = {0: 90, 1: 90, 2: 90, 3: 90}, {0: 9, 1: 3, 2: 5, 3: 8}
    chosen = seats(waiting(prefixes={0: 12, 2: 11}), free={0, 1, 2, 3}, held=held, used=used)
    assert chosen == (Seat("new", 2, 11),)


def test_a_prompt_that_shares_a_beginning_does_not_destroy_a_conversation() -> None:
    held, used = {0: 900, 1: 10}, {0: 9, 1: 1}
    chosen = seats(waiting(prefixes={0: 300}), free={0, 1}, held=held, used=used)
    assert chosen == (Seat("new", 1, 300, copy_from=0),)


def test_the_last_free_slot_is_taken_over_whatever_it_holds() -> None:
    assert seats(waiting(prefixes={0: 300}), free={0}, held={0: 900}, used={0: 9}) == (Seat("new", 0, 300),)


def test_a_busy_slot_is_copied_where_that_saves_enough() -> None:
    threshold = copy_threshold(1024)
    assert threshold == MIN_COPY_TOKENS
    assert copy_threshold(8192) == 128
    assert seats(waiting(prefixes={5: threshold}), free={0}) == (Seat("new", 0, threshold, copy_from=5),)
    assert seats(waiting(prefixes={5: threshold - 1}), free={0}) == (Seat("new", 0),)


def test_a_free_slot_that_has_nearly_as_much_is_better_than_a_copy() -> None:
    held, used = {0: 100}, {0: 1}
    assert seats(waiting(prefixes={5: 110, 0: 100}), free={0, 1}, held=held, used=used) == (Seat("new", 0, 100),)
    copied = Seat("new", 1, 200, copy_from=5)
    assert seats(waiting(prefixes={5: 200, 0: 100}), free={0, 1}, held=held, used=used) == (copied,)


def test_two_that_want_the_same_slot_share_what_the_first_leaves_of_it() -> None:
    first, second = waiting("first", prefixes={0: 50}), waiting("second", prefixes={0: 90})
    chosen = seats(first, second, free={0, 1}, held={0: 90}, used={0: 1})
    assert chosen == (Seat("first", 0, 50), Seat("second", 1, 50, copy_from=0))


def test_a_slot_that_was_given_away_is_no_source_any_more() -> None:
    first, second = waiting("first"), waiting("second", prefixes={0: 90})
    assert seats(first, second, free={0}, held={0: 90}, used={0: 1}) == (Seat("first", 0),)
    chosen = seats(first, second, free={0, 1}, held={0: 90, 1: 10}, used={0: 1, 1: 2})
    assert chosen == (Seat("first", 0), Seat("second", 1))


def test_a_long_prefix_that_is_being_computed_is_waited_for() -> None:
    computing = Candidate("computing", 500)
    late = waiting("late", shared={"computing": 300}, prefixes={2: 300 - MIN_SAVED_TOKENS})
    assert seats(late, waiting("other"), free={0}, running=(computing,)) == (Seat("other", 0),)
    soon = waiting("late", shared={"computing": 300}, prefixes={2: 300 - MIN_SAVED_TOKENS + 1})
    assert seats(soon, free={0}, running=(computing,)) == (Seat("late", 0, 293, copy_from=2),)
    short = waiting("short", shared={"computing": MIN_SHARED_TOKENS - 1})
    assert seats(short, free={0}, running=(computing,)) == (Seat("short", 0),)


def test_of_many_that_come_together_one_computes_and_the_others_wait() -> None:
    crowd = [waiting(f"r{number}", shared={f"r{i}": 600 for i in range(number)}) for number in range(4)]
    assert seats(*crowd, free={0, 1, 2, 3}, num_slots=4) == (Seat("r0", 0),)


def test_a_prompt_that_is_done_is_not_waited_for() -> None:
    decoding = Candidate("other", 1, is_decoding=True)
    assert seats(waiting(shared={"other": 300}), free={0}, running=(decoding,)) == (Seat("new", 0),)


def test_waiting_for_a_prefix_is_bounded() -> None:
    computing, late = Candidate("computing", 500), waiting("late", shared={"computing": 300}, arrived_step=10)
    assert seats(late, free={0}, running=(computing,), step=10 + MAX_WAIT_STEPS - 1) == ()
    assert seats(late, free={0}, running=(computing,), step=10 + MAX_WAIT_STEPS) == (Seat("late", 0),)


def test_a_reused_prefix_is_not_pending_any_more() -> None:
    view = ScheduleView(waiting=(waiting(num_pending=100, prefixes={0: 99}),), free_slots=frozenset({0}))
    (seated,) = seat(view)[1]
    assert seated.num_pending == 1
