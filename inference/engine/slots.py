"""Which slot is whose. A slot is a native sequence id with room for n_ctx tokens.

Plain integers on the engine's thread. The scheduler asks with `best_free`, the engine acts with `take` and `give_back`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from inference.engine.prefix import Held
from inference.engine.types import AdapterVector

SlotName = tuple[str | None, int]
"""A scope, and its number for a slot. Every scope counts its own slots, and knows nothing of those of others: a slot
that another takes has no number any more, and what it is called by then says nothing of who else is there."""


class SlotTable:
    """The slots 0..num_slots-1, the request each one serves, and what the free ones still hold."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError("an engine needs at least one slot")
        self.num_slots = num_slots
        self._owners: dict[int, str] = {}
        self.held: dict[int, Held] = {}
        self.names: dict[int, SlotName] = {}  # of slots that are busy or hold something

    @property
    def num_busy(self) -> int:
        return len(self._owners)

    @property
    def free(self) -> frozenset[int]:
        return frozenset(range(self.num_slots)) - self._owners.keys()

    def take(self, slot_id: int, request_id: str, name: SlotName = (None, 0)) -> None:
        """Give a free slot to a request. Raises ValueError for a slot that is busy or does not exist."""
        if slot_id not in self.free:
            raise ValueError(f"slot {slot_id} is not free")
        self._owners[slot_id] = request_id
        self.held.pop(slot_id, None)
        self.names[slot_id] = name

    def give_back(self, slot_id: int, request_id: str, held: Held | None = None) -> None:
        """Free a slot, which goes on holding these tokens. Raises ValueError unless the request owns it."""
        if self._owners.get(slot_id) != request_id:
            raise ValueError(f"slot {slot_id} does not belong to request {request_id}")
        name = self.names[slot_id]
        del self._owners[slot_id]
        self.forget(slot_id)
        if held is not None and held.tokens:
            self.hold(slot_id, held, name)

    def hold(self, slot_id: int, held: Held, name: SlotName) -> None:
        """A free slot holds these tokens from now on, for whoever calls it so."""
        self.held[slot_id] = held
        self.names[slot_id] = name

    def forget(self, slot_id: int) -> None:
        """A free slot holds nothing, and is nobody's."""
        self.held.pop(slot_id, None)
        self.names.pop(slot_id, None)

    def clear(self) -> None:
        """All slots are free, and nobody knows what they hold."""
        self._owners.clear()
        self.held.clear()
        self.names.clear()

    def owner(self, slot_id: int) -> str | None:
        """The request that a slot serves, None for a free one."""
        return self._owners.get(slot_id)

    def find(self, name: SlotName) -> int | None:
        """The slot that is called so, None if none is."""
        return next((slot_id for slot_id, known in self.names.items() if known == name), None)


def best_free(among: Set[int], busy: Mapping[int, AdapterVector], adapters: AdapterVector) -> int:
    """Of these free slots, at least one, the one for a sequence of this vector: beside most others of its own vector,
    else as far from all others as can be, the lowest of equals. busy: the vector of each slot that is taken.

    llama.cpp computes sequences together only where their ids are consecutive; a hole costs a graph of its own (four
    sequences in slots 0, 2, 4, 6 took 22 ms a step, in 0 to 3 they took 13).
    """

    def rank(slot_id: int) -> tuple[int, int, int]:
        own = sum(busy.get(neighbour) == adapters for neighbour in (slot_id - 1, slot_id + 1))
        return -own, -min((abs(slot_id - other) for other in busy), default=0), slot_id

    return min(among, key=rank)
