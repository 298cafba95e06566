"""States of slots that had to make room, kept in memory until a prompt that begins like one of them comes.

A pure policy over bytes and tokens, on the engine's thread: the least recently used goes first, and no scope keeps more
than half of the room. Who fills it, and when that is worth its time, is decided in slot_keeper.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inference.engine.prefix import CacheKey, common_prefix
from inference.engine.slots import SlotName


@dataclass(frozen=True, slots=True, eq=False)
class StoredState:
    """Tokens that a slot held, computed under a key, as a backend saved them. number: what its scope calls the slot."""

    key: CacheKey
    number: int
    tokens: list[int]
    state: bytes

    @property
    def name(self) -> SlotName:
        return self.key[0], self.number


class StateStore:
    """At most max_bytes of states. version changes with the content, so that answers can be remembered."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.version = 0
        self._entries: dict[int, StoredState] = {}  # by id, least recently used first
        self._left: dict[SlotName, int] = {}  # of slots that made room, the id of what they held last

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[StoredState]:
        """Latest use first."""
        return reversed(list(self._entries.values()))

    def reserve(self, num_bytes: int) -> None:
        """So many bytes of the room are for others from now on; a negative number gives them back."""
        self.max_bytes -= num_bytes
        self._make_room(0, self.max_bytes)

    def put(self, entry: StoredState) -> bool:
        """Keep it, and drop what it makes superfluous: states that it begins with, and those that must make room.

        False where it is too large, or one that is kept begins with all of it.
        """
        self.release(entry.name)
        if len(entry.state) > self.max_bytes // 2:
            return False
        own = [each for each in self._entries.values() if each.key == entry.key]
        for each in own:
            if each.tokens[: len(entry.tokens)] == entry.tokens:
                if len(each.tokens) == len(entry.tokens):
                    self._left[entry.name] = id(each)
                return False
        for each in own:
            if entry.tokens[: len(each.tokens)] == each.tokens:
                self._drop(each)
        self._make_room(len(entry.state), self.max_bytes // 2, entry.key[0])
        self._make_room(len(entry.state), self.max_bytes)
        self._entries[id(entry)] = entry
        self._left[entry.name] = id(entry)
        self.num_bytes += len(entry.state)
        self.version += 1
        return True

    def find(self, key: CacheKey, prompt: list[int]) -> tuple[StoredState, int] | None:
        """The state that has most of the prompt's first tokens under this key, and how many; None where none has."""
        entries = tuple(self._entries.values())  # a copy at once: routing asks from other threads
        found = [(common_prefix(prompt, each.tokens), each) for each in entries if each.key == key]
        number, entry = max(found, key=lambda pair: pair[0], default=(0, None))
        return (entry, number) if entry is not None and number else None

    def latest(self, name: SlotName) -> StoredState | None:
        """What the scope's slot of this number held last, if it had to make room."""
        return self._entries.get(self._left.get(name, 0))

    def release(self, name: SlotName) -> None:
        """The scope's slot of this number holds something else from now on: what it has left here is no longer what it
        held last, and stays for prompts that begin like it."""
        self._left.pop(name, None)

    def touch(self, entry: StoredState) -> None:
        """It was of use just now."""
        self._entries[id(entry)] = self._entries.pop(id(entry))

    def forget(self, entry: StoredState) -> None:
        if id(entry) in self._entries:
            self._drop(entry)

    def forget_slot(self, scope: str, number: int, tokens: list[int]) -> None:
        """Forget what the scope's slot of this number held, and every state of the scope that begins like these tokens:
        of their prompt nothing is found here any more."""
        for each in list(self._entries.values()):
            if each.key[0] == scope and (each.number == number or (tokens and each.tokens[:1] == tokens[:1])):
                self._drop(each)

    def _make_room(self, num_bytes: int, limit: int, scope: str | None = None) -> None:
        of_scope = [each for each in self._entries.values() if scope is None or each.key[0] == scope]
        total = num_bytes + sum(len(each.state) for each in of_scope)
        for each in of_scope:
            if total <= limit:
                return
            self._drop(each)
            total -= len(each.state)

    def _drop(self, entry: StoredState) -> None:
        del self._entries[id(entry)]
        for name in [name for name, left in self._left.items() if left == id(entry)]:
            del self._left[name]
        self.num_bytes -= len(entry.state)
        self.version += 1
