"""Which lane serves a request, and how many threads each lane computes with.

Pure functions over integers, called by lanes.py. Everything is weighed in prompt tokens: what a lane knows of the
prompt saves some, and taking turns with another adapter vector costs about as much as computing some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inference.engine.types import AdapterVector

TURN_TOKENS = 128
"""What each other vector in a lane costs a request: with it, turns are taken (turns.py)."""
JOIN_TOKENS = 64
"""What it saves everybody that a vector's sequences are computed in one batch."""
MAX_KNOWN_TOKENS = 512
"""A known prefix counts for so many tokens at most: it is worth up to four vectors to take turns with, never more."""


@dataclass(frozen=True, slots=True)
class LaneView:
    """What a routing decision may look at. busy: live requests by vector; num_known: prompt tokens of the request that
    are computed in this lane."""

    num_slots: int
    busy: Mapping[AdapterVector, int]
    num_known: int = 0

    @property
    def num_live(self) -> int:
        return sum(self.busy.values())


def route(lanes: Sequence[LaneView], adapters: AdapterVector) -> int:
    """The index of the lane for a request of this vector.

    Never one without a free slot while another has one; then the cheapest: where the vector is busy already and alone,
    an idle lane, where it takes turns with few. Of equals the one with the fewest live requests, then the first.
    """

    def rank(index: int) -> tuple[int, int, int, int]:
        lane = lanes[index]
        num_before = max(0, lane.num_live + 1 - lane.num_slots)
        return num_before, _cost(lane, adapters), lane.num_live, index

    return min(range(len(lanes)), key=rank)


def _cost(lane: LaneView, adapters: AdapterVector) -> int:
    """In prompt tokens; below 0 where the lane saves some."""
    joins = adapters in lane.busy
    turns = TURN_TOKENS * (len(lane.busy) - joins)
    return turns - JOIN_TOKENS * joins - min(lane.num_known, MAX_KNOWN_TOKENS)


def share_threads(n_threads: int, loads: Mapping[int, int]) -> dict[int, int]:
    """Threads of each lane that has work. loads: sequences by lane, each at least 1.

    One each, though that be more than there are; the others go one by one to the lane that has most sequences a thread
    (D'Hondt's method).
    """
    shares = dict.fromkeys(loads, 1)
    for _ in range(n_threads - len(loads) if loads else 0):
        neediest = min(loads, key=lambda lane: (-loads[lane] / shares[lane], lane))
        shares[neediest] += 1
    return shares
