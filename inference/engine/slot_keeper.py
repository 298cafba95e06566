"""What slots hold, in and out of them: states that make room and come back, and slots that are saved, restored, erased.

On the engine's thread, between plan and act. A state moves by Backend.save and Backend.restore, which cost milliseconds
where computing its tokens would cost seconds; whether it is worth that is measured, not assumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from inference.engine.backend import Backend
from inference.engine.prefix import CacheKey, Held
from inference.engine.sequence import Sequence
from inference.engine.slots import SlotName, SlotTable
from inference.engine.state_store import StateStore, StoredState
from inference.engine.types import AdapterVector, EngineError

MIN_KEPT_TOKENS = 64
"""Shorter beginnings are computed again."""
MIN_GAIN = 2.0
"""Computing the tokens must be expected to take so many times as long as saving and restoring them."""
MAX_PAUSE_SECONDS = 0.1
"""Nobody's next token waits longer than this for a state to be saved."""
WEIGHT = 0.3
"""How much the latest measurement counts."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """What a slot holds: tokens, computed under an adapter vector, and the backend's bytes; b"" of no tokens."""

    tokens: tuple[int, ...] = ()
    adapters: AdapterVector = ()
    state: bytes = b""


class SlotKeeper:
    """Between the slots of a backend and the store of what had to leave them."""

    def __init__(
        self,
        backend: Backend,
        slots: SlotTable,
        store: StateStore,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend, self._slots, self._store, self._clock = backend, slots, store, clock
        self._seconds_per_token = 0.0  # of a save and a restore together
        self._bytes_per_token = 0.0

    @property
    def _can_store(self) -> bool:
        abilities = self._backend.abilities
        return self._store.max_bytes > 0 and abilities.save and abilities.trim

    # For prompts

    def num_stored(self, sequence: Sequence) -> int:
        """How many of a waiting prompt's first tokens are in the store, if that is worth a restore. Its last token is
        always computed anew."""
        if sequence.cache_key is None or not len(self._store):
            return 0
        version, number = sequence.stored
        if version != self._store.version:
            found = self._store.find(sequence.cache_key, list(sequence.request.prompt[:-1]))
            number = found[1] if found else 0
            sequence.stored = self._store.version, number
        return number if self._is_worth(number, number) else 0

    def num_found(self, key: CacheKey, prompt: list[int]) -> int:
        """How many first tokens of a prompt are stored. Any thread; a guess."""
        found = self._store.find(key, prompt)
        return found[1] if found else 0

    def forget_states(self, scope: str) -> None:
        """Forget everything that is stored of a scope."""
        for each in self._store:
            if each.key[0] == scope:
                self._store.forget(each)

    def make_room(self, slot_id: int, num_kept: int = 0) -> None:
        """Before a slot is taken: store what it holds, but for its first num_kept tokens, where that is worth it."""
        held = self._slots.held.get(slot_id)
        if held is None or not self._can_store or not self._is_worth(len(held.tokens) - num_kept, len(held.tokens)):
            return
        if self._seconds_per_token / 2 * len(held.tokens) > MAX_PAUSE_SECONDS:
            return
        if self._bytes_per_token * len(held.tokens) <= self._store.max_bytes // 2:
            self._store.put(self._take(slot_id, held))

    def take(self, slot_id: int, request_id: str, name: SlotName) -> None:
        """Give a free slot to a request, and a name: what was called so before holds it no longer."""
        self._slots.take(slot_id, request_id, name)
        self._store.release(name)

    def restore_for(self, sequence: Sequence, slot_id: int) -> int:
        """Let a slot hold the stored state that the prompt begins like; how many of its first tokens that are now."""
        found = self._store.find(sequence.cache_key, list(sequence.request.prompt[:-1])) if sequence.cache_key else None
        if found is None:
            return 0
        entry, number = found
        try:
            self._put_into(slot_id, entry.state, len(entry.tokens))
        except EngineError:
            self._store.forget(entry)
            return 0
        self._store.touch(entry)
        return number

    def _is_worth(self, num_saved: int, num_moved: int) -> bool:
        """Whether moving so many tokens is quicker, by far, than computing those that it saves."""
        if num_saved < MIN_KEPT_TOKENS:
            return False
        return self._backend.cost.seconds(num_saved) > MIN_GAIN * self._seconds_per_token * num_moved

    def _take(self, slot_id: int, held: Held) -> StoredState:
        started = self._clock()
        self._backend.trim(slot_id, len(held.tokens))
        state = self._backend.save(slot_id)
        number = self._slots.names[slot_id][1]
        self._measure(2 * (self._clock() - started), len(held.tokens), len(state))
        return StoredState(held.key, number, list(held.tokens), state)

    def _put_into(self, slot_id: int, state: bytes, num_tokens: int) -> None:
        started = self._clock()
        self._backend.restore(slot_id, state)
        self._measure(2 * (self._clock() - started), num_tokens, len(state))

    def _measure(self, seconds: float, num_tokens: int, num_bytes: int) -> None:
        if num_tokens:
            self._seconds_per_token += WEIGHT * (seconds / num_tokens - self._seconds_per_token)
            self._bytes_per_token = num_bytes / num_tokens

    # For running sequences that make room

    def can_park(self, num_tokens: int) -> bool:
        """Whether there is room for the state of so many tokens, and nobody waits long for it."""
        if not self._can_store or self._seconds_per_token / 2 * num_tokens > MAX_PAUSE_SECONDS:
            return False
        return self._bytes_per_token * num_tokens <= self._store.max_bytes

    def park(self, slot_id: int, num_tokens: int) -> bytes | None:
        """The state of a running sequence, which is kept room for until unpark(); None where it is too large."""
        started = self._clock()
        self._backend.trim(slot_id, num_tokens)
        state = self._backend.save(slot_id)
        self._measure(2 * (self._clock() - started), num_tokens, len(state))
        if len(state) > self._store.max_bytes:
            return None
        self._store.reserve(len(state))
        return state

    def unpark(self, slot_id: int, state: bytes, num_tokens: int) -> None:
        """Let a slot hold a parked state again. Raises EngineError "state_invalid"; then the slot is empty."""
        self.drop_parked(state)
        self._put_into(slot_id, state, num_tokens)

    def drop_parked(self, state: bytes) -> None:
        """Keep no more room for it."""
        self._store.reserve(-len(state))

    # Between two lives of the backend

    def put_back(self, states: Iterable[StoredState]) -> None:
        """Take in what an earlier backend of the same model and options has held, latest use first."""
        if self._can_store:
            for each in reversed(list(states)):
                self._store.put(each)

    def all_states(self) -> Iterator[StoredState]:
        """What free slots hold and what is stored, latest use first, one by one."""
        if not self._can_store:
            return
        for slot_id, held in sorted(self._slots.held.items(), key=lambda item: -item[1].used):
            if len(held.tokens) >= MIN_KEPT_TOKENS:
                yield self._take(slot_id, held)
        yield from self._store

    # For whoever names a slot

    def save(self, name: SlotName) -> SlotState:
        """What the scope's slot holds, or held last if it had to make room; nothing, if it has none of this number."""
        slot_id = self._slots.find(name)
        if slot_id is not None and (held := self._slots.held.get(slot_id)):
            taken = self._take(slot_id, held)
            return SlotState(tuple(taken.tokens), held.key[1], taken.state)
        stored = self._store.latest(name)
        return SlotState() if stored is None else SlotState(tuple(stored.tokens), stored.key[1], stored.state)

    def restore(self, slot_id: int, name: SlotName, saved: SlotState, used: int) -> None:
        """Let a free slot hold a saved state, under this name. Raises EngineError; then it is empty and nobody's."""
        scope, _ = name
        if scope is None:
            raise EngineError("invalid_request", "a slot is restored for a scope")
        if len(saved.tokens) >= self._backend.n_ctx:
            raise EngineError("state_invalid", f"{len(saved.tokens)} tokens do not fit into {self._backend.n_ctx}")
        self._slots.forget(slot_id)
        self._store.release(name)
        self._backend.erase(slot_id)
        if saved.tokens:
            self._put_into(slot_id, saved.state, len(saved.tokens))
            self._slots.hold(slot_id, Held((scope, saved.adapters), list(saved.tokens), used), name)

    def erase(self, name: SlotName) -> int:
        """Forget what the scope's free slot of this number holds, here and in the store; how many tokens it held."""
        scope, number = name
        slot_id = self._slots.find(name)
        held = self._slots.held.get(slot_id) if slot_id is not None else None
        tokens = list(held.tokens) if held else []
        if slot_id is not None:
            self._slots.forget(slot_id)
            self._backend.erase(slot_id)
        if scope is not None:
            stored = self._store.latest(name)
            tokens = tokens or (stored.tokens if stored else [])
            self._store.forget_slot(scope, number, tokens)
        return len(tokens)
