"""GBNF, llama.cpp's grammar notation: a bounded parser, and the one check a grammar passes before llama.cpp sees it.

`validate` refuses what llama.cpp refuses and what kills or hangs it; the syntax is that of its grammar parser of 2026
(src/llama-grammar.cpp, grammars/README.md). Nothing here knows a vocabulary, so `<think>` is checked for form only.
Called at the door for a request's grammar, and on every grammar that this package makes itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

MAX_REPETITION = 1_999
"""llama.cpp refuses 2,000 and more, and reads a larger upper bound as none at all."""
MAX_CODE_POINT = 0x10FFFF
MAX_STACKED_QUANTIFIERS = 3
MAX_TOKEN_TEXT = 128

_NAME = re.compile(r"[A-Za-z0-9-]+")
_DIGITS = re.compile(r"[0-9]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_OR_NEWLINE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TOKEN_ID = re.compile(r"<\[([0-9]{1,9})\]>")
_TOKEN_TEXT = re.compile(r"<[^<>\r\n]{1,%d}>" % MAX_TOKEN_TEXT)
_PLAIN_LITERAL = re.compile(r'[^"\\]+')
_HEX = {"x": re.compile(r"[0-9A-Fa-f]{2}"), "u": re.compile(r"[0-9A-Fa-f]{4}"), "U": re.compile(r"[0-9A-Fa-f]{8}")}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}


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


REQUEST_LIMITS = Limits()
GENERATED_LIMITS = Limits(num_bytes=262_144, num_rules=20_000, num_elements=100_000, start_visits=20_000_000)


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


def validate(grammar: str, limits: Limits = REQUEST_LIMITS) -> None:
    """Refuse a grammar that llama.cpp would refuse, or that could kill or stall the process that runs it.

    Raises GrammarError: too_large, too_deep, syntax, duplicate_rule, undefined_rule, no_root, repetition,
    left_recursion, never_ends, too_ambiguous. Takes time linear in the limits, some ten milliseconds at most.
    """
    # The expansion imports the tree from here.
    from inference.structured.gbnf_expansion import check

    check(parse(grammar, limits), limits)


def parse(grammar: str, limits: Limits = REQUEST_LIMITS) -> Grammar:
    """Read a grammar into its tree; raises GrammarError. References are not looked up here."""
    try:
        num_bytes = len(grammar.encode())
    except UnicodeEncodeError as error:
        raise error_at(grammar, "syntax", "not valid Unicode text", error.start) from None
    if num_bytes > limits.num_bytes:
        raise GrammarError("too_large", f"the grammar has {num_bytes} bytes, at most {limits.num_bytes} are allowed")
    if (nul := grammar.find("\0")) >= 0:
        raise error_at(grammar, "syntax", "a NUL character", nul)
    return _Parser(grammar, limits).grammar()


class _Parser:
    """Recursive descent with one position; groups are the only recursion, bounded by limits.depth."""

    def __init__(self, text: str, limits: Limits) -> None:
        self._text, self._limits, self._at = text, limits, 0

    def grammar(self) -> Grammar:
        rules: dict[str, Alternatives] = {}
        offsets: dict[str, int] = {}
        self._blank(newlines=True)
        while self._at < len(self._text):
            offset = self._at
            name = self._name()
            if name in rules:
                raise self._error("duplicate_rule", f"rule '{name}' is defined twice", offset)
            offsets[name] = offset
            rules[name] = self._definition()
        return Grammar(rules, offsets, self._text)

    def _definition(self) -> Alternatives:
        self._blank()
        if not self._take("::="):
            self._expected("'::='")
        self._blank(newlines=True)
        alternatives = self._alternatives(depth=0)
        if self._at < len(self._text) and self._peek() not in "\r\n":
            self._expected("a newline or the end of the grammar")
        self._blank(newlines=True)
        return alternatives

    def _alternatives(self, depth: int) -> Alternatives:
        alternatives = [self._sequence(depth)]
        while self._take("|"):
            self._blank(newlines=True)
            alternatives.append(self._sequence(depth))
        return tuple(alternatives)

    def _sequence(self, depth: int) -> tuple[Node, ...]:
        nodes: list[Node] = []
        num_quantifiers = 0
        while char := self._peek():
            if char in "*+?{":
                num_quantifiers += 1
                nodes.append(self._repeat(nodes, num_quantifiers))
            elif (node := self._item(char, depth)) is not None:
                nodes.append(node)
                num_quantifiers = 0
            else:
                break
            self._blank(newlines=depth > 0)
        return tuple(nodes)

    def _item(self, char: str, depth: int) -> Node | None:
        """The item that starts here, None where the sequence ends."""
        if char == '"':
            return self._literal()
        if char == "[":
            return self._chars()
        if char == "(":
            return self._group(depth + 1)
        if char in "<!":
            return self._token()
        if char == ".":
            self._at += 1
            return AnyChar()
        if _NAME.match(char):
            offset = self._at
            return RuleRef(self._name(), offset)
        return None

    def _group(self, depth: int) -> Group:
        if depth > self._limits.depth:
            raise self._error("too_deep", f"groups are nested more than {self._limits.depth} deep")
        self._at += 1
        self._blank(newlines=True)
        alternatives = self._alternatives(depth)
        if not self._take(")"):
            self._expected("')'")
        return Group(alternatives)

    def _literal(self) -> Literal:
        self._at += 1
        parts: list[str] = []
        while not self._take('"'):
            if plain := _PLAIN_LITERAL.match(self._text, self._at):
                parts.append(plain[0])
                self._at = plain.end()
            else:
                parts.append(chr(self._char()))
        return Literal("".join(parts))

    def _chars(self) -> Chars:
        start = self._at
        self._at += 1
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        while not self._take("]"):
            low = high = self._char()
            if self._peek() == "-" and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._char()
            if high < low:
                raise self._error("syntax", "a range of characters runs backwards", start)
            ranges.append((low, high))
        if not ranges:
            raise self._error("syntax", "an empty class of characters", start)
        return Chars(tuple(ranges), negated)

    def _char(self) -> int:
        """One character of a literal or a class, escaped or not, as its code point."""
        char = self._peek()
        if not char:
            raise self._error("syntax", "unexpected end of the grammar")
        self._at += 1
        return self._escape() if char == "\\" else ord(char)

    def _escape(self) -> int:
        kind = self._peek()
        if kind in _ESCAPES:
            self._at += 1
            return ord(_ESCAPES[kind])
        digits = _HEX[kind].match(self._text, self._at + 1) if kind in _HEX else None
        if digits is None:
            raise self._error("syntax", "an unknown escape", self._at - 1)
        code_point = int(digits[0], 16)
        # A literal of surrogates could never be written as UTF-8; as ends of a class they are still refused, for one rule.
        if code_point > MAX_CODE_POINT or 0xD800 <= code_point <= 0xDFFF or code_point == 0:
            raise self._error("syntax", "an escape for no character", self._at - 1)
        self._at = digits.end()
        return code_point

    def _token(self) -> TokenRef:
        negated = self._take("!")
        found = _TOKEN_ID.match(self._text, self._at)
        if found is None and not self._text.startswith("<[", self._at):
            found = _TOKEN_TEXT.match(self._text, self._at)
        if found is None:
            self._expected("a token such as <think> or <[123]>")
        self._at = found.end()
        return TokenRef(found[0], negated)

    def _repeat(self, nodes: list[Node], num_quantifiers: int) -> Repeat:
        offset = self._at
        low, high = self._bounds()
        if not nodes or nodes[-1] == Literal(""):
            raise self._error("syntax", "nothing to repeat here", offset)
        if num_quantifiers > MAX_STACKED_QUANTIFIERS:
            raise self._error("too_deep", "too many repetitions of one item", offset)
        if low > MAX_REPETITION or (high or 0) > MAX_REPETITION:
            raise self._error("repetition", f"more than {MAX_REPETITION} repetitions", offset)
        if high is not None and high < low:
            raise self._error("repetition", "the upper bound of a repetition is below the lower", offset)
        if high == 0:
            raise self._error("repetition", "a repetition of zero times", offset)
        return Repeat(nodes.pop(), low, high, offset)

    def _bounds(self) -> tuple[int, int | None]:
        char = self._peek()
        self._at += 1
        if char != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        self._blank()
        low = self._integer()
        high: int | None = low
        if self._take(","):
            self._blank()
            high = None if self._peek() == "}" else self._integer()
        if not self._take("}"):
            self._expected("'}'")
        return low, high

    def _integer(self) -> int:
        digits = _DIGITS.match(self._text, self._at)
        if digits is None:
            self._expected("an integer")
        if len(digits[0]) > 9:
            raise self._error("repetition", f"more than {MAX_REPETITION} repetitions")
        self._at = digits.end()
        self._blank()
        return int(digits[0])

    def _name(self) -> str:
        name = _NAME.match(self._text, self._at)
        if name is None:
            self._expected("the name of a rule")
        self._at = name.end()
        return name[0]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _blank(self, *, newlines: bool = False) -> None:
        blank = (_BLANK_OR_NEWLINE if newlines else _BLANK).match(self._text, self._at)
        self._at = blank.end() if blank else self._at

    def _expected(self, what: str) -> NoReturn:
        found = repr(self._peek()) if self._peek() else "the end"
        raise self._error("syntax", f"expected {what}, found {found}")

    def _error(self, code: str, message: str, offset: int | None = None) -> GrammarError:
        return error_at(self._text, code, message, self._at if offset is None else offset)
