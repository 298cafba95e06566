"""Which grammar a forced answer gets: the widest whose answers end within the tokens that there are. Pure.

A token has at least a byte of text, so a grammar whose longest text has no more bytes than there are tokens cannot be
cut. Its widths are few (rungs), so that what is known of a grammar serves many requests. Called at the door.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from inference.structured.gbnf_tree import MAX_REPETITION
from inference.structured.json_schema import Bounds, Compiled, finish, narrower, schema_piece
from inference.structured.pieces import EMPTY, NEWLINE, Piece, Rules, choice, literal, one_of, repeat, sequence
from inference.structured.schema_forms import SchemaError
from inference.structured.string_forms import WIDE, at_most, block_of
from inference.structured.tool_calls import MAX_CALLS, calls_piece

SHORT_STRING = 16
"""Shorter strings say little: before they are cut below it, two bytes a token are counted, which models seldom miss."""
BLOCK_BYTES = 128
MAX_NEWLINES = 2


@dataclass(frozen=True, slots=True)
class JsonForm:
    """schema: as JSON, its keys in their order, which the answer's follow."""

    schema: bytes


@dataclass(frozen=True, slots=True)
class CallsForm:
    """tools: as JSON; tool: the only one that may be called. The others are those of calls_piece."""

    tools: bytes
    tool: str | None
    parallel: bool
    format: str


@dataclass(frozen=True, slots=True)
class EitherForm:
    """Calls, or an answer in a schema: the model's choice. A tool whose schema cannot be kept has any object for its
    arguments, as nothing is promised of calls that nobody forced."""

    calls: CallsForm
    answer: JsonForm


Form = JsonForm | CallsForm | EitherForm


class _Rung(NamedTuple):
    bounds: Bounds
    num_calls: int = 1


def widest(form: Form) -> Compiled:
    """Without regard to length. Raises SchemaError, as the other rungs would."""
    return _grammars(form).widest()


def fit(form: Form, num_tokens: int) -> Compiled:
    """The widest whose longest text has no more bytes than tokens are left; of those of short strings, no more than
    twice as many; else the narrowest. The last two may be cut. Fewer calls come before narrower bounds. Calls and an
    answer beside them are fitted each for itself: long calls shorten no answer. Raises SchemaError."""
    return _grammars(form).fit(num_tokens)


@lru_cache(maxsize=64)
def _grammars(form: Form) -> _Grammars:
    return _Grammars(form)


class _Grammars:
    """Those of one form, each made when it is first asked for. Any thread: what two make at once is the same."""

    def __init__(self, form: Form) -> None:
        if isinstance(form, EitherForm):
            self._ladders = [_Ladder(form.calls, is_lenient=True), _Ladder(form.answer)]
        else:
            self._ladders = [_Ladder(form)]
        self._compiled: dict[tuple[_Rung, ...], Compiled] = {}

    def widest(self) -> Compiled:
        return self._compile(tuple(each.rungs[0] for each in self._ladders))

    def fit(self, num_tokens: int) -> Compiled:
        return self._compile(tuple(each.find(num_tokens) for each in self._ladders))

    def _compile(self, rungs: tuple[_Rung, ...]) -> Compiled:
        if rungs not in self._compiled:
            rules = Rules()
            pieces = [each.piece(rules, rung) for each, rung in zip(self._ladders, rungs, strict=True)]
            self._compiled[rungs] = finish(rules, choice(pieces))
        return self._compiled[rungs]


