"""The policy: which waiting requests get a slot, and how many tokens of which sequence go into the next step.

A pure function from ScheduleView to StepPlan: no clock, no model, no state. Called by the engine once per step.
"""

from __future__ import annotations

from collections.abc import Sequence

from inference.engine.drafting import DraftLengths, lengths
from inference.engine.plan import Candidate, ScheduleView, StepPlan
from inference.engine.seating import MIN_SHARED_TOKENS, seat
from inference.engine.turns import next_vector

MAX_PATIENCE_STEPS = 8
"""So many steps a sequence that nobody waits for is left out, at most."""
PROMPTS_FIRST = 2
"""A step may take so many times as long while several sequences, and more than decode, wait for a first token."""
MIN_PREFILL_TOKENS = 8
"""Prompt tokens a step may always carry, however long its decoding sequences take: a prompt never starves."""


def schedule(view: ScheduleView) -> StepPlan:
    """Seat the waiting; then every decoding sequence, with a draft where it pays; then prompt chunks in the time left.

    Prompt tokens are limited so that the step is expected to take view.step_seconds at most, or PROMPTS_FIRST times
    that: one long step gives first tokens sooner than several short ones. Half of them go to the oldest unfinished
    prompt, so that none starves; the rest to the shortest first, so that a short prompt does not wait behind a long
    one. A step carries sequences of one adapter vector; which, turns.py says.
    """
    seats, seated = seat(view)
    candidates = _in_turn((*view.running, *seated), view)
    if not candidates:
        return StepPlan()
    adapters = next_vector(candidates, view.turn, view.step)
    group = [candidate for candidate in candidates if candidate.adapters == adapters]
    num_tokens = _decode(group, view.max_step_tokens)
    prompts = [candidate for candidate in group if not candidate.is_decoding]
    drafts = _drafts(view, num_tokens, prompts) if view.draftable else DraftLengths()
    if prompts:
        seconds = view.step_seconds * (PROMPTS_FIRST if len(prompts) > max(1, len(num_tokens)) else 1)
        budget = _prefill_budget(view, sum(num_tokens.values()) + sum(drafts.num_drafted.values()), seconds)
        num_tokens |= _prefill(prompts, budget, view.max_chunk_tokens)
    return StepPlan(seats, num_tokens, adapters, drafts.num_drafted, drafts.probe_seconds)


def _in_turn(candidates: Sequence[Candidate], view: ScheduleView) -> Sequence[Candidate]:
    """While somebody waits for a first token, whoever is patient stands back; for MAX_PATIENCE_STEPS at a stretch, and
    not one whose prompt begins like that of somebody who waits and is not: such a one waits for it (seating.py)."""
    if all(each.is_patient or each.is_decoding for each in candidates):
        return candidates
    overdue = view.step - MAX_PATIENCE_STEPS
    urgent = (each for each in view.waiting if not each.is_patient)
    awaited = {other for each in urgent for other, number in each.shared.items() if number >= MIN_SHARED_TOKENS}
    return [
        each
        for each in candidates
        if not each.is_patient or each.request_id in awaited or max(each.last_step, each.arrived_step) < overdue
    ]


def _decode(group: Sequence[Candidate], most: int) -> dict[str, int]:
    """All pending tokens of the decoding sequences; those carried least recently first, if they do not all fit."""
    planned: dict[str, int] = {}
    for candidate in sorted((each for each in group if each.is_decoding), key=lambda each: each.last_step):
        if candidate.num_pending <= most:
            planned[candidate.request_id] = candidate.num_pending
            most -= candidate.num_pending
    return planned


def _drafts(view: ScheduleView, num_decode: dict[str, int], prompts: Sequence[Candidate]) -> DraftLengths:
    """How long the drafts of these decoding sequences are. A prompt's token is worth as much as an answer's, and is
    certain: beside a prompt that fills the step, drafts must be nearly so."""
    wanted = {each: view.draftable[each] for each in num_decode if each in view.draftable}
    num_decoding = sum(num_decode.values())
    pending = sum(min(each.num_pending, view.max_chunk_tokens) for each in prompts)
    num_useful = num_decoding + min(pending, _prefill_budget(view, num_decoding, view.step_seconds))
    room = view.max_step_tokens - num_decoding - (MIN_PREFILL_TOKENS if prompts else 0)
    return lengths(wanted, view.draft_terms, view.cost, num_useful=num_useful, room=max(room, 0), turn=view.step)


def _prefill_budget(view: ScheduleView, num_decode: int, seconds: float) -> int:
    """Prompt tokens that fit into a step of so many seconds beside num_decode others, in time and in the batch."""
    in_time = view.cost.tokens_within(seconds, view.max_step_tokens) - num_decode
    return min(max(in_time, MIN_PREFILL_TOKENS), view.max_step_tokens - num_decode)


def _prefill(prompts: Sequence[Candidate], budget: int, most: int) -> dict[str, int]:
    """Share the budget over unfinished prompts, given in order of arrival; prompts that get nothing are left out."""
    if budget < 1:
        return {}
    oldest = prompts[0]
    planned = {oldest.request_id: min(oldest.num_pending, (budget + 1) // 2, most)}
    left = budget - planned[oldest.request_id]
    for candidate in sorted(prompts, key=lambda each: each.num_pending):
        already = planned.get(candidate.request_id, 0)
        extra = min(candidate.num_pending - already, left, most - already)
        if extra > 0:
            planned[candidate.request_id] = already + extra
            left -= extra
    return planned
