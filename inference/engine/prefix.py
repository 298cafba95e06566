"""What a prompt has in common with tokens that are computed already. Pure; used by the engine for waiting requests.

Tokens may be shared only under one key: the caller's scope (a tenant's) and the adapter vector they were computed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from inference.engine.types import AdapterVector, SlotTask

CacheKey = tuple[str, AdapterVector]
"""Scope and adapter vector: what was computed under one key is never reused under another."""


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What a free slot still holds. used: number of the step after which it became free. task: what that was."""

    key: CacheKey
    tokens: Sequence[int]
    used: int
    task: SlotTask | None = None


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with. Both are lists, or both tuples: slices are compared, which is quick."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:  # the first `low` are equal, the first `high + 1` are not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
