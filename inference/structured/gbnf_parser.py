"""From the text of a GBNF grammar to its tree, as llama.cpp's parser of 2026 reads it (src/llama-grammar.cpp).

Bounded in bytes and depth, linear in time. References are not looked up here. Called by `gbnf.validate`.
"""

from __future__ import annotations

import re
from typing import NoReturn

from inference.structured.gbnf_tree import (
    MAX_REPETITION,
    REQUEST_LIMITS,
    Alternatives,
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
    error_at,
)

MAX_CODE_POINT = 0x10FFFF
MAX_STACKED_QUANTIFIERS = 3

_NAME = re.compile(r"[A-Za-z0-9-]+")
_DIGITS = re.compile(r"[0-9]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_BLANK_OR_NEWLINE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_TOKEN_ID = re.compile(r"<\[([0-9]{1,9})\]>")
_TOKEN_TEXT = re.compile(r"<[^<>\r\n]{1,128}>")
_PLAIN_LITERAL = re.compile(r'[^"\\]+')
_HEX = {"x": re.compile(r"[0-9A-Fa-f]{2}"), "u": re.compile(r"[0-9A-Fa-f]{4}"), "U": re.compile(r"[0-9A-Fa-f]{8}")}
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}


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
        # Surrogates have no UTF-8 of their own; they are refused as ends of a class too, to have one rule.
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
