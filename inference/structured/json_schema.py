"""JSON Schema to GBNF: every text that the grammar accepts is JSON, and valid for the schema, by construction.

The grammar accepts fewer texts than the schema allows values, never more: properties come in declared order, only
declared ones beside declared ones, one space at most after a colon or a comma, and everything has an end, so the
longest answer is known. Where a keyword cannot be kept that way, the schema is refused. Pure, called at the door.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from typing import Any

from inference.structured import string_forms
from inference.structured.gbnf import GENERATED_LIMITS, GrammarError, validate
from inference.structured.gbnf_tree import MAX_REPETITION
from inference.structured.number_forms import Interval, integers, numbers
from inference.structured.patterns import PatternError, pattern_piece
from inference.structured.pieces import EMPTY, Piece, Rules, any_literal, choice, literal, optional, repeat, sequence
from inference.structured.schema_forms import (
    Forms,
    Schema,
    SchemaError,
    at,
    interval_of,
    item_schema,
    json_key,
    made_types,
    property_schema,
)

__all__ = ["Bounds", "Compiled", "SchemaError", "finish", "narrower", "schema_piece"]

MAX_SCHEMA_BYTES = 16_384
MAX_SCHEMA_DEPTH = 32
MAX_MULTIPLES = 1_000
MAX_UNIQUE_ITEMS = 24
MAX_BOUND = Decimal(10) ** 20
"""Bounds of numbers beyond it are none for us: numbers without a bound have max_digits digits anyway."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds for what a schema leaves open; a schema's own maxLength and maxItems count before them.

    Raises ValueError when one is out of range.
    """

    max_string: int = 256
    """Characters of a string."""
    max_items: int = 16
    """Items of an array."""
    max_entries: int = 8
    """Properties of an object that declares none."""
    max_key: int = 32
    """Characters of such a property's name."""
    max_digits: int = 15
    """Digits before the decimal point."""
    max_decimals: int = 6
    """Digits after it."""
    max_recursion: int = 4
    """How often a reference may lead back to where it stands."""
    max_depth: int = 3
    """Nesting of a value of which nothing is said."""
    strict: bool = False
    """Whether the bounds also cut what the schema allows beyond them, as far as it does not demand it, and count the
    bytes of strings."""

    def cap(self, own: int | None, bound: int, low: int) -> int:
        """The highest count: the schema's own if it has one, unless the bounds are strict; never below low."""
        bound = max(bound, low)
        return bound if own is None else min(own, bound) if self.strict else own

    def __post_init__(self) -> None:
        highest = {"max_digits": 18, "max_decimals": 12, "max_recursion": 16, "max_depth": 8}
        for option in fields(self)[:-1]:
            value, high = getattr(self, option.name), highest.get(option.name, MAX_REPETITION)
            if not 1 <= value <= high:
                raise ValueError(f"{option.name} must be between 1 and {high}")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar that llama.cpp takes, and the length of the longest text it accepts, in characters and in bytes of
    UTF-8. shortest: a shortest text of it; None where it is very long."""

    grammar: str
    max_length: int
    num_bytes: int
    shortest: str | None


def narrower(bounds: Bounds) -> Bounds:
    """Half of them, the schema's own included; the same where nothing is left to halve. The first step only counts
    the bytes of strings instead of their characters."""
    if not bounds.strict:
        return replace(bounds, strict=True)
    return replace(bounds, **{name: max(1, getattr(bounds, name) // 2) for name in _NARROWED})


_NARROWED = ("max_string", "max_items", "max_entries", "max_key", "max_recursion", "max_depth")


def finish(rules: Rules, root: Piece) -> Compiled:
    """The grammar of a piece; raises SchemaError too_complex if llama.cpp should not be given it."""
    grammar = rules.grammar(root)
    try:
        validate(grammar, GENERATED_LIMITS)
    except GrammarError as error:
        raise SchemaError("too_complex", "", f"the grammar of the schema is too large ({error})") from error
    return Compiled(grammar, root.longest, root.num_bytes, root.shortest)


def schema_piece(rules: Rules, schema: Schema, bounds: Bounds) -> Piece:
    """A schema's texts as a piece of a larger grammar; raises SchemaError."""
    check_document(schema)
    piece = _Compiler(rules, schema, bounds).compile(schema, "", bounds.max_recursion)
    if piece is None:
        raise SchemaError("unsatisfiable", "", "no value within the bounds is valid for the schema")
    return piece


