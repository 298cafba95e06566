"""Drafts of the live sequences: their bounds, their guesses, and how many of these came true.

On the engine's thread, called by the engine in the order of a step: offers() before the plan, drafts() for the plan,
learn() after the commit. Decides nothing: how long a draft pays says drafting.py, what is guessed a Proposer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from inference.engine.drafting import (
    MAX_DRAFT,
    UNSEEN_CHANCE,
    UNTRIED_CHANCE,
    Acceptance,
    Draftable,
    DraftPolicy,
    DraftSettings,
    DraftTerms,
)
from inference.engine.sequence import Sequence
from inference.engine.speculative import Ask, Proposer
from inference.engine.types import AdapterVector, Speculation

PROBE_SHARE = 0.01
"""Of the time of drafting sequences' steps, so much may go into guesses that do not pay now, but might."""
MAX_PROBE_SECONDS = 2.0
"""What is saved for probes at most."""
FIRST_PROBE_SECONDS = 0.1
"""What a model has for probes when it is new, so that a good proposer is soon known as one."""
MAX_VECTORS = 256
"""Adapter vectors whose acceptance is remembered."""


@dataclass(slots=True)
class _Drafting:
    """A sequence's bounds, its own acceptance, and the guesses for what follows its first `made_at` tokens.

    awaited: a guess that is compared with the tokens as they come, and the number of tokens that it followed.
    """

    bounds: Speculation
    acceptance: Acceptance
    guesses: list[int] = field(default_factory=list)
    made_at: int = -1
    awaited: list[int] = field(default_factory=list)
    awaited_at: int = -1


