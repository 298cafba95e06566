"""A safe subset of the regular expressions of JSON Schema's `pattern`, as grammar pieces.

A pattern is a search; the pieces produce the matching part alone, which is valid whether or not it is anchored. No
look-around, back-references, word boundaries or inner anchors. No regular expression is ever run here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from inference.structured.pieces import EMPTY, Piece, choice, literal, one_of, repeat, sequence

MAX_PATTERN = 512
MAX_DEPTH = 12
MAX_COUNT = 1_000
MAX_CODE_POINT = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]

_DIGIT: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20))
_ASCII: Ranges = ((0x20, 0x7E),)
_SENDABLE: Ranges = ((0x20, 0x7E), (0x80, 0xD7FF), (0xE000, 0xFFFD), (0x10000, MAX_CODE_POINT))
"""Characters that a JSON string can hold as they are, escapes of two quotes included."""
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B}
_SHORT_ESCAPES = {0x08: "\\b", 0x09: "\\t", 0x0A: "\\n", 0x0C: "\\f", 0x0D: "\\r", 0x22: '\\"', 0x5C: "\\\\"}
_BRACES = re.compile(r"\{(\d{1,6})(?:(,)(\d{1,6})?)?\}")
_HEX = {"x": re.compile(r"[0-9A-Fa-f]{2}"), "u": re.compile(r"[0-9A-Fa-f]{4}")}


class PatternError(ValueError):
    """A pattern outside the subset, or one whose lengths cannot be kept."""


@dataclass(frozen=True, slots=True)
class _Chars:
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    options: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    node: _Node
    low: int
    high: int | None


_Node = _Chars | _Sequence | _Choice | _Repeat


def pattern_piece(pattern: str, low: int, high: int) -> Piece:
    """Strings of low to high characters that match, as they stand between quotation marks.

    A single repeated character is cut to the lengths; else open repetitions are bounded so that no text is longer than
    high, and a pattern with texts too short, or too long without open repetitions, is refused. Raises PatternError.
    """
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"a pattern of more than {MAX_PATTERN} characters")
    node = _Parser(pattern).pattern()
    if isinstance(node, _Repeat) and isinstance(node.node, _Chars):
        return _repeated_char(node, node.node, low, high)
    if _shortest(node) < low:
        raise PatternError("matches texts shorter than minLength")
    bound = high
    while _longest(node, bound) > high:
        if bound == 0:
            raise PatternError(f"matches texts longer than {high} characters")
        bound //= 2
    return _emit(node, bound)


def _repeated_char(node: _Repeat, chars: _Chars, low: int, limit: int) -> Piece:
    first = max(node.low, low)
    last = limit if node.high is None else min(node.high, limit)
    if first > last:
        raise PatternError("no text of the allowed length matches")
    return repeat(_emit(chars, 0), first, last)


def _shortest(node: _Node) -> int:
    match node:
        case _Chars():
            return 1
        case _Sequence(parts=parts):
            return sum(map(_shortest, parts))
        case _Choice(options=options):
            return min(map(_shortest, options))
        case _Repeat(node=inner, low=low):
            return _shortest(inner) * low


def _longest(node: _Node, bound: int) -> int:
    match node:
        case _Chars():
            return 1
        case _Sequence(parts=parts):
            return sum(_longest(part, bound) for part in parts)
        case _Choice(options=options):
            return max(_longest(option, bound) for option in options)
        case _Repeat(node=inner, low=low, high=high):
            return _longest(inner, bound) * (high if high is not None else max(low, bound))


def _emit(node: _Node, bound: int) -> Piece:
    match node:
        case _Chars(ranges=ranges):
            return _char_piece(ranges)
        case _Sequence(parts=parts):
            return _emit_sequence(parts, bound)
        case _Choice(options=options):
            return choice(_emit(option, bound) for option in options)
        case _Repeat(node=inner, low=low, high=high):
            return repeat(_emit(inner, bound), low, high if high is not None else max(low, bound))


def _emit_sequence(parts: Iterable[_Node], bound: int) -> Piece:
    """The parts in a row, single characters side by side as one literal."""
    pieces: list[Piece] = []
    run = ""
    for part in parts:
        single = _single_char(part)
        if single is not None:
            run += single
            continue
        pieces += [literal(run), _emit(part, bound)] if run else [_emit(part, bound)]
        run = ""
    return sequence(*pieces, literal(run) if run else EMPTY)


def _single_char(node: _Node) -> str | None:
    if isinstance(node, _Chars) and len(node.ranges) == 1 and node.ranges[0][0] == node.ranges[0][1]:
        return _in_json(node.ranges[0][0])
    return None


def _in_json(code_point: int) -> str:
    if code_point < 0x20 and code_point not in _SHORT_ESCAPES:
        return f"\\u{code_point:04x}"
    return _SHORT_ESCAPES.get(code_point, chr(code_point))


def _char_piece(ranges: Ranges) -> Piece:
    """One character of the ranges as JSON writes it: a class, and those that need an escape one by one."""
    special = sorted({0x22, 0x5C} | set(range(0x20)))
    escaped = [literal(_in_json(code)) for code in special if _holds(ranges, code)]
    plain = _without(ranges, ((0x22, 0x22), (0x5C, 0x5C), (0x00, 0x1F)))
    classes = [one_of("".join(map(_class_range, plain)))] if plain else []
    return choice([*classes, *escaped])


def _class_range(ends: tuple[int, int]) -> str:
    low, high = (chr(end) if chr(end).isascii() and chr(end).isalnum() else f"\\U{end:08X}" for end in ends)
    return low if ends[0] == ends[1] else f"{low}-{high}"


def _holds(ranges: Ranges, code_point: int) -> bool:
    return any(low <= code_point <= high for low, high in ranges)


def _without(ranges: Ranges, removed: Ranges) -> Ranges:
    kept = list(ranges)
    for start, end in removed:
        kept = [
            part
            for low, high in kept
            for part in ((low, min(high, start - 1)), (max(low, end + 1), high))
            if part[0] <= part[1]
        ]
    return tuple(sorted(set(kept)))


class _Parser:
    """Recursive descent over the pattern, one position, depth bounded."""

    def __init__(self, pattern: str) -> None:
        self._text, self._at, self._depth = pattern, 0, 0

    def pattern(self) -> _Node:
        node = self._choice()
        if self._at < len(self._text):
            self._refuse("an unmatched bracket")
        return node

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        if self._depth == 0:
            self._take("^")
        while (char := self._peek()) and char not in "|)":
            if char == "$" and self._depth == 0 and self._text[self._at + 1 : self._at + 2] in {"", "|"}:
                self._at += 1
                break
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else _Sequence(tuple(parts))

    def _quantified(self, node: _Node) -> _Node:
        braces = _BRACES.match(self._text, self._at)
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if braces is None and simple is None:
            return node
        low, high = self._braces(braces) if braces else simple or (0, None)
        self._at = braces.end() if braces else self._at + 1
        self._take("?")  # a lazy quantifier matches the same texts
        if self._peek() in {"*", "+", "?"} or _BRACES.match(self._text, self._at):
            self._refuse("a quantifier of a quantifier")
        return _Repeat(node, low, high)

    def _braces(self, braces: re.Match[str]) -> tuple[int, int | None]:
        low = int(braces[1])
        high = int(braces[3]) if braces[3] else None if braces[2] else low
        if low > MAX_COUNT or (high is not None and not low <= high <= MAX_COUNT):
            self._refuse(f"a repetition above {MAX_COUNT} or upside down")
        return low, high

    def _atom(self) -> _Node:
        char = self._peek()
        self._at += 1
        if char == "(":
            return self._group()
        if char == "[":
            return _Chars(self._char_class())
        if char == ".":
            return _Chars(_SENDABLE)
        if char == "\\":
            return _Chars(self._escape())
        if char in "^$*+?{}]":
            self._refuse(f"'{char}' here")
        return _Chars(((ord(char), ord(char)),))

    def _group(self) -> _Node:
        if self._peek() == "?" and not self._take("?:"):
            self._refuse("a special group")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse("groups nested too deep")
        node = self._choice()
        if not self._take(")"):
            self._refuse("a group without an end")
        self._depth -= 1
        return node

    def _char_class(self) -> Ranges:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        has_shorthand = False
        while not self._take("]"):
            low = self._class_atom()
            has_shorthand |= low in _CLASSES.values()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in {"]", ""}:
                self._at += 1
                low = self._class_span(low, self._class_atom())
            ranges += low
        if not ranges:
            self._refuse("an empty class")
        if not negated:
            return tuple(ranges)
        # Engines differ on whether \d is ASCII, so what is left of it stays within ASCII, where they agree.
        left = _without(_ASCII if has_shorthand else _SENDABLE, tuple(ranges))
        if not left:
            self._refuse("a class without a character")
        return left

    def _class_span(self, low: Ranges, high: Ranges) -> Ranges:
        ends = [*low, *high]
        if len(ends) != 2 or any(first != last for first, last in ends) or ends[0][0] > ends[1][0]:
            self._refuse("a range of characters that is none")
        return _without(((ends[0][0], ends[1][0]),), ((0xD800, 0xDFFF),))

    def _class_atom(self) -> Ranges:
        char = self._peek()
        if not char:
            self._refuse("a class without an end")
        self._at += 1
        return self._escape() if char == "\\" else ((ord(char), ord(char)),)

    def _escape(self) -> Ranges:
        char = self._peek()
        self._at += 1
        if char in _CLASSES:
            return _CLASSES[char]
        if char.lower() in _CLASSES and char:
            return _without(_ASCII, _CLASSES[char.lower()])
        if char in _CONTROLS:
            return ((_CONTROLS[char], _CONTROLS[char]),)
        digits = _HEX[char].match(self._text, self._at) if char in _HEX else None
        if digits:
            self._at = digits.end()
            code_point = int(digits[0], 16)
            if 0xD800 <= code_point <= 0xDFFF:
                self._refuse("a surrogate")
            return ((code_point, code_point),)
        if not char or char.isalnum():
            self._refuse(f"the escape '\\{char}'")
        return ((ord(char), ord(char)),)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _refuse(self, what: str) -> NoReturn:
        raise PatternError(f"not supported in a pattern: {what} (character {self._at + 1})")
