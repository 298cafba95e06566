"""Pieces of a grammar under construction: GBNF text together with the longest and the shortest text it can produce.

Rules share their text: equal bodies become one rule, so what a grammar costs follows its shape, not its repetitions.
Pure; used by everything here that makes a grammar.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

MAX_SHORTEST = 4_096
_CODE_POINT = re.compile(r"\\[uU]([0-9A-Fa-f]{4}(?:[0-9A-Fa-f]{4})?)|\\?(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """`kind` says what may be written beside it without brackets. `longest` counts Unicode characters, `num_bytes` is
    the longest text in UTF-8: so many tokens at most, as each has a byte. `shortest` is a shortest text, None where it
    has more than MAX_SHORTEST characters."""

    text: str
    longest: int
    num_bytes: int
    shortest: str | None
    kind: Literal["atom", "sequence", "choice"] = "atom"

    @property
    def grouped(self) -> str:
        return f"({self.text})" if self.kind == "choice" else self.text


EMPTY = Piece("", 0, 0, "", "sequence")
NEWLINE = Piece(r'"\n"', 1, 1, "\n")


def literal(text: str) -> Piece:
    """Exactly this text, which has no control characters."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return Piece(f'"{escaped}"', len(text), len(text.encode()), _bounded(text)) if text else EMPTY


def one_of(ranges: str) -> Piece:
    """One character of a class, written as between the brackets."""
    chars = [_char(match) for match in _CODE_POINT.finditer(ranges)]
    return Piece(f"[{ranges}]", 1, max(len(char.encode()) for char in chars), chars[0])


def _char(match: re.Match[str]) -> str:
    code_point = match[1]
    if code_point is None:
        return match[2]
    char = chr(int(code_point, 16))
    return "\ud7ff" if "\ud800" <= char <= "\udfff" else char


def sequence(*pieces: Piece) -> Piece:
    parts = [piece for piece in pieces if piece.text]
    if len(parts) == 1:
        return parts[0]
    shortest = [part.shortest for part in parts if part.shortest is not None]
    return Piece(
        " ".join(part.grouped for part in parts),
        sum(part.longest for part in parts),
        sum(part.num_bytes for part in parts),
        _bounded("".join(shortest)) if len(shortest) == len(parts) else None,
        "sequence",
    )


def _bounded(text: str) -> str | None:
    return text if len(text) <= MAX_SHORTEST else None


def choice(pieces: Iterable[Piece]) -> Piece:
    """Any of the pieces, at least one of which is given; equal ones count once."""
    parts = list({piece.text: piece for piece in pieces}.values())
    if len(parts) == 1:
        return parts[0]
    text = " | ".join(part.text or '""' for part in parts)
    longest, num_bytes = max(part.longest for part in parts), max(part.num_bytes for part in parts)
    shortest = [part.shortest for part in parts if part.shortest is not None]
    return Piece(text, longest, num_bytes, min(shortest, key=len, default=None), "choice")


def repeat(piece: Piece, low: int, high: int) -> Piece:
    """From low to high times. Counts of hundreds want an atom: llama.cpp multiplies them with the rules of a group."""
    if high == 0 or not piece.text:
        return EMPTY
    if (low, high) == (1, 1):
        return piece
    times = "?" if (low, high) == (0, 1) else f"{{{low}}}" if low == high else f"{{{low},{high}}}"
    text = piece.text if piece.kind == "atom" else f"({piece.text})"
    # Not an atom: a quantifier after a quantifier would be read as one more.
    short = piece.shortest if low else ""
    shortest = short * low if short is not None and len(short) * low <= MAX_SHORTEST else None
    return Piece(f"{text}{times}", piece.longest * high, piece.num_bytes * high, shortest, "sequence")


def optional(piece: Piece) -> Piece:
    return repeat(piece, 0, 1)


class Rules:
    """The named rules of one grammar. prefix: of all names, so that two grammars can be put together."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._names: dict[str, str] = {}
        self._taken: set[str] = {"root"}
        self._known: dict[Hashable, Piece] = {}

    def once(self, key: Hashable, make: Callable[[], Piece]) -> Piece:
        """The piece of this key, made when it is first asked for: made again it would be the same."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def name(self, hint: str, piece: Piece) -> Piece:
        """A reference to a rule with this body; an equal rule that exists already is used again."""
        if not piece.text:
            return EMPTY  # an empty body would swallow the next line
        if piece.text not in self._names:
            self._names[piece.text] = self._free_name(hint)
        return replace(piece, text=self._names[piece.text], kind="atom")

    def grammar(self, root: Piece, *, start: str = "root") -> str:
        lines = [f"{start} ::= {root.text}"] + [f"{name} ::= {body}" for body, name in self._names.items()]
        return "\n".join(lines) + "\n"

    def _free_name(self, hint: str) -> str:
        base = self._prefix + (re.sub(r"[^a-z0-9]+", "-", hint.lower())[:32].strip("-") or "rule")
        name, number = base, 2
        while name in self._taken:
            name, number = f"{base}-{number}", number + 1
        self._taken.add(name)
        return name


def any_literal(rules: Rules, texts: Iterable[str]) -> Piece:
    """Exactly one of the texts. Common beginnings are shared, so that few places are open for any character."""
    ordered = sorted(set(texts))
    if len(ordered) == 1:
        return literal(ordered[0])
    groups: dict[str, list[str]] = {}
    for text in ordered:
        groups.setdefault(text[:1], []).append(text)
    return choice(_with_beginning(rules, group) for group in groups.values())


def _with_beginning(rules: Rules, texts: list[str]) -> Piece:
    """Texts that start with the same character, sorted: the common beginning, then the rest as a rule of its own."""
    if len(texts) == 1:
        return literal(texts[0])
    first, last = texts[0], texts[-1]
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return sequence(literal(first[:length]), rules.name("end", any_literal(rules, [text[length:] for text in texts])))
