"""Which format and which settings win, given what was measured. Pure: numbers in, a verdict out.

One number decides: the gain, the geometric mean of the three speeds' ratios to the reference. Ratios are taken within a
round, so a machine that slows down slows both sides, and the median of the rounds is the gain.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

MIN_GAIN = 1.03
"""Less than three percent is not told from noise."""
EQUAL_GAIN = 0.02
"""Formats that are so close to the fastest are as fast; the one that changes the model least wins."""
MAX_THREAD_CHOICES = 4
NUM_SEQUENCES = 8
"""That decode together."""
SPEED_CONTEXT = 512
"""Tokens of each of them, while speeds are measured."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of a prompt, of one sequence decoding, of eight together."""

    prompt: float
    decode_1: float
    decode_8: float

    def over(self, other: Speed) -> float:
        """The geometric mean of the three ratios."""
        return math.prod(
            (self.prompt / other.prompt, self.decode_1 / other.decode_1, self.decode_8 / other.decode_8)
        ) ** (1 / 3)


@dataclass(frozen=True, slots=True)
class Settings:
    """flash_attention None: llama.cpp decides."""

    n_threads: int
    flash_attention: bool | None = None

    def __str__(self) -> str:
        flash = {None: "", True: ", flash attention on", False: ", flash attention off"}[self.flash_attention]
        return f"{self.n_threads} thread{'' if self.n_threads == 1 else 's'}{flash}"


@dataclass(slots=True)
class Measured:
    """One candidate: a format, or settings. `problem` says why it is none any more."""

    name: str
    size_bytes: int = 0
    losses: Sequence[float] = ()
    speeds: dict[int, Speed] = field(default_factory=dict)
    """By round."""
    problem: str = ""

    def typical(self) -> Speed | None:
        """The median of each speed."""
        if not self.speeds:
            return None
        rounds = list(self.speeds.values())
        return Speed(*(median(getattr(each, name) for each in rounds) for name in ("prompt", "decode_1", "decode_8")))

    @property
    def perplexity(self) -> float | None:
        return math.exp(fmean(self.losses)) if self.losses else None


def gain(candidate: Measured, reference: Measured) -> float | None:
    """The median, over the rounds that have both, of how much faster it is; None where there is no such round."""
    both = candidate.speeds.keys() & reference.speeds.keys()
    return median(candidate.speeds[each].over(reference.speeds[each]) for each in both) if both else None


@dataclass(frozen=True, slots=True)
class Increase:
    """Of the perplexity, in percent. `error` is one standard error of the mean over the counted tokens."""

    percent: float
    error: float


def increase(candidate: Measured, reference: Measured) -> Increase | None:
    """Token by token, so that what is hard for both does not count; None where either was not scored alike."""
    if not candidate.losses or len(candidate.losses) != len(reference.losses):
        return None
    differences = [mine - theirs for mine, theirs in zip(candidate.losses, reference.losses, strict=True)]
    mean = fmean(differences)
    spread = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return Increase(100 * math.expm1(mean), 100 * math.exp(mean) * spread)


def objection(candidate: Measured, reference: Measured, most_increase: float, least_gain: float = MIN_GAIN) -> str:
    """Why it may not win; empty if it may. least_gain: a factor, below 1 where something slower may win, too."""
    if candidate.problem:
        return candidate.problem
    gained, cost = gain(candidate, reference), increase(candidate, reference)
    if gained is None:
        return "its speed was not measured in time"
    if cost is None:
        return "its perplexity was not measured in time"
    if cost.percent > most_increase:
        return f"its perplexity rises by more than {most_increase:g} %"
    return "" if gained >= least_gain else _too_slow(gained, least_gain)


def _too_slow(gained: float, least_gain: float) -> str:
    if least_gain < 1:
        return f"more than {1 - least_gain:.0%} slower than the source"
    return "not faster than the source" if gained <= 1 else f"less than {least_gain - 1:.0%} faster than the source"


def winner(
    candidates: Sequence[Measured], reference: Measured, most_increase: float, least_gain: float = MIN_GAIN
) -> Measured | None:
    """The fastest that may win; of those as fast, the one whose perplexity rises least."""
    able = {each.name: each for each in candidates if not objection(each, reference, most_increase, least_gain)}
    gains = {name: gain(each, reference) or 0.0 for name, each in able.items()}
    if not gains:
        return None
    equals = [name for name, gained in gains.items() if gained >= max(gains.values()) * (1 - EQUAL_GAIN)]
    costs = {name: increase(able[name], reference) for name in equals}
    return able[min(equals, key=lambda name: cost.percent if (cost := costs[name]) else math.inf)]


def better(settings: Mapping[Settings, Measured], now: Settings) -> Settings:
    """The settings that gain most over those of now, or those of now where none gains enough."""
    gains = {each: gain(found, settings[now]) or 0.0 for each, found in settings.items() if not found.problem}
    best = max(gains, key=gains.__getitem__, default=now)
    return best if gains.get(best, 0.0) >= MIN_GAIN else now


def thread_choices(now: Settings, usable: int) -> list[Settings]:
    """Other numbers of threads worth a try: few cores share their memory's speed, and threads wait for each other."""
    wanted = {usable, usable - 1, usable * 3 // 4, usable // 2, 1 if usable <= 4 else usable // 2}
    numbers = sorted((each for each in wanted if each >= 1 and each != now.n_threads), reverse=True)
    return [Settings(number, now.flash_attention) for number in numbers[:MAX_THREAD_CHOICES]]


def flash_choices(now: Settings, kv_type: str) -> list[Settings]:
    """A key-value cache of whole numbers works with flash attention alone: there is nothing to choose."""
    if kv_type != "f16":
        return []
    return [Settings(now.n_threads, flash) for flash in (True, False) if flash is not now.flash_attention]


def usable_cpus() -> int:
    """CPUs that this process may run on: what llama.cpp takes where a model names no number of threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
