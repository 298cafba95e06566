"""How long a draft pays: the policy of speculative decoding.

Pure functions over integers, chances and the measured cost of steps; no model, no clock, no state but Acceptance, which
is arithmetic. Called by the scheduler; who guesses is speculative.py, who keeps the books drafter.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from inference.engine.costs import CostCurve

MAX_DRAFT = 64
"""Guesses of one sequence in one step that any setting may ask for."""
WEIGHT = 0.125
"""How much the latest guess at a position counts for its chance."""
UNSEEN_CHANCE = 0.7
"""The chance of a guess before any was seen: high enough that drafts are tried where they may pay."""
UNTRIED_CHANCE = 0.5
"""The same where guesses cost nothing: they are seen to come true or not without being verified."""
READING_SHARE = 0.25
"""Of the time that the rest of an answer may take, what a draft model may spend on reading the text before it."""
PAYS = 1.03
"""Drafts must promise so many times the tokens a second of a step without: the cost curve is a measurement."""


class DraftPolicy(StrEnum):
    ADAPTIVE = "adaptive"
    """As long as it pays, down to nothing."""
    ALWAYS = "always"
    """As long as may be, whether it pays or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSettings:
    """A served model's: the bounds of requests that bring none, and of all of them num_max."""

    num_min: int = 0
    num_max: int = 16
    min_probability: float = 0.0
    policy: DraftPolicy = DraftPolicy.ADAPTIVE


@dataclass(frozen=True, slots=True)
class Draftable:
    """What a decoding sequence could have guessed: nothing, or num_min to num_max tokens.

    chances: of each position, that its guess is right where those before it are. num_behind: tokens that must be
    computed before the first guess can be made. num_left: tokens that the answer may still have.
    """

    num_min: int
    num_max: int
    chances: tuple[float, ...]
    num_behind: int = 0
    num_left: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTerms:
    """What guessing costs in this step, for all sequences together.

    most: guesses that the step can verify. guessing: seconds of one guess more for each of n sequences; empty where
    guesses cost nothing. probe_seconds: what may be spent to find out whether more guesses than pay would be right.
    """

    most: int = 0
    policy: DraftPolicy = DraftPolicy.ADAPTIVE
    guessing: CostCurve = field(default_factory=CostCurve)
    probe_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class DraftLengths:
    """The longest draft of each sequence that gets one, and the seconds that serve a probe."""

    num_drafted: dict[str, int] = field(default_factory=dict)
    probe_seconds: float = 0.0


class Acceptance:
    """Of each position in a draft, how likely its guess is right where those before it are: an exponential average."""

    __slots__ = ("chances",)

    def __init__(self, chances: tuple[float, ...] = (UNSEEN_CHANCE,) * MAX_DRAFT) -> None:
        self.chances = chances

    def copy(self) -> Acceptance:
        return Acceptance(self.chances)

    def observe(self, num_guessed: int, num_right: int) -> None:
        """The first num_right of a draft of num_guessed were right; of those behind a wrong one nothing is known."""
        known = min(num_right + 1, num_guessed, len(self.chances))
        seen = (
            chance + WEIGHT * ((position < num_right) - chance) for position, chance in enumerate(self.chances[:known])
        )
        self.chances = (*seen, *self.chances[known:])


def lengths(
    wanted: Mapping[str, Draftable], terms: DraftTerms, cost: CostCurve, *, num_useful: int, room: int, turn: int = 0
) -> DraftLengths:
    """The longest draft of each sequence that is worth one, those of most promise first.

    A step's worth is its useful tokens a second: num_useful, the tokens that the step carries anyway, and the guesses
    that are expected to be right (the goodput of Liu et al., "Optimizing Speculative Decoding for Serving Large
    Language Models Using Goodput", 2024). room: tokens that the batch has beside num_useful. turn: whose
    turn a probe is.
    """
    room = min(room, terms.most)
    if terms.policy is DraftPolicy.ALWAYS:
        return DraftLengths(_shared(wanted, room))
    wanted = {request_id: each for request_id, each in wanted.items() if _is_worth_reading(each, terms, cost)}
    planned = _paying(wanted, terms, cost, num_useful, room)
    if terms.probe_seconds > 0:
        return _probed(planned, wanted, terms, cost, num_useful, room, turn)
    return DraftLengths(planned)


