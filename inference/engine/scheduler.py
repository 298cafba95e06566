"""The policy: which waiting requests get a slot, and how many tokens of which sequence go into the next step.

A pure function from ScheduleView to StepPlan: no clock, no model, no state. Called by the engine once per step.
"""

from __future__ import annotations

from collections.abc import Sequence

from inference.engine.plan import Candidate, ScheduleView, StepPlan
from inference.engine.slots import best_free
from inference.engine.turns import next_vector

MIN_PREFILL_TOKENS = 8
"""Prompt tokens a step may always carry, however long its decoding sequences take: a prompt never starves."""


def schedule(view: ScheduleView) -> StepPlan:
    """Seat the waiting, first come first served; then every decoding sequence; then prompt chunks in the time left.

    Prompt tokens are limited so that the step is expected to take view.step_seconds at most. Half of them go to the
    oldest unfinished prompt, so that none starves; the rest to the shortest first, so that a short prompt does not wait
    behind a long one. A step carries sequences of one adapter vector; which, turns.py says.
    """
    seats, seated = _seat(view)
    candidates = (*view.running, *seated)
    if not candidates:
        return StepPlan()
    adapters = next_vector(candidates, view.turn, view.step)
    group = [candidate for candidate in candidates if candidate.adapters == adapters]
    num_tokens = _decode(group, view.max_step_tokens)
    budget = _prefill_budget(view, sum(num_tokens.values()))
    num_tokens |= _prefill([candidate for candidate in group if not candidate.is_decoding], budget)
    return StepPlan(seats=seats, num_tokens=num_tokens, adapters=adapters)


def _seat(view: ScheduleView) -> tuple[tuple[tuple[str, int], ...], tuple[Candidate, ...]]:
    """Slots for the first waiting requests, as many as are free."""
    free = set(view.free_slots)
    seats = []
    for candidate in view.waiting:
        slot_id = best_free(free, view.num_slots)
        if slot_id is None:
            break
        free.remove(slot_id)
        seats.append((candidate.request_id, slot_id))
    return tuple(seats), view.waiting[: len(seats)]


def _decode(group: Sequence[Candidate], most: int) -> dict[str, int]:
    """All pending tokens of the decoding sequences; those carried least recently first, if they do not all fit."""
    planned: dict[str, int] = {}
    for candidate in sorted((each for each in group if each.is_decoding), key=lambda each: each.last_step):
        if candidate.num_pending <= most:
            planned[candidate.request_id] = candidate.num_pending
            most -= candidate.num_pending
    return planned


def _prefill_budget(view: ScheduleView, num_decode: int) -> int:
    """Prompt tokens that fit into the step beside num_decode others, in time and in the batch."""
    in_time = view.cost.tokens_within(view.step_seconds, view.max_step_tokens) - num_decode
    return min(max(in_time, MIN_PREFILL_TOKENS), view.max_step_tokens - num_decode)


def _prefill(prompts: Sequence[Candidate], budget: int) -> dict[str, int]:
    """Share the budget over unfinished prompts, given in order of arrival; prompts that get nothing are left out."""
    if not prompts or budget < 1:
        return {}
    oldest = prompts[0]
    planned = {oldest.request_id: min(oldest.num_pending, (budget + 1) // 2)}
    left = budget - planned[oldest.request_id]
    for candidate in sorted(prompts, key=lambda each: each.num_pending):
        already = planned.get(candidate.request_id, 0)
        extra = min(candidate.num_pending - already, left)
        if extra > 0:
            planned[candidate.request_id] = already + extra
            left -= extra
    return planned
