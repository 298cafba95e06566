"""A grammar as llama.cpp stores it, repetitions written out as rules, and the checks that need that form.

Counts what the expansion costs before making it, so a bomb is refused in the time its text takes to read. No
recursion over rules: hostile chains of them are as long as the text allows. Called by `gbnf.validate` alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from inference.structured.gbnf_ambiguity import ALL_CHARACTERS, Form, mask_of, too_ambiguous
from inference.structured.gbnf_tree import (
    MAX_REPETITION,
    AnyChar,
    Chars,
    Grammar,
    GrammarError,
    Group,
    Limits,
    Literal,
    Node,
    Repeat,
    RuleRef,
    TokenRef,
)

Items = list[int]
"""A sequence: numbers of rules, and -1 - k for a run of characters whose first is of the set Expansion.masks[k]."""


def check(grammar: Grammar, limits: Limits) -> None:
    """Refuse undefined rules, a missing root, left recursion, and what costs more than the limits. See `validate`."""
    _check_references(grammar)
    _check_products(grammar, limits)
    expansion = Expansion(grammar, limits)
    rules = expansion.rules
    empty = _reducible(rules, characters_count=True)
    order = _check_starts(grammar, rules, empty, limits)
    ending = _reducible(rules, characters_count=False)
    if not ending[next(number for number, rule in enumerate(rules) if rule.owner == "root")]:
        raise grammar.error("never_ends", "no text of finite length satisfies rule 'root'", grammar.offsets["root"])
    if limits.num_places is not None:
        form = Form([rule.alternatives for rule in rules], expansion.masks, empty, order)
        culprit = too_ambiguous(form, limits.num_places)
        if culprit is not None:
            name = rules[culprit].owner
            message = f"alternatives of rule '{name}' begin alike: write what they have in common once, before them"
            raise grammar.error("too_ambiguous", message, grammar.offsets[name])


@dataclass(slots=True)
class Rule:
    """One rule of the expansion; `owner` is the rule of the text that it came from, `weight` its elements."""

    owner: str
    alternatives: list[Items] = field(default_factory=list)
    weight: int = 0


@dataclass(frozen=True, slots=True)
class _Lowered:
    items: Items
    weight: int
    num_symbols: int
    """What llama.cpp multiplies repetitions with: the symbols that came up while it read this item."""


def _check_references(grammar: Grammar) -> None:
    if "root" not in grammar.rules:
        raise GrammarError("no_root", "there is no rule named 'root'")
    for alternatives in grammar.rules.values():
        pending = [node for sequence in alternatives for node in sequence]
        while pending:
            node = pending.pop()
            if isinstance(node, RuleRef) and node.name not in grammar.rules:
                raise grammar.error("undefined_rule", f"rule '{node.name}' is not defined", node.offset)
            if isinstance(node, Group):
                pending += [inner for sequence in node.alternatives for inner in sequence]
            elif isinstance(node, Repeat):
                pending.append(node.node)


def _check_products(grammar: Grammar, limits: Limits) -> None:
    """Bound how often the innermost item of nested repetitions of one rule can come."""

    def product(node: Node) -> int:
        if isinstance(node, Group):
            return max((product(inner) for sequence in node.alternatives for inner in sequence), default=1)
        if not isinstance(node, Repeat):
            return 1
        total = product(node.node) * max(node.low, node.high or 1)
        if total > limits.repetition_product:
            message = f"nested repetitions of more than {limits.repetition_product} in all"
            raise grammar.error("repetition", message, node.offset)
        return total

    for alternatives in grammar.rules.values():
        for sequence in alternatives:
            for node in sequence:
                product(node)


class Expansion:
    """The rules of a grammar numbered in the order in which llama.cpp meets their names."""

    def __init__(self, grammar: Grammar, limits: Limits) -> None:
        self._grammar, self._limits = grammar, limits
        self._numbers: dict[str, int] = {}
        self._num_elements = 0
        self._owner = ""
        self._mask_numbers: dict[int, int] = {}
        self.rules: list[Rule] = []
        self.masks: list[int] = []
        for name, alternatives in grammar.rules.items():
            self._owner = name
            self._define(self._number(name), alternatives)

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = self._new_rule(name)
        return self._numbers[name]

    def _characters(self, mask: int) -> int:
        """The item for characters the first of which is of a set."""
        if mask not in self._mask_numbers:
            self._mask_numbers[mask] = len(self.masks)
            self.masks.append(mask)
        return -1 - self._mask_numbers[mask]

    def _new_rule(self, owner: str) -> int:
        if len(self.rules) >= self._limits.num_rules:
            raise self._too_large("rules", self._limits.num_rules)
        self.rules.append(Rule(owner))
        return len(self.rules) - 1

    def _count(self, num_elements: int) -> None:
        self._num_elements += num_elements
        if self._num_elements > self._limits.num_elements:
            raise self._too_large("elements", self._limits.num_elements)

    def _too_large(self, what: str, limit: int) -> GrammarError:
        message = f"the grammar has more than {limit} {what} once its repetitions are written out"
        return self._grammar.error("too_large", message, self._grammar.offsets[self._owner])

    def _define(self, number: int, alternatives: tuple[tuple[Node, ...], ...]) -> None:
        for sequence in alternatives:
            items: Items = []
            self._count(1)
            self.rules[number].weight += 1
            for node in sequence:
                lowered = self._lower(node)
                items += lowered.items
                self.rules[number].weight += lowered.weight
            self.rules[number].alternatives.append(items)

    def _lower(self, node: Node) -> _Lowered:
        match node:
            case RuleRef(name=name):
                self._count(1)
                return _Lowered([self._number(name)], 1, 1)
            case Group(alternatives=alternatives):
                return self._lower_group(alternatives)
            case Repeat():
                return self._lower_repeat(node, self._lower(node.node))
            case Literal(text=text):
                self._count(len(text))
                return _Lowered(
                    [self._characters(mask_of(((ord(text[0]),) * 2,), negated=False))] if text else [], len(text), 1
                )
            case Chars(ranges=ranges, negated=negated):
                self._count(2 * len(ranges))
                return _Lowered([self._characters(mask_of(ranges, negated=negated))], 2 * len(ranges), 1)
            case AnyChar() | TokenRef():
                self._count(1)
                return _Lowered([self._characters(ALL_CHARACTERS)], 1, 1)

    def _lower_group(self, alternatives: tuple[tuple[Node, ...], ...]) -> _Lowered:
        before = len(self.rules)
        number = self._new_rule(self._owner)
        self._define(number, alternatives)
        self._count(1)
        return _Lowered([number], 1, len(self.rules) - before)

    def _lower_repeat(self, repeat: Repeat, lowered: _Lowered) -> _Lowered:
        """S{m,n} is m times S, then optional rules each of which holds the next; S* is one rule that holds itself."""
        num_symbols = lowered.num_symbols * (repeat.high or repeat.low or 1)
        if num_symbols > MAX_REPETITION:
            message = f"a repetition that needs {num_symbols} rules, at most {MAX_REPETITION} are allowed"
            raise self._grammar.error("repetition", message, repeat.offset)
        num_optional = 1 if repeat.high is None else repeat.high - repeat.low
        self._count(lowered.weight * max(repeat.low - 1, 0) + (lowered.weight + 3) * num_optional)
        if len(self.rules) + num_optional > self._limits.num_rules:
            raise self._too_large("rules", self._limits.num_rules)
        items = lowered.items * repeat.low
        weight = lowered.weight * repeat.low
        if not num_optional:
            return _Lowered(items, weight, num_symbols)
        last = self._optional_rules(repeat, lowered, num_optional)
        return _Lowered([*items, last], weight + 1, num_symbols)

    def _optional_rules(self, repeat: Repeat, lowered: _Lowered, num_optional: int) -> int:
        last = -1
        for index in range(num_optional):
            number = self._new_rule(self._owner)
            following = [number] if repeat.high is None else [last] * (index > 0)
            self.rules[number].alternatives = [[*lowered.items, *following], []]
            self.rules[number].weight = lowered.weight + 3
            last = number
        return last


def _reducible(rules: list[Rule], *, characters_count: bool) -> list[bool]:
    """For each rule whether it has a finite derivation or, with characters_count, one without any character.

    A worklist over the alternatives that still wait for a rule: linear in the size of the grammar.
    """
    done = [False] * len(rules)
    waiting: list[list[tuple[int, list[int]]]] = [[] for _ in rules]
    ready: deque[int] = deque()
    for number, rule in enumerate(rules):
        for items in rule.alternatives:
            needed = [item for item in items if item >= 0]
            if characters_count and len(needed) < len(items):
                continue
            counter = [len(needed)]
            for item in needed:
                waiting[item].append((number, counter))
            if not needed:
                ready.append(number)
    while ready:
        number = ready.popleft()
        if done[number]:
            continue
        done[number] = True
        for owner, counter in waiting[number]:
            counter[0] -= 1
            if counter[0] == 0:
                ready.append(owner)
    return done


@dataclass(slots=True)
class _Start:
    """What happens before a rule's first character: the rules that may come first, and the places it can open."""

    rules: list[int]
    num_places: int


