"""The policy, as tables of integers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engine.costs import CostCurve
from inference.engine.plan import Candidate, ScheduleView, Seat, Turn
from inference.engine.scheduler import MAX_PATIENCE_STEPS, MIN_PREFILL_TOKENS, PROMPTS_FIRST, schedule

pytestmark = pytest.mark.unit

ONE_MS_A_TOKEN = CostCurve(((1, 0.001), (256, 0.256)))


def prompt(request_id: str, num_pending: int, **fields: Any) -> Candidate:
    return Candidate(request_id, num_pending, **fields)


def decoding(request_id: str, num_pending: int = 1, **fields: Any) -> Candidate:
    return Candidate(request_id, num_pending, is_decoding=True, **fields)


def view(**fields: Any) -> ScheduleView:
    return ScheduleView(**{"num_slots": 8, "cost": ONE_MS_A_TOKEN, **fields})


def test_nothing_to_do_is_an_empty_plan() -> None:
    plan = schedule(view(free_slots=frozenset({0, 1})))
    assert (plan.seats, plan.num_tokens, plan.adapters) == ((), {}, ())


def test_the_waiting_are_seated_first_come_first_served_while_slots_last() -> None:
    plan = schedule(view(waiting=(prompt("a", 5), prompt("b", 5), prompt("c", 5)), free_slots=frozenset({4, 6})))
    assert plan.seats == (Seat("a", 4), Seat("b", 6))
    assert plan.num_tokens == {"a": 5, "b": 5}


def test_the_waiting_wait_when_no_slot_is_free() -> None:
    plan = schedule(view(running=(decoding("a"),), waiting=(prompt("b", 5),)))
    assert plan.seats == ()
    assert plan.num_tokens == {"a": 1}


def test_every_decoding_sequence_is_in_every_step() -> None:
    plan = schedule(view(running=tuple(decoding(f"r{i}") for i in range(8))))
    assert plan.num_tokens == {f"r{i}": 1 for i in range(8)}


def test_a_prompt_chunk_fills_what_decoding_leaves_of_the_step() -> None:
    running = (*(decoding(f"d{i}") for i in range(4)), prompt("p", 1000))
    plan = schedule(view(running=running, step_seconds=0.1))
    assert plan.num_tokens == {"d0": 1, "d1": 1, "d2": 1, "d3": 1, "p": 96}


def test_a_prompt_gets_a_few_tokens_even_when_decoding_alone_overruns_the_step() -> None:
    plan = schedule(view(running=(decoding("d"), prompt("p", 1000)), step_seconds=0.0))
    assert plan.num_tokens == {"d": 1, "p": MIN_PREFILL_TOKENS}


def test_a_chunk_never_exceeds_the_batch() -> None:
    plan = schedule(view(running=(decoding("d"), prompt("p", 1000)), cost=CostCurve(), max_step_tokens=64))
    assert plan.num_tokens == {"d": 1, "p": 63}


def test_a_chunk_of_one_prompt_is_bounded_and_the_rest_goes_to_others() -> None:
    running = (prompt("a", 1000), prompt("b", 1000), prompt("c", 10))
    plan = schedule(view(running=running, cost=CostCurve(), max_step_tokens=512, max_chunk_tokens=63))
    assert plan.num_tokens == {"a": 63, "b": 63, "c": 10}


def test_a_batch_full_of_decoding_sequences_leaves_no_room_for_prompts() -> None:
    plan = schedule(view(running=(decoding("a"), decoding("b"), prompt("p", 9)), max_step_tokens=2))
    assert plan.num_tokens == {"a": 1, "b": 1}


def test_draft_verification_is_just_another_number() -> None:
    plan = schedule(view(running=(decoding("plain"), decoding("drafting", 5))))
    assert plan.num_tokens == {"plain": 1, "drafting": 5}


def test_when_not_all_fit_the_least_recently_carried_go_first() -> None:
    running = (decoding("a", 3, last_step=9), decoding("b", 3, last_step=8), decoding("c", 3, last_step=7))
    assert schedule(view(running=running, max_step_tokens=6)).num_tokens == {"c": 3, "b": 3}


def test_a_lone_prompt_gets_the_whole_budget() -> None:
    assert schedule(view(running=(prompt("p", 1000),))).num_tokens == {"p": 100}


def test_the_oldest_prompt_gets_half_and_the_shortest_the_rest() -> None:
    running = (prompt("old and long", 1000), prompt("long", 900), prompt("short", 30))
    plan = schedule(view(running=running, step_seconds=0.1 / PROMPTS_FIRST))
    assert plan.num_tokens == {"old and long": 50, "short": 30, "long": 20}


def test_what_the_others_leave_goes_back_to_the_oldest() -> None:
    running = (prompt("old", 1000), prompt("short", 10))
    plan = schedule(view(running=running, step_seconds=0.1 / PROMPTS_FIRST))
    assert plan.num_tokens == {"old": 90, "short": 10}


def test_equal_prompts_are_finished_in_order_of_arrival() -> None:
    running = tuple(prompt(name, 100) for name in "abc")
    assert schedule(view(running=running, step_seconds=0.1 / PROMPTS_FIRST)).num_tokens == {"a": 100}


@pytest.mark.parametrize(
    ("num_decoding", "num_prompts", "tokens"), [(0, 1, 100), (0, 2, 200), (1, 2, 200), (2, 2, 100), (4, 1, 100)]
)
def test_a_step_is_longer_while_most_sequences_wait_for_their_first_token(
    num_decoding: int, num_prompts: int, tokens: int
) -> None:
    running = (*(decoding(f"d{i}") for i in range(num_decoding)), *(prompt(f"p{i}", 1000) for i in range(num_prompts)))
    assert sum(schedule(view(running=running)).num_tokens.values()) == tokens


def test_a_step_carries_one_adapter_vector_and_the_longest_waiting_one_is_next() -> None:
    poet, clerk = (("poet", 1.0),), (("clerk", 0.5),)
    running = (decoding("a", adapters=poet, last_step=7), decoding("b", adapters=clerk, last_step=6))
    plan = schedule(view(running=running))
    assert (plan.adapters, plan.num_tokens) == (clerk, {"b": 1})


def test_sequences_of_one_adapter_vector_share_a_step() -> None:
    poet = (("poet", 1.0),)
    running = (decoding("a", adapters=poet, last_step=2), decoding("b", last_step=3), prompt("c", 5, adapters=poet))
    plan = schedule(view(running=running, turn=Turn(poet, 1)))
    assert (plan.adapters, plan.num_tokens) == (poet, {"a": 1, "c": 5})


candidates = st.lists(
    st.builds(
        lambda **fields: Candidate(**fields),  # of a named tuple, hypothesis would invent the fields left out
        request_id=st.uuids().map(str),
        num_pending=st.integers(1, 2000),
        is_decoding=st.booleans(),
        adapters=st.sampled_from([(), (("a", 1.0),), (("b", 0.5),)]),
        last_step=st.integers(-1, 5),
    ).map(lambda c: Candidate(c.request_id, 1, True, c.adapters, c.last_step) if c.is_decoding else c),
    max_size=12,
    unique_by=lambda candidate: candidate.request_id,
)


@given(candidates, candidates, st.sets(st.integers(0, 15)), st.floats(0.0, 1.0), st.integers(16, 512))
def test_every_plan_keeps_the_rules(
    running: list[Candidate], waiting: list[Candidate], free: set[int], seconds: float, most: int
) -> None:
    given_view = view(
        running=tuple(running),
        waiting=tuple(waiting),
        free_slots=frozenset(free),
        num_slots=16,
        step_seconds=seconds,
        max_step_tokens=most,
    )
    plan = schedule(given_view)
    known = {candidate.request_id: candidate for candidate in (*running, *waiting)}
    assert [seat.request_id for seat in plan.seats] == [each.request_id for each in waiting[: len(free)]]
    assert {seat.slot_id for seat in plan.seats} <= free
    assert len({seat.slot_id for seat in plan.seats}) == len(plan.seats)
    may_run = {candidate.request_id for candidate in running} | {seat.request_id for seat in plan.seats}
    assert plan.num_tokens.keys() <= may_run
    assert bool(plan.num_tokens) == bool(may_run)
    assert sum(plan.num_tokens.values()) <= most
    for request_id, num_tokens in plan.num_tokens.items():
        candidate = known[request_id]
        assert 1 <= num_tokens <= candidate.num_pending
        assert candidate.adapters == plan.adapters
        assert not candidate.is_decoding or num_tokens == candidate.num_pending
    prompt_tokens = sum(tokens for name, tokens in plan.num_tokens.items() if not known[name].is_decoding)
    if prompt_tokens > MIN_PREFILL_TOKENS:
        assert given_view.cost.seconds(sum(plan.num_tokens.values())) <= seconds * PROMPTS_FIRST


def test_whoever_is_patient_stands_back_while_somebody_waits_for_a_first_token() -> None:
    running = (
        decoding("batch", is_patient=True, last_step=9),
        prompt("line", 50, is_patient=True, last_step=9),
        decoding("d", last_step=9),
        prompt("p", 20, arrived_step=10),
    )
    assert schedule(view(running=running, step=10)).num_tokens == {"d": 1, "p": 20}
    assert schedule(view(running=running[:3], step=10)).num_tokens == {"batch": 1, "d": 1, "line": 50}


def test_a_patient_prompt_that_somebody_waits_for_does_not_stand_back() -> None:
    line, other = prompt("line", 50, is_patient=True, last_step=9), prompt("p", 20, arrived_step=10)
    free: dict[str, Any] = {"running": (line, other), "free_slots": frozenset({0}), "step": 10}
    for shared, is_patient, carried in [(100, False, {"line", "p"}), (100, True, {"p"}), (10, False, {"p", "new"})]:
        new = prompt("new", 120, shared={"line": shared}, is_patient=is_patient, arrived_step=10)
        assert schedule(view(waiting=(new,), **free)).num_tokens.keys() == carried


def test_patience_ends() -> None:
    running = (decoding("batch", is_patient=True, last_step=9), prompt("p", 20, arrived_step=10))
    carried = [step for step in range(10, 60) if "batch" in schedule(view(running=running, step=step)).num_tokens]
    assert carried == list(range(9 + MAX_PATIENCE_STEPS + 1, 60))


def test_patient_sequences_alone_are_like_any_others() -> None:
    running = (decoding("a", is_patient=True), prompt("b", 5, is_patient=True))
    assert schedule(view(running=running)).num_tokens == {"a": 1, "b": 5}