class _Ladder:
    """The rungs of calls, or of an answer, the widest first. is_lenient: as calls_piece."""

    def __init__(self, form: CallsForm | JsonForm, *, is_lenient: bool = False) -> None:
        self._form, self._is_lenient = form, is_lenient
        self.rungs = _rungs(isinstance(form, CallsForm) and form.parallel)
        self._lengths: dict[_Rung, int | None] = {}

    def find(self, num_tokens: int) -> _Rung:
        for rung in self.rungs:
            longest = self._num_bytes(rung)
            if longest is not None and longest <= num_tokens and rung.bounds.max_string >= SHORT_STRING:
                return rung
        narrowest = self.rungs[0]
        for rung in self.rungs:
            longest = self._num_bytes(rung)
            narrowest = narrowest if longest is None else rung
            if longest is not None and longest <= 2 * num_tokens and rung.bounds.max_string <= SHORT_STRING:
                break
        return narrowest

    def _num_bytes(self, rung: _Rung) -> int | None:
        """Of the longest text; far cheaper than its grammar, which has to be checked. None: no text is so short, as
        where a pattern's are longer."""
        if rung not in self._lengths:
            try:
                self._lengths[rung] = self.piece(Rules(), rung).num_bytes
            except SchemaError:
                self._lengths[rung] = None
        return self._lengths[rung]

    def piece(self, rules: Rules, rung: _Rung) -> Piece:
        """Raises SchemaError."""
        match self._form:
            case JsonForm(schema=schema):
                return schema_piece(rules, json.loads(schema), rung.bounds)
            case CallsForm(tools=tools, tool=tool, format=format):
                return calls_piece(
                    rules,
                    json.loads(tools),
                    tool,
                    format,
                    bounds=rung.bounds,
                    num_calls=rung.num_calls,
                    is_lenient=self._is_lenient,
                )


@lru_cache(maxsize=2)
def _rungs(has_several: bool) -> tuple[_Rung, ...]:
    singles = tuple(_Rung(bounds) for bounds in _narrowing(Bounds()))
    counts = (MAX_CALLS, MAX_CALLS // 2, 2) if has_several else ()
    return (*(_Rung(single.bounds, count) for single in singles[:2] for count in counts), *singles)


def _narrowing(bounds: Bounds) -> Iterator[Bounds]:
    yield bounds
    while (following := narrower(bounds)) != bounds:
        yield following
        bounds = following


# Thoughts before the answer

_ANSWER = Piece("Answer", 0, 0, "")
"""No rule that is made here has a capital letter."""


def behind_thoughts(grammar: str, end: str, num_bytes: int) -> str:
    """The same answers behind thoughts of at most so many bytes, and the tag that ends them.

    end: the tag. Its first two characters, different ones of ASCII, do not stand side by side in the thoughts, so that
    the first tag is the end.
    """
    return _thoughts(end, num_bytes) + grammar.replace("root ::=", f"{_ANSWER.text} ::=", 1)


def thought_overhead(end: str) -> int:
    """Bytes beside thoughts and answer: the tag, and line breaks."""
    return len(end.encode()) + MAX_NEWLINES


@lru_cache(maxsize=64)
def _thoughts(end: str, num_bytes: int) -> str:
    """Blocks of many bytes, and less than one: as rules they cost far less than the text has bytes."""
    rules = Rules("t-")
    one, beginning = _ascii_without(end[0]), sequence(literal(end[0]), _ascii_without(end[:2]))
    widths = {1: one, 2: choice([one_of(r"\u0080-\u07FF"), beginning]), **WIDE}
    num_blocks = min(max(num_bytes + 1 - BLOCK_BYTES, 0) // BLOCK_BYTES, MAX_REPETITION)
    blocks = repeat(rules.name("block", block_of(rules, widths, BLOCK_BYTES)), 0, num_blocks) if num_blocks else EMPTY
    rest = at_most(rules, widths, min(num_bytes, BLOCK_BYTES - 1))
    breaks = repeat(NEWLINE, 0, MAX_NEWLINES)
    return rules.grammar(sequence(blocks, rest, literal(end), breaks, _ANSWER))


def _ascii_without(chars: str) -> Piece:
    """A printable one, or a blank."""
    ranges, low = [r"\n\t"], 0x20
    for code_point in (*sorted(map(ord, chars)), 0x7F):
        if low < code_point:
            ranges.append(f"\\U{low:08X}-\\U{code_point - 1:08X}")
        low = code_point + 1
    return one_of("".join(ranges))