def _start(rule: Rule, empty: list[bool]) -> _Start:
    start = _Start([], 0)
    for items in rule.alternatives:
        for item in items:
            if item < 0:
                start.num_places += 1
                break
            start.rules.append(item)
            if not empty[item]:
                break
        else:
            start.num_places += 1
    return start


def _check_starts(grammar: Grammar, rules: list[Rule], empty: list[bool], limits: Limits) -> list[int]:
    """Refuse left recursion, and starts that branch or nest so much that llama.cpp's own check would not end.

    Depth first over "may come first in", children before parents; visits[n] is what llama.cpp's check costs from n.
    Returns the rules in that order.
    """
    starts = [_start(rule, empty) for rule in rules]
    depths, visits, places = [0] * len(rules), [0] * len(rules), [0] * len(rules)
    total_visits = 0
    order = _children_first(grammar, rules, starts)
    for number in order:
        start, rule = starts[number], rules[number]
        depths[number] = 1 + max((depths[first] for first in start.rules), default=0)
        visits[number] = rule.weight + sum(visits[first] for first in start.rules)
        places[number] = start.num_places + sum(places[first] for first in start.rules)
        total_visits += visits[number]
        if (
            depths[number] > limits.start_depth
            or total_visits > limits.start_visits
            or places[number] > limits.num_alternatives
        ):
            message = f"rule '{rule.owner}' can start in too many ways"
            raise grammar.error("too_ambiguous", message, grammar.offsets[rule.owner])
    return order


def _children_first(grammar: Grammar, rules: list[Rule], starts: list[_Start]) -> list[int]:
    """All rules, each after those that may come first in it; raises GrammarError on a cycle."""
    order: list[int] = []
    state = [0] * len(rules)  # 0 unseen, 1 on the path, 2 done
    for root in range(len(rules)):
        if state[root]:
            continue
        state[root] = 1
        path = [(root, iter(starts[root].rules))]
        while path:
            number, following = path[-1]
            first = next(following, None)
            if first is None:
                state[number] = 2
                order.append(number)
                path.pop()
            elif state[first] == 1:
                name = rules[first].owner
                raise grammar.error("left_recursion", f"rule '{name}' can start with itself", grammar.offsets[name])
            elif state[first] == 0:
                state[first] = 1
                path.append((first, iter(starts[first].rules)))
    return order
