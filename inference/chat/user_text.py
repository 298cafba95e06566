"""How text that came from outside stays text: marks in it that no special token survives.

A template writes special tokens as plain text ("<|im_end|>"), so once it has written a prompt, what it wrote itself and
what a user wrote look alike. Before rendering, a mark is put into users' strings where a special token could begin or
end; afterwards special tokens are looked for while the marks still stand, and then the marks go. The mark is a lone
surrogate: no text that arrives can hold one. Templates also look into the text (does it contain "</think>"?), so

- a string in which no special token can begin or end is left exactly as it is, which is nearly every string;
- in the others, literals that the template itself compares with stay whole, unless they are parts of a special token.

Why that is enough: a special token that holds a user's character either begins or ends with one, and then a mark
stands beside it, within the token; or has only its middle from a user, and then that string as a whole is such a
middle and has marks around it. tests/real/test_chat_real.py attacks it. Pure, in the child that renders.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

MARK = "\udfff"
_ESCAPED_MARK = re.compile(r"(\\\\)|\\udfff")


class UserText(str):
    """A string with marks. Templates that print a list or an object print its repr, which would spell the mark out."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _ESCAPED_MARK.sub(lambda found: found[1] or MARK, super().__repr__())


class SpecialTokens:
    """The texts of a vocabulary's special tokens, prepared for many questions. Made once a vocabulary."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = {text: token for text, token in ids.items() if len(text) > 1}
        self.ends = frozenset(text[end] for text in self.ids for end in (0, -1))
        firsts, lasts = ({text[end] for text in self.ids} for end in (0, -1))
        self._gaps = re.compile(f"(?<={_any_of(firsts)})|(?={_any_of(lasts)})")
        self._first = re.compile(_any_of(firsts))
        self._lengths = sorted({len(text) for text in self.ids}, reverse=True)
        self._longest = max(self._lengths, default=0)
        self._all = "\0".join(self.ids)
        self._heads = frozenset(text[:length] for text in self.ids for length in range(1, len(text)))
        self._tails = frozenset(text[-length:] for text in self.ids for length in range(1, len(text)))

    def are_part_of(self, text: str) -> bool:
        """Whether one of them stands in the text."""
        return any(token in text for token in self.ids)

    def can_hold(self, text: str) -> bool:
        """Whether the text is a part of one of them."""
        return len(text) <= self._longest and text in self._all

    def touch(self, text: str) -> bool:
        """Whether one of them stands in the text, or could with something before, behind or around it."""
        return (
            self.can_hold(text)
            or any(text[:length] in self._tails or text[-length:] in self._heads for length in range(1, len(text)))
            or self.are_part_of(text)
        )

    def mark(self, text: str) -> str:
        return self._gaps.sub(MARK, text)

    def split(self, text: str) -> list[tuple[str, bool]]:
        """(text, is it a special token?), in order; the longest that begins at a place wins. Marks are gone then."""
        found: list[tuple[str, bool]] = []
        done = 0
        for match in self._first.finditer(text):
            start = match.start()
            if start < done or text.startswith(MARK, start + 1):
                continue
            token = self._at(text, start)
            if token is not None:
                found += [(text[done:start].replace(MARK, ""), False), (token, True)]
                done = start + len(token)
        found.append((text[done:].replace(MARK, ""), False))
        return [(piece, is_special) for piece, is_special in found if piece]

    def _at(self, text: str, start: int) -> str | None:
        pieces = (text[start : start + length] for length in self._lengths)
        return next((piece for piece in pieces if piece in self.ids), None)


def _any_of(characters: Iterable[str]) -> str:
    return f"[{''.join(map(re.escape, sorted(characters)))}]" if characters else r"(?!)"


class Marker:
    """Marks the strings of one conversation for one template. `known`: words that the template compares with."""

    def __init__(self, special: SpecialTokens, literals: Collection[str], fields: Collection[str]) -> None:
        self._special = special
        self._known = frozenset(literals) | frozenset(fields)
        self._whole = tuple(
            literal
            for literal in literals
            if literal.strip() and not special.ends.isdisjoint(literal) and not special.touch(literal)
        )

    def value(self, value: Any) -> Any:
        """JSON with marks in its strings and keys."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(name): self.value(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return value

    def text(self, text: str) -> str:
        text = without_surrogates(text)
        if self._special.ends.isdisjoint(text):
            return self._around(text)
        pieces, done = [], 0
        for start, end in self._literals_in(text):
            pieces += [self._special.mark(text[done:start]), text[start:end]]
            done = end
        return UserText("".join([*pieces, self._special.mark(text[done:])]))

    def _around(self, text: str) -> str:
        """Only as the middle of a special token could it matter."""
        core = text.strip()
        if not core or core in self._known or not self._special.can_hold(core):
            return text
        return UserText(text.replace(core, f"{MARK}{core}{MARK}", 1))

    def _literals_in(self, text: str) -> list[tuple[int, int]]:
        """Where the template's own literals stand; those that overlap are one."""
        places = sorted(place for literal in self._whole for place in _occurrences(literal, text))
        merged: list[tuple[int, int]] = []
        for start, end in places:
            if merged and start < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        return merged


def _occurrences(literal: str, text: str) -> Iterable[tuple[int, int]]:
    start = text.find(literal)
    while start >= 0:
        yield start, start + len(literal)
        start = text.find(literal, start + 1)


def without_surrogates(text: str) -> str:
    """Lone surrogates, which no UTF-8 has, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
