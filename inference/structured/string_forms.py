"""Strings of JSON as grammar pieces: any characters between two lengths, and the formats with a grammar of their own.

Lengths count Unicode characters, as JSON Schema does. Of the escapes only the two-character ones are allowed, so a
string's text is at most twice its length; surrogates and raw control characters cannot come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from inference.structured.number_forms import digits_between, naturals
from inference.structured.pieces import EMPTY, Piece, Rules, choice, literal, one_of, optional, repeat, sequence

QUOTE = literal('"')
PLAIN_CHARACTERS = r" !#-\[\]-~\u0080-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF"
"""All but the quotation mark, the backslash, controls, surrogates and two code points that are no characters."""


def quoted(piece: Piece) -> Piece:
    return sequence(QUOTE, piece, QUOTE)


def text(rules: Rules, low: int, high: int, *, counts_bytes: bool = False) -> Piece:
    """A string of low to high characters. counts_bytes: those beyond low have high - low bytes together, escapes
    included; a string of ASCII is then as long as before, and the longest one is a quarter of it."""
    return rules.once(("text", low, high, counts_bytes), lambda: _text(rules, low, high, counts_bytes=counts_bytes))


def _text(rules: Rules, low: int, high: int, *, counts_bytes: bool) -> Piece:
    escape = sequence(literal("\\"), one_of(r"\"\\/bfnrt"))
    char = rules.name("char", choice([one_of(PLAIN_CHARACTERS), escape]))
    if not counts_bytes:
        return rules.name("string", quoted(repeat(char, low, high)))
    widths = {1: one_of(r" !#-\[\]-~"), 2: choice([one_of(r"\u0080-\u07FF"), escape]), **WIDE}
    return rules.name("string", quoted(sequence(repeat(char, low, low), at_most(rules, widths, high - low))))


WIDE = {3: one_of(r"\u0800-\uD7FF\uE000-\uFFFD"), 4: one_of(r"\U00010000-\U0010FFFF")}
"""Characters of three and of four bytes."""


def at_most(rules: Rules, widths: Mapping[int, Piece], num_bytes: int) -> Piece:
    """A text of at most so many bytes in all. widths: what it is made of, by how many bytes each takes. One rule for
    each number of bytes that may be left, so that every character has one way to be read."""
    return _counted(rules, widths, num_bytes, num_spare=0)


def block_of(rules: Rules, widths: Mapping[int, Piece], num_bytes: int) -> Piece:
    """As at_most, of so many bytes that the widest does not fit behind it."""
    return _counted(rules, widths, num_bytes, num_spare=max(widths) - 1)


def _counted(rules: Rules, widths: Mapping[int, Piece], num_bytes: int, *, num_spare: int) -> Piece:
    """num_spare: it ends where no more bytes than these are left; 0: anywhere."""
    named = {width: rules.name(f"bytes-{width}", piece) for width, piece in widths.items()}
    ends = () if num_spare else (EMPTY,)
    rests = [EMPTY] * (num_spare + 1)
    for left in range(num_spare + 1, num_bytes + 1):
        taken = [sequence(piece, rests[left - width]) for width, piece in named.items() if width <= left]
        rests.append(replace(rules.name("rest", choice([*taken, *ends])), longest=left, num_bytes=left))
    return rests[num_bytes]


@dataclass(frozen=True, slots=True)
class Format:
    """What is between the quotation marks, and the length of its shortest text in characters."""

    piece: Callable[[Rules], Piece]
    shortest: int


def _digits(count: int) -> Piece:
    return repeat(one_of("0-9"), count, count)


def _two_digits(low: int, high: int) -> Piece:
    return choice(digits_between(f"{low:02d}", f"{high:02d}"))


def _date(rules: Rules) -> Piece:
    """Dates of the years 1000 to 2999 that exist; the 29th of February from 1904 on."""
    long_month = choice([sequence(literal("0"), one_of("13578")), literal("10"), literal("12")])
    short_month = choice([sequence(literal("0"), one_of("469")), literal("11")])
    day = choice(
        [
            sequence(long_month, literal("-"), _two_digits(1, 31)),
            sequence(short_month, literal("-"), _two_digits(1, 30)),
            sequence(literal("02-"), _two_digits(1, 28)),
        ]
    )
    common = sequence(one_of("12"), _digits(3), literal("-"), day)
    fourth = [sequence(one_of("2468"), one_of("048")), sequence(one_of("13579"), one_of("26"))]
    leap_1900 = sequence(literal("19"), choice([*fourth, sequence(literal("0"), one_of("48"))]))
    leap_2000 = sequence(literal("20"), choice([*fourth, sequence(literal("0"), one_of("048"))]))
    return rules.name("date", choice([common, sequence(choice([leap_1900, leap_2000]), literal("-02-29"))]))


def _time(rules: Rules) -> Piece:
    """RFC 3339 full-time, without leap seconds."""
    minutes = sequence(_two_digits(0, 23), literal(":"), _two_digits(0, 59))
    fraction = optional(sequence(literal("."), repeat(one_of("0-9"), 1, 6)))
    offset = choice([literal("Z"), sequence(one_of(r"+\-"), minutes)])
    return rules.name("time", sequence(minutes, literal(":"), _two_digits(0, 59), fraction, offset))


def _date_time(rules: Rules) -> Piece:
    return sequence(_date(rules), literal("T"), _time(rules))


def _duration(rules: Rules) -> Piece:
    """ISO 8601 durations as RFC 3339, appendix A, has them: no unit left out between two."""
    count = rules.name("count", choice([literal("0"), sequence(one_of("1-9"), repeat(one_of("0-9"), 0, 3))]))

    def chain(units: str) -> Piece:
        pieces: list[Piece] = []
        for unit in reversed(units):
            following = optional(pieces[-1]) if pieces else sequence()
            pieces.append(rules.name(f"unit-{unit}", sequence(count, literal(unit), following)))
        return choice(pieces)

    clock = rules.name("clock", sequence(literal("T"), chain("HMS")))
    calendar = sequence(rules.name("calendar", chain("YMD")), optional(clock))
    return sequence(literal("P"), choice([calendar, clock, sequence(count, literal("W"))]))


def _uuid(rules: Rules) -> Piece:
    digit = one_of("0-9a-fA-F")
    groups = [repeat(digit, count, count) for count in (8, 4, 4, 4, 12)]
    return rules.name("uuid", sequence(groups[0], *(sequence(literal("-"), group) for group in groups[1:])))


def _hostname(rules: Rules) -> Piece:
    word = repeat(one_of("A-Za-z0-9"), 1, 16)
    label = rules.name("label", sequence(word, repeat(sequence(literal("-"), word), 0, 2)))
    top = repeat(one_of("A-Za-z"), 2, 12)
    # A last label of letters alone: an address of digits is no host name.
    return rules.name("hostname", sequence(repeat(sequence(label, literal(".")), 1, 3), top))


def _email(rules: Rules) -> Piece:
    word = repeat(one_of(r"A-Za-z0-9_+\-"), 1, 24)
    return sequence(word, optional(sequence(literal("."), word)), literal("@"), _hostname(rules))


def _uri(rules: Rules) -> Piece:
    port = optional(sequence(literal(":"), naturals(1, 65535) or literal("80")))
    char = one_of(r"A-Za-z0-9._~/\-")
    path = optional(sequence(literal("/"), repeat(char, 0, 80)))
    query = optional(sequence(literal("?"), repeat(one_of(r"A-Za-z0-9._~=&\-"), 0, 80)))
    return sequence(choice([literal("https://"), literal("http://")]), _hostname(rules), port, path, query)


def _ipv4(rules: Rules) -> Piece:
    octet = rules.name("octet", naturals(0, 255) or literal("0"))
    return sequence(octet, repeat(sequence(literal("."), octet), 3, 3))


def _ipv6(rules: Rules) -> Piece:
    """The eight groups written out."""
    group = repeat(one_of("0-9a-fA-F"), 1, 4)
    return sequence(group, repeat(sequence(literal(":"), group), 7, 7))


FORMATS: dict[str, Format] = {
    "date": Format(_date, 10),
    "time": Format(_time, 9),
    "date-time": Format(_date_time, 20),
    "duration": Format(_duration, 3),
    "uuid": Format(_uuid, 36),
    "hostname": Format(_hostname, 4),
    "email": Format(_email, 6),
    "uri": Format(_uri, 11),
    "ipv4": Format(_ipv4, 7),
    "ipv6": Format(_ipv6, 15),
}