class Drafter:
    """n_ctx: tokens of a slot. most: guesses of all slots together that a step can verify."""

    def __init__(self, proposer: Proposer, settings: DraftSettings, *, n_ctx: int, most: int) -> None:
        self._proposer = proposer
        self._settings = settings
        self._n_ctx = n_ctx
        self._most = most
        self._live: dict[str, _Drafting] = {}
        self._acceptance: dict[AdapterVector, Acceptance] = {}
        self._probe_seconds = FIRST_PROBE_SECONDS
        self._first_chances = (UNTRIED_CHANCE if proposer.is_free else UNSEEN_CHANCE,) * MAX_DRAFT

    def open(self, sequence: Sequence, slot_id: int, num_kept: int) -> None:
        """The sequence sits in this slot, which holds num_kept of its tokens from the one before it."""
        self._proposer.open(slot_id, num_kept)
        bounds = self._bounds(sequence.request.decoding.speculation)
        if bounds.num_max > 0:
            acceptance = self._of(sequence.adapters).copy()
            self._live[sequence.request_id] = _Drafting(bounds, acceptance)

    def forget(self, slot_id: int) -> None:
        """What is in this slot is none of what its last sequence left there."""
        self._proposer.open(slot_id, 0)

    def close(self, request_id: str) -> None:
        self._live.pop(request_id, None)

    def _bounds(self, asked: Speculation | None) -> Speculation:
        """A request may ask for less than the model's settings, not for more."""
        settings = self._settings
        if asked is None:
            asked = Speculation(
                num_min=settings.num_min, num_max=settings.num_max, min_probability=settings.min_probability
            )
        num_max = min(asked.num_max, settings.num_max, MAX_DRAFT)
        return Speculation(num_min=min(asked.num_min, num_max), num_max=num_max, min_probability=asked.min_probability)

    def _of(self, adapters: AdapterVector) -> Acceptance:
        """What is known of a vector; of a new one, what is known of the base model."""
        if adapters not in self._acceptance:
            if len(self._acceptance) >= MAX_VECTORS:
                del self._acceptance[next(iter(self._acceptance))]
            base = self._acceptance.get(())
            self._acceptance[adapters] = base.copy() if base else Acceptance(self._first_chances)
        return self._acceptance[adapters]

    @property
    def chances(self) -> dict[tuple[str, ...], float]:
        """By the digests of adapters: how likely the first guess is held to be right. Of vectors that differ by their
        scales alone, the newest. Any thread may ask."""
        known = list(self._acceptance.items())
        return {tuple(digest for digest, _ in vector): acceptance.chances[0] for vector, acceptance in known}

    def offers(self, running: Iterable[Sequence]) -> dict[str, Draftable]:
        """What each decoding sequence could have guessed in the next step. Free guesses are made here."""
        if not self._most:
            return {}
        wanting = []
        for sequence in running:
            live = self._live.get(sequence.request_id)
            if live is not None and sequence.is_decoding and sequence.slot_id is not None:
                most = self._room(sequence, live)
                if most > 0:
                    wanting.append((sequence, live, most))
        if self._proposer.is_free:
            return self._offer_guesses(wanting)
        return {
            sequence.request_id: Draftable(
                live.bounds.num_min,
                most,
                live.acceptance.chances,
                self._proposer.num_behind(sequence.slot_id or 0, len(sequence.tokens)),
                sequence.request.max_tokens - sequence.num_completion,
            )
            for sequence, live, most in wanting
            if most >= live.bounds.num_min
        }

    def _room(self, sequence: Sequence, live: _Drafting) -> int:
        """The longest draft that neither the slot nor the answer is too short for: one more token follows it."""
        in_slot = self._n_ctx - len(sequence.tokens) - 1
        in_answer = sequence.request.max_tokens - sequence.num_completion - 1
        return min(live.bounds.num_max, in_slot, in_answer)

    def _offer_guesses(self, wanting: list[tuple[Sequence, _Drafting, int]]) -> dict[str, Draftable]:
        new = [each for each in wanting if each[1].made_at != len(each[0].tokens)]
        self._guess([(sequence, live, most) for sequence, live, most in new])
        return {
            sequence.request_id: Draftable(live.bounds.num_min, len(live.guesses), live.acceptance.chances)
            for sequence, live, _ in wanting
            if live.guesses and len(live.guesses) >= live.bounds.num_min
        }

    def _guess(self, wanting: list[tuple[Sequence, _Drafting, int]]) -> None:
        asks = [
            Ask(sequence.slot_id or 0, sequence.tokens, most, live.bounds.min_probability)
            for sequence, live, most in wanting
        ]
        for (sequence, live, _), guesses in zip(wanting, self._proposer.propose(asks), strict=True):
            live.guesses, live.made_at = guesses, len(sequence.tokens)
            if guesses and not live.awaited:
                live.awaited, live.awaited_at = guesses, live.made_at

    @property
    def terms(self) -> DraftTerms:
        adaptive = self._settings.policy is DraftPolicy.ADAPTIVE
        return DraftTerms(
            most=self._most,
            policy=self._settings.policy,
            guessing=self._proposer.cost,
            probe_seconds=self._probe_seconds if adaptive and not self._proposer.is_free else 0.0,
        )

    def drafts(self, planned: Mapping[str, int], running: Mapping[str, Sequence]) -> dict[str, list[int]]:
        """The guesses that this step verifies: as long as planned at most, none shorter than the sequence wants."""
        if not planned:
            return {}
        if not self._proposer.is_free:
            self._guess([(running[each], self._live[each], number) for each, number in planned.items()])
        drafts = {each: self._live[each].guesses[:number] for each, number in planned.items()}
        return {each: draft for each, draft in drafts.items() if len(draft) >= max(1, self._live[each].bounds.num_min)}

    def learn(self, sequence: Sequence) -> None:
        """Compare what was guessed with what came, also where it was not worth verifying: looking is free."""
        live = self._live.get(sequence.request_id)
        if live is None or not live.awaited:
            return
        came = sequence.tokens[live.awaited_at : live.awaited_at + len(live.awaited)]
        num_right = 0
        while num_right < len(came) and came[num_right] == live.awaited[num_right]:
            num_right += 1
        if num_right < len(came) or len(came) == len(live.awaited):
            for acceptance in (live.acceptance, self._of(sequence.adapters)):
                acceptance.observe(len(live.awaited), num_right)
            live.awaited = []

    def spend(self, seconds: float, probe_seconds: float) -> None:
        """A step of sequences that may draft took so long; so much of it was a probe."""
        saved = self._probe_seconds + PROBE_SHARE * seconds - probe_seconds
        self._probe_seconds = min(max(saved, 0.0), MAX_PROBE_SECONDS)

    def shift(self, sequence: Sequence, num_keep: int, num_discard: int) -> None:
        """The sequence loses num_discard tokens behind the first num_keep."""
        if sequence.slot_id is not None:
            self._proposer.shift(sequence.slot_id, num_keep, num_discard)
        if live := self._live.get(sequence.request_id):
            live.made_at, live.awaited = -1, []

    def free(self) -> None:
        self._proposer.free()
