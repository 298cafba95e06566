"""Whether reading a text could need very many places of a grammar at once: llama.cpp keeps every one of them.

It never merges or bounds its stacks, so `expr ::= term | term "+" expr` with brackets doubles them at every bracket.
An estimate from first characters, from above: exact ambiguity is undecidable. Called by the expansion's check.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_CHARACTERS = (1 << 129) - 1
"""A set of characters as bits: one for each of ASCII, the last for all others together."""

Sequences = list[list[int]]
"""A rule's alternatives: items from 0 are numbers of rules, those below stand for characters (see Form)."""


def mask_of(ranges: tuple[tuple[int, int], ...], *, negated: bool) -> int:
    """The set of some ranges of code points; a negated one always holds the characters beyond ASCII."""
    mask = 0
    for low, high in ranges:
        if low < 128:
            mask |= (1 << (min(high, 127) + 1)) - (1 << low)
        if high >= 128:
            mask |= 1 << 128
    return (ALL_CHARACTERS & ~mask) | 1 << 128 if negated else mask


@dataclass(frozen=True, slots=True)
class Form:
    """A grammar without left recursion: item -1 - k is characters, the first of them of the set masks[k]."""

    rules: list[Sequences]
    masks: list[int]
    empty: list[bool]
    order: list[int]
    """Every rule after those that may come first in it."""


def too_ambiguous(form: Form, limit: int) -> int | None:
    """A rule that is the reason for more than limit places at once, None if there is none."""
    return _Ambiguity(form).find(limit)


class _Ambiguity:
    def __init__(self, form: Form) -> None:
        self._form = form
        self._first = [0] * len(form.rules)
        for number in form.order:
            self._first[number] = self._any_first(form.rules[number])
        self._parts = _components(form.rules)
        self._part_of = [0] * len(form.rules)
        for index, part in enumerate(self._parts):
            for number in part:
                self._part_of[number] = index
        self._inner_first = [0] * len(form.rules)
        for number in form.order:
            inside = [items for items in form.rules[number] if self._has_inside(number, items)]
            for items in inside:
                self._inner_first[number] |= self._way_around(number, items)
        self._tails = self._all_tails()
        self._widths = [1] * len(form.rules)

    def find(self, limit: int) -> int | None:
        for part in self._parts:
            recursive = any(self._inside(number, item) for number in part for item in self._items(number))
            if recursive and any(self._grows(number) for number in part):
                for number in part:
                    if self._conflicts(number):
                        return number
            width = sum(self._width(number) for number in part)
            for number in part:
                self._widths[number] = width
            if width > limit:
                return part[0]
        return None

    # First characters, and those that may go on with something that could have ended

    def _mask(self, item: int) -> int:
        return self._form.masks[-1 - item] if item < 0 else self._first[item]

    def _is_empty(self, item: int) -> bool:
        return item >= 0 and self._form.empty[item]

    def _any_first(self, sequences: Sequences) -> int:
        mask = 0
        for items in sequences:
            mask |= self._sequence_first(items)
        return mask

    def _sequence_first(self, items: list[int]) -> int:
        mask = 0
        for item in items:
            mask |= self._mask(item)
            if not self._is_empty(item):
                break
        return mask

    def _way_around(self, number: int, items: list[int]) -> int:
        """First characters of a sequence that lead back into the recursion of its rule."""
        mask = 0
        for item in items:
            mask |= self._inner_first[item] if self._inside(number, item) else self._mask(item)
            if not self._is_empty(item):
                break
        return mask

    def _all_tails(self) -> list[int]:
        tails = [0] * len(self._form.rules)
        users: list[list[int]] = [[] for _ in tails]
        for number in range(len(tails)):
            for item in self._items(number):
                if item >= 0:
                    users[item].append(number)
        pending = list(range(len(tails)))
        while pending:
            number = pending.pop()
            mask = self._tail(number, tails)
            if mask != tails[number]:
                tails[number] = mask
                pending += users[number]
        return tails

    def _tail(self, number: int, tails: list[int]) -> int:
        mask = 0
        for items in self._form.rules[number]:
            for index in range(len(items) - 1, -1, -1):
                if items[index] >= 0:
                    mask |= tails[items[index]]
                if not self._is_empty(items[index]):
                    break
                # At the very start of a rule nothing has begun that could go on.
                mask |= self._mask(items[index]) if index else 0
        return mask

    # Recursion

    def _items(self, number: int) -> list[int]:
        return [item for items in self._form.rules[number] for item in items]

    def _inside(self, number: int, item: int) -> bool:
        return item >= 0 and self._part_of[item] == self._part_of[number]

    def _has_inside(self, number: int, items: list[int]) -> bool:
        return any(self._inside(number, item) for item in items)

    def _grows(self, number: int) -> bool:
        """Whether the rule leaves something behind on the stack for each turn of the recursion."""
        return any(self._has_inside(number, items[:-1]) for items in self._form.rules[number])

    def _conflicts(self, number: int) -> bool:
        """Whether one character can begin two ways around the recursion."""
        seen = 0
        for items in self._form.rules[number]:
            if not self._has_inside(number, items):
                continue
            mask = self._way_around(number, items)
            if mask & seen or self._neighbours_conflict(number, items):
                return True
            seen |= mask
        return False

    def _neighbours_conflict(self, number: int, items: list[int]) -> bool:
        """Whether an item that may be empty, or go on, shares a character with the next one that recurs as well."""
        before = 0
        for item in items:
            inside = self._inside(number, item)
            mask = self._inner_first[item] if inside else 0
            if mask & before:
                return True
            after = self._tails[item] | mask if inside else 0
            before = before | after if self._is_empty(item) else self._tails[item] if inside else 0
        return False

    # How many places at once, rules without recursion

    def _width(self, number: int) -> int:
        sequences = self._form.rules[number]
        masks = [self._sequence_first(items) for items in sequences]
        widths = [self._sequence_width(number, items) for items in sequences]
        shared = _shared(masks)
        together = sum(width for width, overlaps in zip(widths, shared, strict=True) if overlaps)
        return max([together, *widths])

    def _sequence_width(self, number: int, items: list[int]) -> int:
        """Items one after another need places one after another, unless the one could be the other's beginning."""
        widest = current = 1
        before = 0
        for item in items:
            width = 1 if item < 0 or self._inside(number, item) else self._widths[item]
            mask = self._mask(item)
            current = current + width if mask & before else width
            tail = self._tails[item] if item >= 0 else 0
            before = before | mask | tail if self._is_empty(item) else tail
            widest = max(widest, current)
        return widest


