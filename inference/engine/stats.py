"""Counts of what the engine has done since it started, for metrics, receipts and watchdogs.

Written by the engine's thread alone; other threads read a snapshot, whose fields may be one step apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from inference.engine.costs import CostCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Totals only rise; last_step_at is monotonic seconds, None before the first step.

    num_batched_sequences sums the sequences of every executed plan, num_decode_sequences those that were generating,
    over the num_decode_steps plans that had any. prompt_tokens_total: those computed, without the
    cached ones. num_switches: steps with another adapter vector than the
    one before; num_adapters: those loaded now. A step's seconds are shared out by its prompt and generated tokens.
    """

    num_slots: int
    busy_slots: int
    num_waiting: int
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


def combined(parts: Sequence[EngineStats]) -> EngineStats:
    """The engines of one model as one. They have their adapters and their cost curve in common."""
    shared: dict[str, Any] = {"num_adapters": parts[0].num_adapters, "cost_curve": parts[0].cost_curve}
    shared["last_step_at"] = max((part.last_step_at for part in parts if part.last_step_at is not None), default=None)
    totals = [field.name for field in fields(EngineStats) if field.name not in shared]
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

    def count_step(self, *, num_sequences: int, num_decoding: int, prompt: int, decoded: int, seconds: float) -> None:
        """Book an executed step of prompt + decoded computed tokens."""
        self.num_steps += 1
        self.num_batched_sequences += num_sequences
        if num_decoding:
            self.num_decode_steps += 1
            self.num_decode_sequences += num_decoding
        self.prompt_tokens_total += prompt
        prefill_seconds = seconds * prompt / (prompt + decoded)
        self.prefill_seconds_total += prefill_seconds
        self.decode_seconds_total += seconds - prefill_seconds