def _shared(wanted: Mapping[str, Draftable], room: int) -> dict[str, int]:
    """All of it where it fits; else the same for all, and what the modest leave for the others."""
    planned = {}
    modest_first = sorted(wanted.items(), key=lambda item: item[1].num_max)
    for index, (request_id, each) in enumerate(modest_first):
        length = min(each.num_max, room // (len(modest_first) - index))
        if length >= max(each.num_min, 1):
            planned[request_id] = length
            room -= length
    return planned


def _is_worth_reading(each: Draftable, terms: DraftTerms, cost: CostCurve) -> bool:
    """Whether the text that must be read before the first guess is short beside the answer that may come."""
    return terms.guessing.seconds(each.num_behind) <= READING_SHARE * each.num_left * cost.seconds(1)


@dataclass(frozen=True, slots=True)
class _Block:
    """Guesses that are added together: the shortest draft, or one guess more. right: so many are expected to be."""

    request_id: str
    size: int
    right: float


def _blocks(request_id: str, each: Draftable) -> list[_Block]:
    """In order; what a guess promises falls from block to block."""
    blocks, chance, promised, size = [], 1.0, 0.0, 0
    for position in range(each.num_max):
        chance *= each.chances[min(position, len(each.chances) - 1)]
        promised += chance
        size += 1
        if position + 1 >= each.num_min:
            blocks.append(_Block(request_id, size, promised))
            promised, size = 0.0, 0
    return blocks


def _paying(
    wanted: Mapping[str, Draftable], terms: DraftTerms, cost: CostCurve, num_useful: int, room: int
) -> dict[str, int]:
    """Add block by block, most promising first, and keep the best of these steps."""
    blocks = [block for request_id, each in wanted.items() for block in _blocks(request_id, each)]
    blocks.sort(key=lambda block: -block.right / block.size)
    best_worth = PAYS * _worth(num_useful, cost.seconds(num_useful))
    best: dict[str, int] = {}
    planned: dict[str, int] = {}
    right, total, longest = 0.0, 0, 0
    for block in blocks:
        if total + block.size > room:
            break
        planned[block.request_id] = length = planned.get(block.request_id, 0) + block.size
        right, total, longest = right + block.right, total + block.size, max(longest, length)
        seconds = cost.seconds(num_useful + total) + longest * terms.guessing.seconds(len(planned))
        worth = _worth(num_useful + right, seconds)
        if worth >= best_worth:
            best_worth, best = worth, dict(planned)
    return best


def _worth(useful: float, seconds: float) -> float:
    """Useful tokens a second; where steps take no time, useful tokens."""
    return useful / seconds if seconds > 0 else useful


def _probed(
    planned: dict[str, int],
    wanted: Mapping[str, Draftable],
    terms: DraftTerms,
    cost: CostCurve,
    num_useful: int,
    room: int,
    turn: int,
) -> DraftLengths:
    """One sequence's draft goes one guess beyond what pays, if there are seconds for it."""
    total = sum(planned.values())
    could = [request_id for request_id, each in wanted.items() if planned.get(request_id, 0) < each.num_max]
    if not could:
        return DraftLengths(planned)
    request_id = could[turn % len(could)]
    each, length = wanted[request_id], planned.get(request_id, 0)
    more = max(each.num_min, 1) if length == 0 else 1
    seconds = cost.seconds(num_useful + total + more) - cost.seconds(num_useful + total)
    seconds += terms.guessing.seconds(more + each.num_behind) if length == 0 else terms.guessing.seconds(1)
    if total + more > room or seconds > terms.probe_seconds:
        return DraftLengths(planned)
    return DraftLengths({**planned, request_id: length + more}, seconds)
