"""Which lane serves a request, with integers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.routing import MAX_KNOWN_TOKENS, LaneView, route, share_threads
from inference.engine.types import AdapterVector

pytestmark = pytest.mark.unit

A: AdapterVector = (("a", 1.0),)
B: AdapterVector = (("b", 1.0),)
C: AdapterVector = (("c", 1.0),)
D: AdapterVector = (("d", 1.0),)


def lane(*vectors: AdapterVector, num_slots: int = 8, num_known: int = 0) -> LaneView:
    return LaneView(num_slots, {vector: vectors.count(vector) for vector in vectors}, num_known)


def test_the_first_request_takes_the_first_lane() -> None:
    assert route([lane(), lane()], A) == 0


def test_a_vector_joins_its_own_batch_and_another_takes_the_idle_lane() -> None:
    assert route([lane(), lane(A, A)], A) == 1
    assert route([lane(A, A), lane()], B) == 1


def test_the_base_model_is_a_vector_like_any_other() -> None:
    assert route([lane(()), lane()], A) == 1
    assert route([lane(A), lane(())], ()) == 1


def test_more_vectors_than_lanes_are_spread_evenly() -> None:
    assert route([lane(A, B), lane(C)], D) == 1
    assert route([lane(A, A, A), lane(C)], D) == 1, "of equals, where fewer requests run"


def test_a_vector_stays_in_its_lane_when_others_take_turns_there() -> None:
    assert route([lane(A, B), lane(C)], B) == 0


def test_a_vector_that_takes_turns_goes_on_in_a_lane_that_has_become_idle() -> None:
    assert route([lane(A, B), lane()], B) == 1


def test_a_lane_that_knows_the_prompt_is_preferred_among_equals_and_is_worth_some_turns() -> None:
    assert route([lane(), lane(num_known=10)], A) == 1
    assert route([lane(), lane(B, num_known=600)], A) == 1
    assert route([lane(), lane(B, num_known=100)], A) == 0


def test_a_known_prompt_never_outweighs_a_long_wait() -> None:
    vectors: list[AdapterVector] = [((f"v{number}", 1.0),) for number in range(5)]
    assert route([lane(), lane(*vectors, num_known=10**6)], A) == 0
    assert route([lane(), lane(A, num_slots=1, num_known=10**6)], A) == 0, "its slots are taken"


def test_a_full_lane_is_passed_over_and_of_full_lanes_the_one_with_the_shortest_queue_is_taken() -> None:
    assert route([lane(A, A, num_slots=2), lane(B, num_slots=2)], A) == 1
    assert route([lane(A, A, A, num_slots=2), lane(B, B, num_slots=2)], A) == 1


@given(st.lists(st.integers(0, 7), max_size=60), st.integers(1, 5))
def test_however_requests_come_the_lanes_share_the_vectors(names: list[int], num_lanes: int) -> None:
    """With free slots everywhere and nobody leaving, no lane has two vectors more than another."""
    busy: list[dict[AdapterVector, int]] = [{} for _ in range(num_lanes)]
    for name in names:
        vector = ((str(name), 1.0),)
        chosen = busy[route([LaneView(64, vectors) for vectors in busy], vector)]
        chosen[vector] = chosen.get(vector, 0) + 1
    assert max(map(len, busy)) - min(map(len, busy)) <= 1
    assert sum(map(len, busy)) == len(set(names)), "and no vector is in two lanes"


def test_a_known_prefix_is_worth_four_vectors_at_most() -> None:
    four: list[AdapterVector] = [((f"v{number}", 1.0),) for number in range(4)]
    assert route([lane(D), lane(*four, num_known=MAX_KNOWN_TOKENS)], A) == 1
    assert route([lane(D), lane(*four, B, D, num_known=MAX_KNOWN_TOKENS)], A) == 0


@pytest.mark.parametrize(
    ("n_threads", "loads", "shares"),
    [
        (2, {0: 5}, {0: 2}),
        (2, {0: 7, 1: 1}, {0: 1, 1: 1}),
        (2, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 2: 1}),
        (8, {0: 4, 1: 4}, {0: 4, 1: 4}),
        (8, {0: 7, 1: 1}, {0: 7, 1: 1}),
        (5, {1: 3, 2: 3}, {1: 3, 2: 2}),
        (4, {}, {}),
    ],
)
def test_threads_are_shared_by_the_number_of_sequences_at_least_one_each(
    n_threads: int, loads: dict[int, int], shares: dict[int, int]
) -> None:
    assert share_threads(n_threads, loads) == shares


@given(st.integers(1, 64), st.dictionaries(st.integers(0, 15), st.integers(1, 256), min_size=1))
def test_no_thread_is_left_over_and_none_is_given_twice(n_threads: int, loads: dict[int, int]) -> None:
    shares = share_threads(n_threads, loads)
    assert shares.keys() == loads.keys()
    assert min(shares.values()) >= 1
    assert sum(shares.values()) == max(n_threads, len(loads))
