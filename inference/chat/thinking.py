"""What a model thinks before it answers, apart from the answer: `<think>...</think>` and its relatives. Pure.

The request's clock; every dialect may feed it the text of one answer, whole or in pieces: the result is the same.
Thoughts come first: tags further on in an answer are text, since the answer may be about them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class Tags:
    """What stands before and behind a model's thoughts."""

    start: str
    end: str

    def are_open_in(self, text: str) -> bool:
        """Whether a text, such as the beginning of the assistant's turn, leaves off in the middle of thoughts."""
        return text.rfind(self.start) > text.rfind(self.end)


THINK = Tags("<think>", "</think>")
FAMILIES = (THINK, Tags("[THINK]", "[/THINK]"), Tags("<seed:think>", "</seed:think>"))


def tags_of(template: str) -> Tags:
    """Those that a chat template writes itself; else the usual ones."""
    return next((tags for tags in FAMILIES if tags.end in template or tags.start in template), THINK)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a conversation says of whether its answer begins within thoughts. has_begun: the assistant's text that goes
    on leaves off in them. may_begin: the template can open them, which the end of the prompt shows."""

    tags: Tags
    has_begun: bool
    may_begin: bool


@dataclass(frozen=True, slots=True)
class Spoken:
    """A piece of an answer."""

    thought: str = ""
    said: str = ""

    def __bool__(self) -> bool:
        return bool(self.thought or self.said)

    def __add__(self, other: Spoken) -> Spoken:
        return Spoken(self.thought + other.thought, self.said + other.said)


class _Place(Enum):
    BEFORE = auto()
    """Nothing but blanks, or the beginning of a tag, has come."""
    WITHIN = auto()
    BEHIND = auto()
    """Thoughts have ended; of what follows the leading blanks are dropped."""
    ANSWER = auto()


class ThoughtSplitter:
    """Tells thoughts from the answer while the text comes. Blanks at the border belong to neither.

    is_open: the prompt has ended within thoughts already.
    """

    def __init__(self, tags: Tags = THINK, *, is_open: bool = False) -> None:
        self._tags = tags
        self._place = _Place.WITHIN if is_open else _Place.BEFORE
        self._has_thought = False
        self._held = ""

    def feed(self, text: str) -> Spoken:
        """What has become certain."""
        self._held += text
        found = Spoken()
        place = None
        while self._place is not place:  # each step may open the way for the next one
            place = self._place
            found += self._step()
        return found

    def finish(self) -> Spoken:
        """The end: what is held is no tag after all."""
        held, self._held = self._held, ""
        match self._place:
            case _Place.WITHIN:
                return Spoken(thought=self._trimmed(held).rstrip())
            case _Place.BEHIND:
                return Spoken()
            case _:
                return Spoken(said=held)

    def _step(self) -> Spoken:
        match self._place:
            case _Place.BEFORE:
                return self._before()
            case _Place.WITHIN:
                return self._within()
            case _Place.BEHIND:
                self._held = self._held.lstrip()
                if self._held:
                    self._place = _Place.ANSWER
                return Spoken()
            case _Place.ANSWER:
                said, self._held = self._held, ""
                return Spoken(said=said)

    def _before(self) -> Spoken:
        begun = self._held.lstrip()
        if begun.startswith(self._tags.start):
            self._held = begun[len(self._tags.start) :]
            self._place = _Place.WITHIN
        elif not self._tags.start.startswith(begun):
            self._place = _Place.ANSWER
        return Spoken()

    def _within(self) -> Spoken:
        thought, end, rest = self._held.partition(self._tags.end)
        if end:
            self._held, self._place = rest, _Place.BEHIND
            return Spoken(thought=self._trimmed(thought).rstrip())
        sure = self._held[: len(self._held) - _beginning(self._held, self._tags.end)].rstrip()
        self._held = self._held[len(sure) :]
        sure = self._trimmed(sure)
        self._has_thought |= bool(sure)
        return Spoken(thought=sure)

    def _trimmed(self, thought: str) -> str:
        return thought if self._has_thought else thought.lstrip()


def _beginning(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    longest = min(len(text), len(tag) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(tag[:length])), 0)
