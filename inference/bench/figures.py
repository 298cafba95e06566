"""Arithmetic of the benchmark: percentiles, spreads over rounds, ratios round by round, and packed samples.

Pure: no clock, no process, no Django.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

PACK_UNIT_SECONDS = 1e-5
MAX_PACKED_SAMPLES = 2000


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample below which `share` (0..1) of them lie, nearest rank. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    rank = max(1, -(-int(share * 1_000_000) * len(ordered) // 1_000_000))
    return ordered[rank - 1]


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the ends of one figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without values."""
        return cls(median(values), min(values), max(values)) if values else None

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)

    def show(self, digits: int = 1) -> str:
        """`12.3 (11.9 to 13.0)`; the middle alone where the ends round to it."""
        middle, low, high = (f"{value:.{digits}f}" for value in (self.median, self.low, self.high))
        return middle if low == middle == high else f"{middle} ({low} to {high})"


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[tuple[float, float]]:
    """The rounds in which both were measured."""
    return [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Spread | None:
    """ours / theirs within each round, then over the rounds: what changes between rounds cancels out."""
    return Spread.of([a / b for a, b in paired(ours, theirs) if b > 0])


def added(ours: Sequence[float | None], direct: Sequence[float | None]) -> Spread | None:
    """ours - direct within each round, then over the rounds."""
    return Spread.of([a - b for a, b in paired(ours, direct)])


def thin(samples: Sequence[float], most: int = MAX_PACKED_SAMPLES) -> list[float]:
    """At most `most` samples, evenly taken in their order."""
    if len(samples) <= most:
        return list(samples)
    step = len(samples) / most
    return [samples[int(index * step)] for index in range(most)]


def pack(samples: Sequence[float]) -> str:
    """Samples in seconds as text: whole units of 10 µs, sorted, differences as varints, zlib, base64.

    The order is lost. Varint: seven bits a byte, low ones first, the top bit says that more follow (as in protobuf).
    """
    data = bytearray()
    previous = 0
    for units in sorted(round(sample / PACK_UNIT_SECONDS) for sample in samples):
        step, previous = units - previous, units
        while step >= 0x80:
            data.append(step & 0x7F | 0x80)
            step >>= 7
        data.append(step)
    return base64.b64encode(zlib.compress(bytes(data), 9)).decode()


def unpack(packed: str) -> list[float]:
    """The samples of `pack` in seconds, sorted, to 10 µs."""
    samples: list[float] = []
    total = step = shift = 0
    for byte in zlib.decompress(base64.b64decode(packed)):
        step |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            total += step
            samples.append(total * PACK_UNIT_SECONDS)
            step = shift = 0
    return samples
