"""Numbers in an interval as grammar pieces: exact for integers, exact decimals for numbers.

No exponents within bounds, never a leading zero. Decimal arithmetic throughout: rounding to a double keeps order, and
where a bound is excluded the digits stay so few that no text rounds onto it.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from inference.structured.pieces import Piece, choice, literal, one_of, optional, repeat, sequence

DIGIT = one_of("0-9")
EXACT_DIGITS = 15
"""Decimal numbers of so many digits are all different as doubles."""


def digits_between(low: str, high: str) -> list[Piece]:
    """Digit strings of one length from low to high, as alternatives that share no text."""
    if low == high:
        return [literal(low)]
    if not low.strip("0") and not high.strip("9"):
        return [repeat(DIGIT, len(low), len(low))]
    first, last = int(low[0]), int(high[0])
    if first == last:
        return [sequence(literal(low[0]), rest) for rest in digits_between(low[1:], high[1:])]
    if len(low) == 1:
        return [one_of(f"{first}-{last}")]
    return _across(low, high, first, last)


def _across(low: str, high: str, first: int, last: int) -> list[Piece]:
    pieces: list[Piece] = []
    width = len(low) - 1
    if low[1:].strip("0"):
        pieces += [sequence(literal(low[0]), rest) for rest in digits_between(low[1:], "9" * width)]
        first += 1
    ending: list[Piece] = []
    if high[1:].strip("9"):
        ending = [sequence(literal(high[0]), rest) for rest in digits_between("0" * width, high[1:])]
        last -= 1
    if first <= last:
        head = one_of(f"{first}-{last}") if first < last else literal(str(first))
        pieces.append(sequence(head, repeat(DIGIT, width, width)))
    return pieces + ending


def naturals(low: int, high: int) -> Piece | None:
    """Whole numbers from low to high, both at least 0, without leading zeros; None if there are none."""
    if low > high:
        return None
    pieces: list[Piece] = []
    full: list[int] = []
    for width in range(len(str(low)), len(str(high)) + 1):
        start, end = max(low, 10 ** (width - 1) if width > 1 else 0), min(high, 10**width - 1)
        if width > 1 and (start, end) == (10 ** (width - 1), 10**width - 1):
            full.append(width)
        else:
            pieces += digits_between(str(start), str(end))
    if full:
        pieces.append(sequence(one_of("1-9"), repeat(DIGIT, full[0] - 1, full[-1] - 1)))
    return choice(pieces)


def integers(low: int, high: int) -> Piece | None:
    """Whole numbers from low to high, both included; None if there are none."""
    negative = naturals(max(1, -high), -low) if low < 0 else None
    positive = naturals(max(0, low), high) if high >= 0 else None
    pieces = [sequence(literal("-"), negative)] if negative else []
    return choice([*pieces, positive]) if positive else choice(pieces) if pieces else None


@dataclass(frozen=True, slots=True)
class Interval:
    """A range of numbers; None is no bound, `open` excludes the bound itself."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_open: bool = False
    high_open: bool = False

    def integer_bounds(self, num_digits: int) -> tuple[int, int]:
        """The first and last whole number inside, missing bounds replaced by those of so many digits."""
        limit = 10**num_digits - 1
        low = -limit if self.low is None else _ceiling(self.low)
        high = limit if self.high is None else _floor(self.high)
        if self.low_open and low == self.low:
            low += 1
        if self.high_open and high == self.high:
            high -= 1
        if self.low is None:
            low = min(low, high - limit) if high < 0 else low
        if self.high is None:
            high = max(high, low + limit) if low > 0 else high
        return low, high

    def meets(self, other: Interval) -> bool:
        """Whether some number is in both."""
        return _below(self.low, self.low_open, other.high, other.high_open) and _below(
            other.low, other.low_open, self.high, self.high_open
        )

    def __contains__(self, value: int | float) -> bool:
        number = Decimal(repr(value))
        return self.meets(Interval(number, number))


def _below(low: Decimal | None, low_open: bool, high: Decimal | None, high_open: bool) -> bool:
    if low is None or high is None or low < high:
        return True
    return low == high and not low_open and not high_open


