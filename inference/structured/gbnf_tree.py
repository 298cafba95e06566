"""What a GBNF grammar is: its tree, its errors, and the limits that it is held to.

Plain data, no parsing and no checks. Used by the parser, the expansion and whoever wants to walk a grammar.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_REPETITION = 1_999
"""llama.cpp refuses 2,000 and more, and reads a larger upper bound as none at all."""


class GrammarError(ValueError):
    """A grammar that is refused. `code` is for programs; line and column (from 1) are 0 where no place is to blame."""

    def __init__(self, code: str, message: str, *, line: int = 0, column: int = 0) -> None:
        place = f"line {line}, column {column}: " if line else ""
        super().__init__(f"{place}{message}")
        self.code, self.line, self.column = code, line, column


@dataclass(frozen=True, slots=True)
class Limits:
    """What a grammar may cost. Elements and rules are counted as llama.cpp stores them, repetitions written out."""

    num_bytes: int = 16_384
    depth: int = 32
    repetition_product: int = 100_000
    num_rules: int = 10_000
    num_elements: int = 50_000
    num_alternatives: int = 1_000
    """Places that may be open at once when one rule starts: llama.cpp visits each of them for every character."""
    start_depth: int = 2_500
    """Rules that may be entered before the first character: llama.cpp's search for left recursion is recursive."""
    start_visits: int = 5_000_000
    """Elements which that search visits; it remembers nothing, so a few lines can ask for 2^40 of them."""

    num_places: int | None = 20_000
    """Places that may be open at once anywhere in a text, by an estimate from above; None does not estimate."""


REQUEST_LIMITS = Limits()
GENERATED_LIMITS = Limits(
    num_bytes=262_144, num_rules=20_000, num_elements=100_000, start_visits=20_000_000, num_places=None
)


# The tree. A sequence is a tuple of nodes, alternatives are a tuple of sequences.


@dataclass(frozen=True, slots=True)
class Literal:
    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of (or, negated, outside) the ranges, both ends included."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False

    def __contains__(self, char: str) -> bool:
        return any(low <= ord(char) <= high for low, high in self.ranges) is not self.negated


@dataclass(frozen=True, slots=True)
class AnyChar:
    pass


@dataclass(frozen=True, slots=True)
class TokenRef:
    """One token of the vocabulary by its text or its id, or, negated, any other."""

    text: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class RuleRef:
    name: str
    offset: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Group:
    alternatives: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """From `low` to `high` times, None for no upper bound."""

    node: Node
    low: int
    high: int | None
    offset: int = field(default=0, compare=False)


Node = Literal | Chars | AnyChar | TokenRef | RuleRef | Group | Repeat
Alternatives = tuple[tuple[Node, ...], ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """The rules by name, in the order of the text, and where each of them starts in it."""

    rules: dict[str, Alternatives]
    offsets: dict[str, int]
    text: str

    def error(self, code: str, message: str, offset: int) -> GrammarError:
        return error_at(self.text, code, message, offset)


def error_at(text: str, code: str, message: str, offset: int) -> GrammarError:
    line = text.count("\n", 0, offset) + 1
    column = offset - (text.rfind("\n", 0, offset) + 1) + 1
    return GrammarError(code, message, line=line, column=column)
