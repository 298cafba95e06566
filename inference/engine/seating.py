"""Which waiting requests get a slot, and which: where most of their prompt is computed already.

Pure functions over integers, called by the scheduler. A slot holds the tokens of its sequence, also when it has ended,
until another needs it. Taking over such a slot costs nothing; copying a busy one costs a copy of its whole stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from inference.engine.plan import Candidate, ScheduleView, Seat
from inference.engine.slots import SlotName, best_free
from inference.engine.types import AdapterVector

MIN_SHARED_TOKENS = 64
"""A prompt waits for another that is being computed if they share so many tokens."""
MIN_SAVED_TOKENS = 8
"""It waits for as long as that saves so many tokens more than it could reuse now: the other computes them anyway."""
MAX_WAIT_STEPS = 256
"""It waits no longer than for so many steps after its arrival."""
MIN_COPY_TOKENS = 16
CONTEXT_PER_COPY_TOKEN = 64
"""Copying a slot of 4,096 tokens took about as long as computing 10; a copy must save several times that."""


def seat(view: ScheduleView) -> tuple[tuple[Seat, ...], tuple[Candidate, ...]]:
    """Seats for waiting requests, first come first served, and these requests as they are once they sit; then for
    parked sequences, but first for those that were parked too long ago.

    One that shares a long prefix with a prompt being computed is passed over until that has got so far, and one that
    waits for a slot of its scope until that is free. The former has a slot all the same, if one was made for it: parked
    sequences leave it alone.
    """
    free = set(view.free_slots)
    busy, names = dict(view.busy), dict(view.names)
    kept: dict[int, int] = {}  # tokens that slots taken in this plan still have of what they held
    computing = {each.request_id for each in view.running if not each.is_decoding}
    parked = frozenset(each.request_id for each in view.parked)
    num_coming = 0  # those that are passed over for a prefix
    seats, seated = [], []
    for candidate in (*view.parked[: view.num_overdue], *view.waiting, *view.parked[view.num_overdue :]):
        if len(free) <= (num_coming if candidate.request_id in parked else 0):
            break
        usable = {slot: min(number, kept.get(slot, number)) for slot, number in candidate.prefixes.items()}
        if _waits(candidate, computing, max(*usable.values(), candidate.stored, 0), view.step):
            num_coming += not candidate.is_patient
            continue
        choices = _choices(candidate, free, names)
        if not choices:
            continue
        spare = _victim(choices, busy, candidate.adapters, usable, view)
        if candidate.request_id in parked:
            chosen = Seat(candidate.request_id, spare, is_resumed=True)
        else:
            chosen = _choose(candidate, usable, choices, spare, view)
        number = candidate.number if candidate.number is not None else _number(candidate, chosen.slot_id, names, view)
        chosen = replace(chosen, number=number)
        names[chosen.slot_id] = candidate.scope, number
        busy[chosen.slot_id] = candidate.adapters
        free.remove(chosen.slot_id)
        kept[chosen.slot_id] = 0 if chosen.copy_from is not None or chosen.is_restored else chosen.num_cached
        if not candidate.is_decoding:
            computing.add(candidate.request_id)
        seats.append(chosen)
        seated.append(candidate.after_reuse(chosen.num_cached))
    return tuple(seats), tuple(seated)


def copy_threshold(n_ctx: int) -> int:
    """Tokens that a copy of a slot must save; the cost of a copy follows the context, not the prefix."""
    return max(MIN_COPY_TOKENS, n_ctx // CONTEXT_PER_COPY_TOKEN)


def _choices(candidate: Candidate, free: Set[int], names: Mapping[int, SlotName]) -> Set[int]:
    """The free slots that it may have. One that names a slot of its scope gets that alone. If the scope has none of
    this number, it gets one that is not the scope's, so that its others stay as they are; or any, rather than wait for
    another tenant.
    """
    if candidate.number is None:
        return free
    named = {slot for slot, name in names.items() if name == (candidate.scope, candidate.number)}
    if named:
        return free & named
    return {slot for slot in free if slot not in names or names[slot][0] != candidate.scope} or free


def _number(candidate: Candidate, slot_id: int, names: Mapping[int, SlotName], view: ScheduleView) -> int:
    """What a scope calls a slot that it takes: as before, if it was its own, else the first number that it has not."""
    own = {slot: number for slot, (scope, number) in names.items() if scope == candidate.scope}
    if slot_id in own:
        return own[slot_id]
    return next(number for number in range(view.num_slots) if number not in own.values())


def _waits(candidate: Candidate, computing: Iterable[str], num_usable: int, step: int) -> bool:
    """Whether a prompt that is being computed will save it more tokens than it could reuse now."""
    if step - candidate.arrived_step >= MAX_WAIT_STEPS:
        return False
    coming = max((candidate.shared.get(request_id, 0) for request_id in computing), default=0)
    return coming >= MIN_SHARED_TOKENS and coming - num_usable >= MIN_SAVED_TOKENS


def _choose(candidate: Candidate, usable: Mapping[int, int], free: Set[int], spare: int, view: ScheduleView) -> Seat:
    """The free slot that has most of the prompt; or a copy of a slot that has far more, or a stored state that has far
    more still; without any of them, the emptiest.

    A slot is taken over only if it keeps at least half of what it holds: otherwise a conversation that goes on would be
    lost to a prompt that shares its beginning, and a copy into another slot, the spare one, serves both.
    """
    fitting = [slot for slot in free if slot == spare or 2 * usable.get(slot, 0) >= view.held.get(slot, 0)]
    target = max(fitting, key=lambda slot: (usable.get(slot, 0), slot == spare, -slot))
    source = max(usable, key=lambda slot: usable[slot], default=target)
    threshold = copy_threshold(view.n_ctx)
    if candidate.stored - usable.get(source, 0) >= threshold:
        return Seat(candidate.request_id, spare, candidate.stored, is_restored=True)
    if usable.get(source, 0) - usable.get(target, 0) >= threshold:
        return Seat(candidate.request_id, spare, usable[source], copy_from=source)
    return Seat(candidate.request_id, target, usable.get(target, 0))


def _victim(
    free: Set[int],
    busy: Mapping[int, AdapterVector],
    adapters: AdapterVector,
    usable: Mapping[int, int],
    view: ScheduleView,
) -> int:
    """The free slot to lose: an empty one, else of the half that was used longest ago the one that has most of the
    prompt, be it little; beside others of its vector."""
    if empty := {slot for slot in free if not view.held.get(slot)}:
        return best_free(empty, busy, adapters)
    oldest = sorted(free, key=lambda slot: view.used.get(slot, -1))[: (len(free) + 1) // 2]
    most = max(usable.get(slot, 0) for slot in oldest)
    return best_free({slot for slot in oldest if usable.get(slot, 0) == most}, busy, adapters)
