"""The text of an answer from where a call may begin, as the readers of the formats go through it.

Readers are generators that yield where they need more text, so they are written as if all of it were there. What they
found stands as soon as it is committed; where one raises Broken, what is behind the last commit is text after all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, TypeGuard

from inference.tools.events import ArgumentsDelta, CallBroken, CallEnded, CallStarted, Event
from inference.tools.json_object import Broken, JsonObject

ARGUMENTS = ("arguments", "parameters")
_BLANKS = re.compile(r"\s*")
MAX_NAME = 128
_NAME = re.compile(rf"[A-Za-z0-9_.:/-]{{1,{MAX_NAME}}}")
_HALF = re.compile("[\ud800-\udfff]")
"""Of a character: JSON can spell it, and no answer can hold it."""
_KNOWN_FIELDS = frozenset({"name", "type", "id", *ARGUMENTS, None})
Reading = Iterator[None]


def _is_name(value: object) -> TypeGuard[str]:
    """What a client can read, and send back."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and value.isprintable()


class Calls:
    """What was told of the calls of one answer; numbers them, over all their readers."""

    def __init__(self, new_id: Callable[[], str], *, eager: bool, names: Collection[str] | None) -> None:
        self.eager = eager
        self.names = names
        self.events: list[Event] = []
        self.num_started = 0
        self.num_ended = 0
        self._new_id = new_id
        self._open: int | None = None
        self._num_told = 0

    def tell(self, name: str, arguments: str) -> None:
        """The arguments as far as they are known: longer each time."""
        if self._open is None:
            self._open, self._num_told = self.num_started, 0
            self.num_started += 1
            self.events.append(CallStarted(self._open, self._new_id(), name))
        if more := arguments[self._num_told :]:
            self.events.append(ArgumentsDelta(self._open, more))
            self._num_told = len(arguments)

    def end(self, name: str, arguments: str) -> None:
        self.tell(name, arguments)
        assert self._open is not None
        self.events.append(CallEnded(self._open))
        self.num_ended += 1
        self._open = None

    def drop(self) -> None:
        """The call that was begun, if any, is none."""
        if self._open is not None:
            self.events.append(CallBroken(self._open))
            self._open = None


class _Head(NamedTuple):
    """The beginning of a call: its name, and where its arguments stand as far as they are there."""

    name: str
    start: int
    end: int


class Tape:
    """`text` grows until is_ended; `position` is where the reader is, `committed` what is read for good."""

    def __init__(self, calls: Calls, text: str, position: int, *, is_ended: bool) -> None:
        self.calls = calls
        self.text = text
        self.position = position
        self.is_ended = is_ended
        self.committed = 0

    def commit(self) -> None:
        self.committed = self.position

    def more(self) -> Reading:
        """Wait for text; raises Broken where none comes."""
        if self.is_ended:
            raise Broken
        yield

    # What stands here

    def blanks(self) -> Reading:
        """Go behind blanks, to something that is none."""
        while True:
            match = _BLANKS.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text):
                return
            yield from self.more()

    def expect(self, marker: str) -> Reading:
        """Go behind this text; raises Broken where another stands here."""
        while not self.text.startswith(marker, self.position):
            if not marker.startswith(self.text[self.position :]):
                raise Broken
            yield from self.more()
        self.position += len(marker)

    def has(self, *markers: str) -> Iterator[None]:
        """Go behind blanks and these texts, with blanks between, if all of them follow; else stay, and raise Broken."""
        start = self.position
        try:
            for marker in markers:
                yield from self.blanks()
                yield from self.expect(marker)
        except Broken:
            self.position = start
            raise

    def optional(self, *markers: str) -> Iterator[None]:
        """As has, but without Broken. Of an answer that was cut within the first of them, nothing is left."""
        try:
            yield from self.has(*markers)
        except Broken:
            if self.is_ended and markers[0].startswith(self.text[self.position :].lstrip()):
                self.position = len(self.text)

    def name(self) -> Iterator[None]:
        """Go behind a name up to a character that belongs to none."""
        start = self.position
        while (match := _NAME.match(self.text, start)) is None or match.end() == len(self.text):
            if match is None and start < len(self.text):
                raise Broken
            yield from self.more()
        self.position = match.end()

    # Calls

    def call(self, *, is_sure: bool = True) -> Reading:
        """One call as an object with its name and its arguments; committed. is_sure: a marker said that it is one."""
        scanned = JsonObject(self.position)
        yield from self._follow(scanned, lambda: self._head(scanned, is_sure=is_sure))
        name = self._decoded(scanned, "name")
        given = [key for key in ARGUMENTS if key in scanned.fields]
        if not _is_name(name) or not (given or is_sure):
            raise Broken
        self.calls.end(name, self._arguments(scanned, given[0]) if given else "{}")
        self.commit()

    def arguments_of(self, name: str) -> Reading:
        """The arguments alone of a call whose name came before; committed."""
        scanned = JsonObject(self.position)
        start = self.position
        yield from self._follow(scanned, lambda: _Head(name, start, scanned.position))
        self.calls.end(name, self.text[start : self.position])
        self.commit()

    def _follow(self, scanned: JsonObject, head: Callable[[], _Head | None]) -> Reading:
        """Go behind the object, and tell what is known of the call meanwhile."""
        while True:
            try:
                is_done = scanned.advance(self.text)
            finally:
                if (found := head()) and self.calls.eager:
                    self.calls.tell(found.name, self.text[found.start : found.end])
            if is_done:
                self.position = scanned.position
                return
            yield from self.more()

    def _head(self, scanned: JsonObject, *, is_sure: bool) -> _Head | None:
        fields = scanned.fields
        keys = {*fields, scanned.name}
        if keys.issuperset(ARGUMENTS) or not (is_sure or keys <= _KNOWN_FIELDS):
            raise Broken
        name = self._decoded(scanned, "name")
        if not _is_name(name):
            return None
        if not is_sure:
            self._check(name)
        for key in ARGUMENTS:
            start, end = fields.get(key, (scanned.value_start, scanned.position))
            if (key in fields or scanned.name == key) and self.text.startswith("{", start):
                return _Head(name, start, end)
        return None

    def _check(self, name: str) -> None:
        if self.calls.names is not None and name not in self.calls.names:
            raise Broken

    def _decoded(self, scanned: JsonObject, key: str) -> object:
        if key not in scanned.fields:
            return None
        start, end = scanned.fields[key]
        return json.loads(self.text[start:end])

    def _arguments(self, scanned: JsonObject, key: str) -> str:
        """An object as it is written; in a string, as some models write it, what the string holds."""
        start, end = scanned.fields[key]
        if self.text[start] == "{":
            return self.text[start:end]
        value = json.loads(self.text[start:end])
        if value is None:
            return "{}"
        if not isinstance(value, str):
            raise Broken
        inner = JsonObject(0)
        if _HALF.search(value) or not inner.advance(value) or value[inner.position :].strip():
            raise Broken
        return value.strip()
