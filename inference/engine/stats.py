"""Counts of what the engine has done since it started, for metrics, receipts and watchdogs.

Written by the engine's thread alone; other threads read a snapshot, whose fields may be one step apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

from inference.engine.costs import CostCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Totals only rise; last_step_at is monotonic seconds, None before the first step.

    num_held_back: of the waiting, those that a busy slot alone can serve. num_parked: sequences that made room for
    others, num_parks: how often one did. num_batched_sequences sums the sequences of every executed plan,
    num_decode_sequences those that were generating, over the num_decode_steps plans that had any.
    prompt_tokens_total: those computed, without the cached ones. num_switches: steps with another adapter vector than
    the one before; num_adapters: those loaded now. num_drafts were verified, of drafted_tokens_total tokens, of which
    accepted_tokens_total were right; accepted_per_position: of each position in a draft. draft_length: guesses a
    generating sequence that the latest step verified. draft_chances: by the digests of adapters, how likely the first
    guess of a draft is held to be right. A step's seconds are shared out by its prompt and generated tokens.
    """

    num_slots: int
    busy_slots: int
    num_waiting: int
    num_held_back: int
    num_parked: int
    num_parks: int
    num_steps: int
    num_batched_sequences: int
    num_decode_steps: int
    num_decode_sequences: int
    prompt_tokens_total: int
    cached_tokens_total: int
    completion_tokens_total: int
    prefill_seconds_total: float
    decode_seconds_total: float
    last_step_at: float | None
    num_switches: int
    num_adapters: int
    cost_curve: CostCurve
    num_drafts: int
    drafted_tokens_total: int
    accepted_tokens_total: int
    accepted_per_position: tuple[int, ...]
    draft_length: float
    draft_chances: Mapping[tuple[str, ...], float]


def combined(parts: Sequence[EngineStats]) -> EngineStats:
    """The engines of one model as one. They have their adapters and their cost curve in common."""
    shared: dict[str, Any] = {"num_adapters": parts[0].num_adapters, "cost_curve": parts[0].cost_curve}
    shared["last_step_at"] = max((part.last_step_at for part in parts if part.last_step_at is not None), default=None)
    positions = zip_longest(*(part.accepted_per_position for part in parts), fillvalue=0)
    shared["accepted_per_position"] = tuple(map(sum, positions))
    shared["draft_length"] = max(part.draft_length for part in parts)
    shared["draft_chances"] = {digests: chance for part in parts for digests, chance in part.draft_chances.items()}
    totals = [each.name for each in fields(EngineStats) if each.name not in shared]
    return replace(parts[0], **shared, **{name: sum(getattr(part, name) for part in parts) for name in totals})


@dataclass(slots=True)
class Counters:
    """The running totals behind EngineStats."""

    num_steps: int = 0
    num_batched_sequences: int = 0
    num_decode_steps: int = 0
    num_decode_sequences: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    completion_tokens_total: int = 0
    prefill_seconds_total: float = 0.0
    decode_seconds_total: float = 0.0
    last_step_at: float | None = None
    num_switches: int = 0
    num_drafts: int = 0
    drafted_tokens_total: int = 0
    accepted_tokens_total: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    draft_length: float = 0.0
    num_parks: int = 0

    def count_draft(self, num_drafted: int, num_accepted: int) -> None:
        """Book a verified draft."""
        self.num_drafts += 1
        self.drafted_tokens_total += num_drafted
        self.accepted_tokens_total += num_accepted
        positions = self.accepted_per_position
        positions += [0] * (num_drafted - len(positions))
        for position in range(num_accepted):
            positions[position] += 1

    def count_step(
        self, *, num_sequences: int, num_decoding: int, prompt: int, decoded: int, drafted: int, seconds: float
    ) -> None:
        """Book an executed step of prompt + decoded computed tokens, of which so many were drafted."""
        self.num_steps += 1
        self.num_batched_sequences += num_sequences
        if num_decoding:
            self.num_decode_steps += 1
            self.num_decode_sequences += num_decoding
            self.draft_length = drafted / num_decoding
        self.prompt_tokens_total += prompt
        prefill_seconds = seconds * prompt / (prompt + decoded)
        self.prefill_seconds_total += prefill_seconds
        self.decode_seconds_total += seconds - prefill_seconds
