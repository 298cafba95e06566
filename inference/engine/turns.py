"""Whose turn it is: a step carries one adapter vector, and busy vectors take turns of several steps.

Pure functions over integers and seconds, called by the scheduler. Changing the vector costs about 4 ms (llama.cpp
reserves its graph again): with turns of 1, 4 and 16 steps eight sequences over two vectors made 151, 178 and 185 tokens
a second. So turns are as long as waiting allows, and shorter the more vectors wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from inference.engine.plan import Candidate, Turn
from inference.engine.types import AdapterVector

ROUND_STEPS = 32
"""Steps in which every busy vector has had a turn, for as many vectors as MIN_STEPS allows."""
MIN_STEPS = 4
TURN_SECONDS = 0.25
"""A turn ends after this, however few steps it has had: prompts and large models make steps long."""
URGENT_STEPS = 2
"""Steps that a turn still has when another vector's prompt waits for its first token."""
OVERDUE_ROUNDS = 2
"""A vector that was passed over for so many rounds goes before any first token."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The candidates of one vector. since: the step in which one of them was carried last, or else arrived."""

    adapters: AdapterVector
    since: int
    is_urgent: bool
    has_prompt: bool


def next_vector(candidates: Sequence[Candidate], turn: Turn, step: int) -> AdapterVector:
    """The vector of the step with this number. candidates: all that have a slot, at least one.

    The turn goes on while it has work and is not used up. Then follows a vector that is overdue, else one whose new
    prompt waits for its first token, else the one that was left out the longest. With k busy vectors none is left out
    for more than about OVERDUE_ROUNDS + 1 rounds of k turns.
    """
    if all(candidate.adapters == turn.adapters for candidate in candidates):
        return turn.adapters  # as in nearly every step, and groups take several times as long
    groups = _groups(candidates)
    others = [group for group in groups if group.adapters != turn.adapters]
    own = next((group for group in groups if group.adapters == turn.adapters), None)
    if own and not (others and _is_over(own, others, turn)):
        return own.adapters
    return min(others, key=lambda group: _rank(group, len(groups), step)).adapters


def turn_steps(num_vectors: int) -> int:
    """How many steps a turn has when so many vectors are busy."""
    return max(MIN_STEPS, ROUND_STEPS // num_vectors)


def _is_over(own: _Group, others: Iterable[_Group], turn: Turn) -> bool:
    others = list(others)
    if turn.seconds >= TURN_SECONDS or turn.num_steps >= turn_steps(len(others) + 1):
        return True
    is_asked_for = any(group.is_urgent for group in others)
    return is_asked_for and not own.has_prompt and turn.num_steps >= URGENT_STEPS


def _rank(group: _Group, num_vectors: int, step: int) -> tuple[int, int]:
    """Small goes first; among equals the one that waits since the earliest step."""
    overdue = step - group.since > OVERDUE_ROUNDS * num_vectors * turn_steps(num_vectors)
    return (0 if overdue else 1 if group.is_urgent else 2), group.since


def _groups(candidates: Iterable[Candidate]) -> list[_Group]:
    """By vector, in the order in which their first candidates came."""
    members: dict[AdapterVector, list[Candidate]] = {}
    for candidate in candidates:
        members.setdefault(candidate.adapters, []).append(candidate)
    return [
        _Group(
            adapters,
            since=_since(group),
            is_urgent=any(not each.is_decoding and each.last_step < 0 for each in group),
            has_prompt=any(not each.is_decoding for each in group),
        )
        for adapters, group in members.items()
    ]


def _since(group: Sequence[Candidate]) -> int:
    carried = max(each.last_step for each in group)
    return carried if carried >= 0 else min(each.arrived_step for each in group)
