"""Who guesses the next tokens of a sequence: one shape, Proposer. Here is the one that needs no model; llama/draft.py
is a draft model.

On the engine's thread. A wrong guess costs time and nothing else: the sampler of the sequence chooses every token
itself (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2022, in the form that compares
tokens, so that answers are those without a draft).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from inference.engine.costs import CostCurve

MIN_MATCH = 3
"""So many of the last tokens must have stood before: two are together often by chance."""
MAX_MATCH = 32
MAX_PLACES = 8
"""Of the places where they stood, so many are looked at, the latest first."""
MAX_INDEXED = 65_536
"""Tokens of one sequence that are remembered at most; beyond that the older half is forgotten."""
MAX_PADDING = 128
"""Tokens by which two vocabularies may differ in length, as llama.cpp allows."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence that wants guesses: all its tokens, which the proposer must not keep or change, and the bounds."""

    slot_id: int
    tokens: Sequence[int]
    num_max: int
    min_probability: float = 0.0


class Proposer(Protocol):
    """Guesses how sequences go on. Any exception means that it is broken, and the engine with it."""

    @property
    def is_free(self) -> bool:
        """Whether guesses cost next to nothing. Then they are made before the step is planned."""
        ...

    @property
    def cost(self) -> CostCurve:
        """Seconds of computing n tokens: one guess more for each of n sequences. Empty where guesses are free."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """0 to num_max guesses for each, in order; none also where it must catch up with the sequence first."""
        ...

    def num_behind(self, slot_id: int, num_tokens: int) -> int:
        """Tokens that it must compute before it can guess for a sequence of so many."""
        ...

    def open(self, slot_id: int, num_kept: int) -> None:
        """Another sequence sits here, whose first num_kept tokens are those of the one before; forget the rest."""
        ...

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        """The sequence loses num_discard tokens behind the first num_keep. A hint: proposers see it anyway."""
        ...

    def free(self) -> None:
        """Free everything. Idempotent; nothing else may be called afterwards."""
        ...


def vocabulary_problem(target: Sequence[bytes], draft: Sequence[bytes]) -> str:
    """Why a model with the vocabulary `draft` cannot guess tokens of `target`; "" if it can.

    Vocabularies of one family differ in how many unused tokens fill them up at the end.
    """
    if abs(len(target) - len(draft)) > MAX_PADDING:
        return f"its vocabulary has {len(draft)} tokens, not {len(target)}"
    for token, (one, other) in enumerate(zip(target, draft, strict=False)):
        if one != other:
            wanted, found = (text[:40].decode("utf-8", "replace") for text in (one, other))
            return f"its vocabulary is another one: token {token} is {found!r}, not {wanted!r}"
    return ""


class _Index:
    """Where each run of MIN_MATCH tokens of one sequence is continued, kept up in constant time a token."""

    __slots__ = ("_latest", "_length", "_previous", "_start", "_tail")

    def __init__(self) -> None:
        self._clear(0)

    def _clear(self, start: int) -> None:
        self._start = start
        self._length = start  # continuations before this are known
        self._tail: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._previous: list[int] = []

    def follow(self, tokens: Sequence[int]) -> None:
        """Learn what is new in the tokens; all of them where they are not a continuation of those known."""
        known = self._length
        if known > len(tokens) or list(tokens[max(known - MAX_MATCH, 0) : known]) != self._tail:
            self._clear(0)
        if len(tokens) - self._start > MAX_INDEXED:
            self._clear(len(tokens) - MAX_INDEXED // 2)
        latest, previous = self._latest, self._previous
        for end in range(self._length, len(tokens)):
            key = tuple(tokens[max(end - MIN_MATCH, 0) : end])
            previous.append(latest.get(key, -1))
            latest[key] = end
        self._length = len(tokens)
        self._tail = list(tokens[max(self._length - MAX_MATCH, 0) :])

    def continuation(self, tokens: Sequence[int]) -> int | None:
        """Where the longest run of last tokens that stood before is continued, of equals the latest."""
        place = self._latest.get(tuple(tokens[-MIN_MATCH:]), -1)
        best, longest = None, 0
        for _ in range(MAX_PLACES):
            if place < MIN_MATCH:
                break
            if (length := _match(tokens, place)) > longest:
                best, longest = place, length
            if longest == MAX_MATCH:
                break
            place = self._previous[place - self._start]
        return best if longest >= MIN_MATCH else None


def _match(tokens: Sequence[int], place: int) -> int:
    """How many tokens before this place are the last ones of all."""
    length, end = 0, len(tokens)
    most = min(MAX_MATCH, place)
    while length < most and tokens[place - 1 - length] == tokens[end - 1 - length]:
        length += 1
    return length


class PromptLookup:
    """Guesses that what followed the same words before follows them again: answers quote prompts, and themselves.

    After Saxena, "Prompt Lookup Decoding" (2023), and llama.cpp's lookup example. Longest match first.
    """

    is_free = True
    cost = CostCurve()

    def __init__(self) -> None:
        self._indexes: dict[int, _Index] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return [self._guess(ask) for ask in asks]

    def _guess(self, ask: Ask) -> list[int]:
        """It has no probabilities: min_probability says nothing to it."""
        index = self._indexes.setdefault(ask.slot_id, _Index())
        index.follow(ask.tokens)
        place = index.continuation(ask.tokens)
        if place is None:
            return []
        guesses = list(ask.tokens[place : place + ask.num_max])
        period = len(ask.tokens) - place
        while len(guesses) < ask.num_max:  # a text that repeats itself goes on with what was just guessed
            guesses.append(guesses[-period])
        return guesses

    def num_behind(self, slot_id: int, num_tokens: int) -> int:
        return 0

    def open(self, slot_id: int, num_kept: int) -> None:
        self._indexes.pop(slot_id, None)

    def shift(self, slot_id: int, num_keep: int, num_discard: int) -> None:
        self._indexes.pop(slot_id, None)

    def free(self) -> None:
        self._indexes.clear()
