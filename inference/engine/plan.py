"""The forms between engine and scheduler: what could run, and what will run in the next step.

Frozen data, made of integers and ids, so that a policy is tested without a model. The scheduler reads a ScheduleView
and writes a StepPlan; the engine executes the plan without deciding anything more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from inference.engine.costs import CostCurve
from inference.engine.drafting import Draftable, DraftTerms
from inference.engine.slots import SlotName
from inference.engine.types import AdapterVector

NOTHING_SHARED: Mapping[Any, int] = MappingProxyType({})


class Candidate(NamedTuple):
    """A sequence that could be in the next step. A tuple, as every running sequence makes one for each step, and a
    frozen dataclass takes four times as long.

    num_pending: tokens it has that are not computed yet, at least 1. is_decoding: its prompt is done, and all its
    pending tokens belong to one step (the last token, and any drafts). last_step: number of the step that carried it
    last, -1 if none did. arrived_step: number of the step before which it came. is_patient: nobody waits for it.

    Of waiting ones also, all under the same cache key, prefixes: how many of its first tokens, never all, a slot has
    computed; shared: how many it has in common with another request's prompt that is computed now or waits before it;
    scope: whose it is; number: the slot of that scope which it waits for, None for any; stored: how many of its first
    tokens can be restored into any slot.
    """

    request_id: str
    num_pending: int
    is_decoding: bool = False
    adapters: AdapterVector = ()
    last_step: int = -1
    arrived_step: int = 0
    prefixes: Mapping[int, int] = NOTHING_SHARED
    shared: Mapping[str, int] = NOTHING_SHARED
    scope: str | None = None
    number: int | None = None
    stored: int = 0
    is_patient: bool = False

    def after_reuse(self, num_cached: int) -> Candidate:
        """The same once it sits in a slot that has its first num_cached tokens."""
        return self._replace(num_pending=self.num_pending - num_cached) if num_cached else self


@dataclass(frozen=True, slots=True)
class Turn:
    """The adapter vector of the latest step, and the steps and seconds that it has had without a break."""

    adapters: AdapterVector = ()
    num_steps: int = 0
    seconds: float = 0.0

    def after(self, adapters: AdapterVector, seconds: float) -> Turn:
        """The turn after one more step, with this vector and of so many seconds."""
        if adapters != self.adapters:
            return Turn(adapters, 1, seconds)
        return Turn(adapters, self.num_steps + 1, self.seconds + seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleView:
    """Everything a scheduling decision may look at. Running and waiting are in order of arrival.

    step: number of the step to plan. held: tokens that free slots hold; used: the step after which they became free.
    busy: the vector of each slot that is taken. names: of slots that are taken or hold something, whose they are and
    what they are called. parked: sequences that had to leave their slots, the first parked first; num_overdue of them
    go before the waiting. draftable: decoding sequences that could have guesses, on draft_terms.
    """

    running: tuple[Candidate, ...] = ()
    waiting: tuple[Candidate, ...] = ()
    free_slots: frozenset[int] = frozenset()
    held: Mapping[int, int] = field(default_factory=dict)
    used: Mapping[int, int] = field(default_factory=dict)
    busy: Mapping[int, AdapterVector] = field(default_factory=dict)
    names: Mapping[int, SlotName] = field(default_factory=dict)
    num_slots: int = 1
    n_ctx: int = 4096
    max_step_tokens: int = 512
    max_chunk_tokens: int = 512
    step_seconds: float = 0.1
    cost: CostCurve = field(default_factory=CostCurve)
    step: int = 0
    turn: Turn = field(default_factory=Turn)
    parked: tuple[Candidate, ...] = ()
    num_overdue: int = 0
    draftable: Mapping[str, Draftable] = field(default_factory=dict)
    draft_terms: DraftTerms = field(default_factory=DraftTerms)


@dataclass(frozen=True, slots=True)
class Seat:
    """A slot for a waiting request, where its first num_cached tokens are computed; or are, in the slot copy_from.

    is_restored: these tokens come from the store. is_resumed: the request is a parked one, which goes on. number: what
    the request's scope calls the slot from now on.
    """

    request_id: str
    slot_id: int
    num_cached: int = 0
    copy_from: int | None = None
    is_restored: bool = False
    is_resumed: bool = False
    number: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step does.

    seats: of waiting requests that get a slot first, in this order; the engine reads it.
    num_tokens: how many pending tokens of which sequence are computed; engine and backend read it.
    adapters: the one adapter vector of all sequences in the step; the backend reads it.
    num_drafted: of which sequence how many guesses are verified at most, beside num_tokens; the engine asks for them.
    probe_seconds: of the step, what serves to find out whether longer drafts would pay; the engine books it.
    """

    seats: tuple[Seat, ...] = ()
    num_tokens: dict[str, int] = field(default_factory=dict)
    adapters: AdapterVector = ()
    num_drafted: dict[str, int] = field(default_factory=dict)
    probe_seconds: float = 0.0
