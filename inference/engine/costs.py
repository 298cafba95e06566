"""What a step costs in time, as a function of how many tokens it carries.

Pure numbers: a backend measures the points once at load, the scheduler sizes prompt chunks with them.
Seconds are wall seconds of one step, tokens are the sum over all sequences of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

PROBE_TOKENS = (1, 2, 4, 8, 16, 64, 256)
"""Steps worth measuring; the last two are reached only where they are cheap, as on a GPU."""
LEAST_POINTS, LEAST_POINTS_SECONDS = 4, 4.0
"""On a machine that is busy just then a single point would say that every token costs a whole step."""


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Measured (tokens, seconds) points, tokens rising. An empty curve means that a step takes no time."""

    points: tuple[tuple[int, float], ...] = ()

    def seconds(self, num_tokens: int) -> float:
        """The expected seconds of a step of num_tokens: linear between points, and beyond them by the last slope."""
        if not self.points:
            return 0.0
        below = (0, 0.0)
        for index, point in enumerate(self.points):
            if num_tokens <= point[0] or index == len(self.points) - 1:
                return point[1] + (num_tokens - point[0]) * _slope(below, point)
            below = point
        raise AssertionError("unreachable: the last point always returns")  # pragma: no cover

    def tokens_within(self, seconds: float, most: int) -> int:
        """The largest step, 0..most tokens, that is expected to take no longer than seconds."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle - 1)
        return low


def _slope(below: tuple[int, float], above: tuple[int, float]) -> float:
    """Seconds per token between two points; never negative, or noise would make large steps look free."""
    return max(0.0, (above[1] - below[1]) / (above[0] - below[0]))


def measure(
    step: Callable[[int], None],
    *,
    most: int,
    budget_seconds: float = 0.4,
    clock: Callable[[], float] = time.perf_counter,
    probe: Iterable[int] = PROBE_TOKENS,
) -> CostCurve:
    """Time step(n) for each n of probe up to most, twice each, and keep the faster run.

    The first step pays for reading the weights and is thrown away. Measuring ends before the first n that is
    expected to overrun the budget, the larger one as long as there are few points; at least one is measured.
    """
    started = clock()
    step(1)
    points: list[tuple[int, float]] = []
    for num_tokens in probe:
        expected = 2 * CostCurve(tuple(points)).seconds(num_tokens)
        budget = budget_seconds if len(points) >= LEAST_POINTS else LEAST_POINTS_SECONDS
        if num_tokens > most or (points and clock() - started + expected > budget):
            break
        points.append((num_tokens, min(_timed(step, num_tokens, clock) for _ in range(2))))
    return CostCurve(_rising(points))


def _timed(step: Callable[[int], None], num_tokens: int, clock: Callable[[], float]) -> float:
    started = clock()
    step(num_tokens)
    return clock() - started


def _rising(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The same points, each at least as expensive as the one before it."""
    floor = 0.0
    rising = []
    for num_tokens, seconds in points:
        floor = max(floor, seconds)
        rising.append((num_tokens, floor))
    return tuple(rising)