def numbers(interval: Interval, num_digits: int, num_decimals: int) -> Piece | None:
    """Decimal numbers in the interval; with bounds on one side only, the other is that of num_digits digits."""
    if interval.low is None and interval.high is None:
        return _unbounded(num_digits, num_decimals)
    first, last = Interval(interval.low, interval.high).integer_bounds(num_digits)
    low = Decimal(first) if interval.low is None else interval.low
    high = Decimal(last) if interval.high is None else interval.high
    pieces: list[Piece] = []
    if low < 0:
        # Excluded either because the bound is, or because minus nothing would be the excluded nothing.
        mirrored = Interval(max(-high, Decimal(0)), -low, interval.high_open and high <= 0, interval.low_open)
        pieces += [sequence(literal("-"), piece) for piece in _magnitudes(mirrored, num_decimals)]
    if high >= 0:
        positive = Interval(max(low, Decimal(0)), high, interval.low_open and low >= 0, interval.high_open)
        pieces += _magnitudes(positive, num_decimals)
    return choice(pieces) if pieces else None


def _unbounded(num_digits: int, num_decimals: int) -> Piece:
    whole = choice([literal("0"), sequence(one_of("1-9"), repeat(DIGIT, 0, num_digits - 1))])
    exponent = sequence(one_of("eE"), optional(one_of("-+")), repeat(DIGIT, 1, 2))
    return sequence(optional(literal("-")), whole, _any_decimals(num_decimals), optional(exponent))


def _any_decimals(num_decimals: int) -> Piece:
    return optional(sequence(literal("."), repeat(DIGIT, 1, num_decimals)))


def _magnitudes(interval: Interval, num_decimals: int) -> list[Piece]:
    """Numbers of an interval of bounds at least 0: whole parts that may have any decimals, and the edges."""
    assert interval.low is not None
    assert interval.high is not None
    low, high = interval.low, interval.high
    first = _floor(low) + 1 if interval.low_open else _ceiling(low)
    last = _floor(high) - (2 if interval.high_open and high == _floor(high) else 1)
    pieces: list[Piece] = []
    inside = naturals(first, last)
    if inside is not None:
        pieces.append(sequence(inside, _any_decimals(num_decimals)))
    edges = {_floor(low), _floor(high), _floor(high) - 1}
    for whole in sorted(edge for edge in edges if edge >= 0 and not first <= edge <= last):
        pieces += _edge(whole, interval, num_decimals)
    return pieces


def _edge(whole: int, interval: Interval, num_decimals: int) -> list[Piece]:
    """Numbers with this whole part, where the interval allows some decimals only."""
    assert interval.low is not None
    assert interval.high is not None
    wanted = max(num_decimals, _num_decimals(interval.low), _num_decimals(interval.high))
    width = min(wanted, EXACT_DIGITS - len(str(whole)))
    pieces = [literal(str(whole))] if whole in interval else []
    if width < 1:
        return pieces
    scale = Decimal(10) ** width
    low, high = (interval.low - whole) * scale, (interval.high - whole) * scale
    start, end = max(_ceiling(low), 0), min(_floor(high), 10**width - 1)
    start += interval.low_open and start == low
    end -= interval.high_open and end == high
    decimals = _decimals(start, end, width)
    return [*pieces, sequence(literal(f"{whole}."), choice(decimals))] if decimals else pieces


def _decimals(start: int, end: int, width: int) -> list[Piece]:
    """Decimals of up to width digits whose value, in units of the last one, is from start to end."""
    if (start, end) == (0, 10**width - 1):
        return [repeat(DIGIT, 1, width)]
    pieces: list[Piece] = []
    for length in range(1, width + 1):
        unit = 10 ** (width - length)
        low, high = -(-start // unit), end // unit
        if low <= high:
            pieces += digits_between(f"{low:0{length}d}", f"{high:0{length}d}")
    return pieces


def _num_decimals(number: Decimal) -> int:
    exponent = number.normalize().as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _floor(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_FLOOR))


def _ceiling(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_CEILING))