def _shared(masks: list[int]) -> list[bool]:
    """For each set whether it meets any of the others."""
    once = twice = 0
    for mask in masks:
        twice |= once & mask
        once |= mask
    return [bool(mask & twice) for mask in masks]


def _components(rules: list[Sequences]) -> list[list[int]]:
    """Rules that refer to each other in circles, together; each group after those it refers to (Tarjan's)."""
    references = [sorted({item for items in sequences for item in items if item >= 0}) for sequences in rules]
    index, low, on_stack = [-1] * len(rules), [0] * len(rules), [False] * len(rules)
    stack: list[int] = []
    found: list[list[int]] = []
    counter = 0
    for root in range(len(rules)):
        if index[root] >= 0:
            continue
        work = [(root, iter(references[root]))]
        index[root] = low[root] = counter
        counter += 1
        stack.append(root)
        on_stack[root] = True
        while work:
            number, following = work[-1]
            item = next(following, None)
            if item is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[number])
                if low[number] == index[number]:
                    found.append(_popped(stack, on_stack, number))
            elif index[item] < 0:
                index[item] = low[item] = counter
                counter += 1
                stack.append(item)
                on_stack[item] = True
                work.append((item, iter(references[item])))
            elif on_stack[item]:
                low[number] = min(low[number], index[item])
    return found


def _popped(stack: list[int], on_stack: list[bool], last: int) -> list[int]:
    part: list[int] = []
    while not part or part[-1] != last:
        part.append(stack.pop())
        on_stack[part[-1]] = False
    return part
