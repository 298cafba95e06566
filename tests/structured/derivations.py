"""Two readers of a GBNF tree for tests: one makes random texts of a grammar, one decides whether a text belongs to it.

Both follow the notation's definition and share nothing with the code that makes grammars but the parser's tree, which
tests against llama.cpp itself check on their own.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from inference.structured.gbnf_parser import parse
from inference.structured.gbnf_tree import (
    GENERATED_LIMITS,
    Alternatives,
    AnyChar,
    Chars,
    Group,
    Literal,
    Node,
    Repeat,
    RuleRef,
)

MAX_EXTRA = 5


class Sampler:
    """Random derivations. Repetitions mostly stay near their lower bound, now and then they reach the upper one."""

    def __init__(self, grammar: str, seed: int) -> None:
        self._rules = parse(grammar, GENERATED_LIMITS).rules
        self._random = random.Random(seed)

    def text(self) -> str:
        return self._alternatives(self._rules["root"])

    def _alternatives(self, alternatives: Alternatives) -> str:
        return "".join(self._node(node) for node in self._random.choice(alternatives))

    def _node(self, node: Node) -> str:
        match node:
            case Literal(text=text):
                return text
            case Chars():
                return self._char(node)
            case AnyChar():
                return chr(self._random.randint(1, 0xD7FF))
            case RuleRef(name=name):
                return self._alternatives(self._rules[name])
            case Group(alternatives=alternatives):
                return self._alternatives(alternatives)
            case Repeat():
                return "".join(self._node(node.node) for _ in range(self._count(node)))
        raise AssertionError(f"no text for {node}")

    def _char(self, node: Chars) -> str:
        if not node.negated:
            low, high = self._random.choice(node.ranges)
            return chr(self._random.choice([low, high, self._random.randint(low, high)]))
        while True:
            char = chr(self._random.randint(1, 0x2FFF))
            if char in node:
                return char

    def _count(self, node: Repeat) -> int:
        high = node.low + MAX_EXTRA if node.high is None else node.high
        if self._random.random() < 0.05 and high <= 40:
            return high
        return self._random.randint(node.low, min(high, node.low + MAX_EXTRA))


class Matcher:
    """Decides by sets of positions where a node may end. For grammars without left recursion."""

    def __init__(self, grammar: str) -> None:
        self._rules = parse(grammar, GENERATED_LIMITS).rules

    def matches(self, text: str) -> bool:
        @functools.cache
        def rule(name: str, start: int) -> frozenset[int]:
            return alternatives(self._rules[name], start)

        def alternatives(options: Alternatives, start: int) -> frozenset[int]:
            ends: set[int] = set()
            for option in options:
                at = {start}
                for node in option:
                    at = {end for position in at for end in ends_of(node, position)}
                ends |= at
            return frozenset(ends)

        def ends_of(node: Node, start: int) -> Iterator[int]:
            match node:
                case Literal(text=word):
                    if text.startswith(word, start):
                        yield start + len(word)
                case Chars() | AnyChar():
                    if start < len(text) and (isinstance(node, AnyChar) or text[start] in node):
                        yield start + 1
                case RuleRef(name=name):
                    yield from rule(name, start)
                case Group(alternatives=options):
                    yield from alternatives(options, start)
                case Repeat():
                    yield from repeated(node, start)

        def repeated(node: Repeat, start: int) -> set[int]:
            at, found = {start}, {start} if node.low == 0 else set()
            count = 0
            while at and (node.high is None or count < node.high):
                count += 1
                at = {end for position in at for end in ends_of(node.node, position)}
                if count >= node.low:
                    if at <= found:
                        break
                    found |= at
            return found

        return len(text) in rule("root", 0)