def check_document(schema: Any) -> None:
    """Refuse what is no JSON object, too deep or too large, before anything walks through it."""
    if not isinstance(schema, dict):
        raise SchemaError("invalid", "", "a schema must be an object")
    pending: list[tuple[Any, int]] = [(schema, 1)]
    budget = MAX_SCHEMA_BYTES
    while pending:
        value, depth = pending.pop()
        budget -= 1
        if depth > MAX_SCHEMA_DEPTH or budget < 0:
            raise SchemaError("too_large", "", f"the schema is larger than {MAX_SCHEMA_BYTES} bytes or too deep")
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise SchemaError("invalid", "", "a name that is no text")
            pending += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            pending += [(inner, depth + 1) for inner in value]
    _check_size(schema)


def _check_size(schema: Schema) -> None:
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:
        raise SchemaError("invalid", "", "the schema holds what JSON cannot") from error
    if size > MAX_SCHEMA_BYTES:
        raise SchemaError("too_large", "", f"the schema has {size} bytes, at most {MAX_SCHEMA_BYTES} are allowed")


class _Compiler:
    """Turns the schemas of one document into pieces. None instead of a piece means that no value is valid."""

    def __init__(self, rules: Rules, root: Schema, bounds: Bounds) -> None:
        self._rules, self._bounds = rules, bounds
        self._forms = Forms(root)
        self._space = rules.name("space", optional(literal(" ")))
        self._comma = rules.name("comma", sequence(literal(","), self._space))
        self._known: dict[tuple[int, int], tuple[Any, Piece | None]] = {}
        self._makers: dict[str, Callable[[Schema, str, int], Piece | None]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda flat, pointer, fuel: choice([literal("true"), literal("false")]),
            "null": lambda flat, pointer, fuel: literal("null"),
        }

    def compile(self, schema: Any, pointer: str, fuel: int) -> Piece | None:
        """The texts of a schema. Known schemas are compiled once for each amount of fuel, so recursion stays small."""
        key = (id(schema), fuel)
        if not isinstance(schema, dict):
            return self._compile(schema, pointer, fuel)
        if key not in self._known:
            # The schema is kept beside the piece: a merged one must not be freed while its id is in use.
            self._known[key] = schema, self._compile(schema, pointer, fuel)
        return self._known[key][1]

    def _compile(self, schema: Any, pointer: str, fuel: int) -> Piece | None:
        variants = self._forms.variants(schema, pointer, fuel)
        pieces = [self._flat(flat, pointer, left) for flat, left in variants]
        found = [piece for piece in pieces if piece is not None]
        return self._name(pointer, choice(found)) if found else None

    def _name(self, pointer: str, piece: Piece) -> Piece:
        """The piece as a rule named after the last step of its place that is not a number."""
        steps = [step for step in pointer.split("/") if step and not step.isdigit()]
        return self._rules.name(steps[-1] if steps else "value", piece)

    def _flat(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        if "enum" in flat:
            return self._enum(flat, pointer, fuel)
        if not flat:
            return self._any_value(self._bounds.max_depth)
        types = made_types(flat)
        wanted = [name for name in self._makers if name in types and not (name == "integer" and "number" in types)]
        found = [piece for name in wanted if (piece := self._makers[name](flat, pointer, fuel)) is not None]
        return choice(found) if found else None

    def _any_value(self, depth: int) -> Piece:
        scalars = [self._makers[name]({}, "", 0) for name in ("string", "number", "boolean", "null")]
        pieces = [piece for piece in scalars if piece is not None]
        if depth > 0:
            inner = self._any_value(depth - 1)
            pieces += [self._map(inner, 0, self._bounds.max_entries), self._list(inner, 0, self._bounds.max_items)]
        return self._rules.name("any", choice(pieces))

    # Enumerations

    def _enum(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        values = {json_key(value): value for value in self._valid_values(flat, pointer, fuel)}
        if not values:
            return None
        scalars = [value for value in values.values() if not isinstance(value, list | dict)]
        pieces = [self._constant(value) for value in values.values() if isinstance(value, list | dict)]
        if scalars:
            pieces.append(any_literal(self._rules, [_json(value) for value in scalars]))
        return choice(pieces)

    def _valid_values(self, flat: Schema, pointer: str, fuel: int) -> list[Any]:
        return [value for value in flat["enum"] if self._forms.accepts_flat(flat, value, pointer, fuel)]

    def _constant(self, value: Any) -> Piece:
        """Exactly this value, with the usual freedom of a space after colons and commas."""
        if isinstance(value, list):
            return self._bracketed("[", [self._constant(item) for item in value], "]")
        if isinstance(value, dict):
            return self._bracketed("{", [self._entry(key, self._constant(item)) for key, item in value.items()], "}")
        return literal(_json(value))

    def _bracketed(self, start: str, pieces: list[Piece], end: str) -> Piece:
        parts = [part for piece in pieces for part in (self._comma, piece)][1:]
        return sequence(literal(start), *parts, literal(end))

    # Objects

    def _object(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        names = list(dict.fromkeys([*flat.get("properties", {}), *flat.get("required", [])]))
        additional = flat.get("additionalProperties", "properties" not in flat)
        if not names and additional is not False:
            return self._open_object(flat, additional, pointer, fuel)
        required = set(flat.get("required", []))
        entries: list[tuple[Piece, bool]] = []
        for name in names:
            value = self.compile(property_schema(flat, name), at(pointer, "properties", name), fuel)
            if value is not None:
                entries.append((self._rules.name(name, self._entry(name, value)), name in required))
            elif name in required:
                return None
        return self._declared_object(flat, entries, pointer)

    def _entry(self, name: str, value: Piece) -> Piece:
        return sequence(literal(_json(name) + ":"), self._space, value)

    def _declared_object(self, flat: Schema, entries: list[tuple[Piece, bool]], pointer: str) -> Piece | None:
        """Any subset of the entries with all required ones, in order; as few more as the counts ask for."""
        num_required = sum(needed for _, needed in entries)
        low, high = int(flat.get("minProperties", 0)), int(flat.get("maxProperties", len(entries)))
        if num_required > high:
            return None
        room = high - num_required
        kept: list[tuple[Piece, bool]] = []
        for entry, needed in entries:
            room -= not needed
            if needed or room >= 0:
                kept.append((entry, needed))
        if low > max(num_required, 1):
            message = "minProperties above 1 and above the number of required properties"
            raise SchemaError("unsupported", at(pointer, "minProperties"), message)
        return self._subset(kept, allow_empty=low == 0)

    def _subset(self, entries: list[tuple[Piece, bool]], *, allow_empty: bool) -> Piece | None:
        """First entries: what can come first, each followed by any of the later ones."""
        rest = EMPTY
        starts: list[Piece] = []
        for entry, needed in reversed(entries):
            start = sequence(entry, rest)
            following = self._rules.name("more", sequence(self._comma, start))
            starts = [start] if needed else [start, *starts]
            rest = following if needed else self._rules.name("rest", choice([following, rest]))
        if allow_empty and not any(needed for _, needed in entries):
            starts.append(EMPTY)
        if not starts:
            return None
        return sequence(literal("{"), self._rules.name("entries", choice(starts)), literal("}")) if entries else _BRACES

    def _open_object(self, flat: Schema, additional: Any, pointer: str, fuel: int) -> Piece | None:
        low, high = int(flat.get("minProperties", 0)), self._cap(flat, "maxProperties", self._bounds.max_entries, 0)
        if low > 1:
            message = "minProperties above 1 for properties of any name"
            raise SchemaError("unsupported", at(pointer, "minProperties"), message)
        value = self.compile(additional, at(pointer, "additionalProperties"), fuel)
        if value is None:
            high = 0
        if low > high:
            return None
        return self._map(value or EMPTY, low, min(high, MAX_REPETITION))

    def _map(self, value: Piece, low: int, high: int) -> Piece:
        key = string_forms.text(self._rules, 1, self._bounds.max_key, counts_bytes=self._bounds.strict)
        entry = self._rules.name("entry", sequence(key, literal(":"), self._space, value))
        return sequence(literal("{"), self._row(entry, low, high), literal("}"))

    # Arrays

    def _array(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        low = int(flat.get("minItems", 0))
        prefix = flat.get("prefixItems", [])
        high = self._max_items(flat, low, len(prefix))
        if flat.get("uniqueItems") and high > 1:
            return self._unique(flat, low, high, pointer, fuel)
        heads: list[Piece] = []
        for index in range(min(len(prefix), high)):
            head = self.compile(prefix[index], at(pointer, "prefixItems", index), fuel)
            if head is None:
                high = index
                break
            heads.append(head)
        item = self._item(flat, pointer, fuel) if high > len(heads) else None
        if item is None:
            high = min(high, len(heads))
        if low > high:
            return None
        if max(low, high) > MAX_REPETITION:
            raise SchemaError("unsupported", pointer, f"arrays of more than {MAX_REPETITION} items")
        return self._tuple(heads, item, low, high) if heads else self._list(item or EMPTY, low, high)

    def _item(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        return self.compile(flat.get("items", True), at(pointer, "items"), fuel)

    def _max_items(self, flat: Schema, low: int, num_prefix: int) -> int:
        """Behind prefixItems nothing comes that the schema does not speak of or ask for."""
        if "maxItems" in flat and ("items" in flat or not num_prefix):
            return self._cap(flat, "maxItems", max(num_prefix, self._bounds.max_items), low)
        if "items" not in flat and num_prefix:
            return min(max(num_prefix, low), int(flat.get("maxItems", low + num_prefix)))
        return max(low, num_prefix, self._bounds.max_items)

    def _cap(self, flat: Schema, keyword: str, bound: int, low: int) -> int:
        return self._bounds.cap(int(flat[keyword]) if keyword in flat else None, bound, low)

    def _list(self, item: Piece, low: int, high: int) -> Piece:
        return sequence(literal("["), self._row(item, low, high), literal("]"))

    def _row(self, item: Piece, low: int, high: int) -> Piece:
        """From low to high items with commas between."""
        if high == 0:
            return EMPTY
        following = self._rules.name("next", sequence(self._comma, item))
        row = sequence(item, repeat(following, max(low - 1, 0), high - 1))
        return row if low else optional(self._rules.name("row", row))

    def _tuple(self, heads: list[Piece], item: Piece | None, low: int, high: int) -> Piece:
        """The items with a schema of their own, each optional behind minItems, then those of one kind."""
        rest = EMPTY
        if item is not None and high > len(heads):
            following = self._rules.name("next", sequence(self._comma, item))
            rest = repeat(following, max(low - len(heads), 0), high - len(heads))
        for index in reversed(range(len(heads))):
            comma = self._comma if index else EMPTY
            rest = self._rules.name("items", sequence(comma, heads[index], rest))
            rest = rest if index < low else optional(rest)
        return sequence(literal("["), rest, literal("]"))

    def _unique(self, flat: Schema, low: int, high: int, pointer: str, fuel: int) -> Piece | None:
        """Different items: only values that are listed, each once, in the order of the list."""
        place = at(pointer, "uniqueItems")
        variants = self._forms.variants(item_schema(flat, 0), at(pointer, "items"), fuel)
        if "prefixItems" in flat or not all("enum" in variant for variant, _ in variants):
            raise SchemaError("unsupported", place, "uniqueItems, except for items of an enum")
        values = {json_key(v): v for variant, left in variants for v in self._valid_values(variant, pointer, left)}
        if len(values) > MAX_UNIQUE_ITEMS:
            raise SchemaError("unsupported", place, f"uniqueItems of more than {MAX_UNIQUE_ITEMS} values")
        if low > len(values):
            return None
        items = [self._constant(value) for value in values.values()]
        rows = {len(items): dict.fromkeys(range(low, len(items) + 1), EMPTY)}
        for index in reversed(range(len(items))):
            rows[index] = self._choices(items[index], rows[index + 1], index, high)
        return sequence(literal("["), rows[0][0], literal("]")) if 0 in rows[0] else None

    def _choices(self, item: Piece, after: dict[int, Piece], index: int, high: int) -> dict[int, Piece]:
        """What may follow at this item when so many were taken already, by that number."""
        found: dict[int, Piece] = {}
        for count in range(min(index, high) + 1):
            taken = sequence(self._comma if count else EMPTY, item, after.get(count + 1, EMPTY))
            options = [taken] if count < high and count + 1 in after else []
            options += [after[count]] if count in after else []
            if options:
                found[count] = self._rules.name("choices", choice(options))
        return found

    # Strings and numbers

    def _string(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        low = int(flat.get("minLength", 0))
        own_high = int(flat["maxLength"]) if "maxLength" in flat else None
        high = self._bounds.cap(own_high, self._bounds.max_string, low)
        if low > high:
            return None
        if "pattern" in flat or "format" in flat:
            return self._shaped_string(flat, pointer, low, own_high)
        if low > MAX_REPETITION:
            raise SchemaError("unsupported", at(pointer, "minLength"), f"minLength above {MAX_REPETITION}")
        high = min(high, MAX_REPETITION)
        return string_forms.text(self._rules, low, high, counts_bytes=self._bounds.strict)

    def _shaped_string(self, flat: Schema, pointer: str, low: int, high: int | None) -> Piece:
        if "pattern" not in flat:
            return self._formatted_string(flat["format"], at(pointer, "format"), low, high)
        place = at(pointer, "pattern")
        if "format" in flat:
            raise SchemaError("unsupported", place, "pattern and format at once")
        limit = self._bounds.cap(high, self._bounds.max_string, low)
        try:
            piece = pattern_piece(flat["pattern"], low, limit)
        except PatternError as error:
            raise SchemaError("unsupported", place, str(error)) from error
        return string_forms.quoted(self._rules.name("pattern", piece) if piece.text else EMPTY)

    def _formatted_string(self, name: str, pointer: str, low: int, high: int | None) -> Piece:
        if name not in string_forms.FORMATS:
            known = ", ".join(string_forms.FORMATS)
            raise SchemaError("unsupported", pointer, f"the format {name!r} (known are {known})")
        form = string_forms.FORMATS[name]
        piece = form.piece(self._rules)
        if form.shortest < low or (high is not None and piece.longest > high):
            raise SchemaError("unsupported", pointer, f"the format {name!r} with these lengths")
        return string_forms.quoted(piece)

    def _integer(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        low, high = self._interval(flat, pointer).integer_bounds(self._bounds.max_digits)
        if flat.get("multipleOf", 1) == 1:
            return self._named("integer", integers(low, high))
        return self._multiples(flat["multipleOf"], low, high, pointer)

    def _multiples(self, divisor: int | float, low: int, high: int, pointer: str) -> Piece | None:
        place = at(pointer, "multipleOf")
        if divisor != int(divisor):
            raise SchemaError("unsupported", place, "multipleOf of a fraction")
        step = int(divisor)
        multiples = range(-(-low // step) * step, high + 1, step)
        if not multiples:
            return None
        if len(multiples) > MAX_MULTIPLES:
            raise SchemaError("unsupported", place, f"multipleOf, except between bounds of {MAX_MULTIPLES} multiples")
        return any_literal(self._rules, [str(multiple) for multiple in multiples])

    def _number(self, flat: Schema, pointer: str, fuel: int) -> Piece | None:
        if "multipleOf" in flat:
            return self._integer(flat, pointer, fuel)
        interval = self._interval(flat, pointer)
        return self._named("number", numbers(interval, self._bounds.max_digits, self._bounds.max_decimals))

    def _interval(self, flat: Schema, pointer: str) -> Interval:
        interval = interval_of(flat)
        for bound, sign in ((interval.low, 1), (interval.high, -1)):
            if bound is not None and sign * bound > MAX_BOUND:
                raise SchemaError("unsupported", pointer, "numbers beyond 20 digits only")
        if interval.low is not None and interval.low < -MAX_BOUND:
            interval = replace(interval, low=None, low_open=False)
        if interval.high is not None and interval.high > MAX_BOUND:
            interval = replace(interval, high=None, high_open=False)
        return interval

    def _named(self, hint: str, piece: Piece | None) -> Piece | None:
        return None if piece is None else self._rules.name(hint, piece)


_BRACES = literal("{}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
