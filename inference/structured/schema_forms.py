"""What a JSON Schema means before it becomes a grammar: references resolved, unions multiplied out, keywords merged.

A flat schema is a dict without `$ref`, allOf, anyOf and oneOf; a schema is a list of them, any of which may hold. Every
keyword that restricts and is not understood is refused with its place. Recursion through `$ref` spends fuel. Pure.
"""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from inference.structured.number_forms import Interval

MAX_VARIANTS = 64
MAX_STEPS = 20_000
"""What a schema may cost to compile, in all: some tenths of a second."""
CHARACTERS_A_STEP = 64
ENTRIES_A_STEP = 4

Schema = dict[str, Any]

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
_UNDERSTOOD = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "minProperties", "maxProperties",
    "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength",
    "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf",
}  # fmt: skip
_REFUSED = {
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas",
    "dependencies", "patternProperties", "propertyNames", "unevaluatedItems", "$dynamicRef", "$recursiveRef",
}  # fmt: skip
_HINTS = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class SchemaError(ValueError):
    """A schema that is refused: `pointer` is the place as a JSON pointer, "" for the whole.

    Codes: invalid (no JSON Schema), unsupported (a keyword that cannot be kept), unsatisfiable (no value is valid
    within the bounds), too_large, too_complex.
    """

    def __init__(self, code: str, pointer: str, message: str) -> None:
        super().__init__(f"{message} (at {pointer or 'the root'})")
        self.code, self.pointer, self.message = code, pointer, message


def at(pointer: str, *steps: str | int) -> str:
    return pointer + "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in steps)


def json_key(value: Any) -> str:
    """A text that is the same for values that JSON Schema calls equal, and for no others: 1 is 1.0 but not true."""
    return json.dumps(_canonical(value), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def types_of(flat: Schema) -> set[str]:
    """The types that a flat schema allows; all without the keyword."""
    return set(flat["type"]) if "type" in flat else set(TYPES)


def made_types(flat: Schema) -> set[str]:
    """The types that are made of it: without the keyword, those that its other keywords speak of, if any."""
    if "type" in flat:
        return set(flat["type"])
    return {name for name, hints in _HINTS.items() if hints & flat.keys()} or set(TYPES)


def interval_of(flat: Schema) -> Interval:
    low, low_open = _tightest(flat.get("minimum"), flat.get("exclusiveMinimum"), sign=1)
    high, high_open = _tightest(flat.get("maximum"), flat.get("exclusiveMaximum"), sign=-1)
    return Interval(low, high, low_open, high_open)


def _tightest(closed: Any, opened: Any, *, sign: int) -> tuple[Decimal | None, bool]:
    if opened is None:
        return (None if closed is None else Decimal(repr(closed))), False
    if closed is None or sign * opened >= sign * closed:
        return Decimal(repr(opened)), True
    return Decimal(repr(closed)), False


class Forms:
    """The schemas of one document: finds references and turns any of its schemas into flat ones."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._cyclic: dict[str, bool] = {}
        self._enum_keys: dict[int, tuple[list[Any], frozenset[str]]] = {}
        self._num_steps = 0

    def variants(self, schema: Any, pointer: str, fuel: int) -> list[tuple[Schema, int]]:
        """The flat schemas of which one must hold, each with the fuel that is left; none if nothing is valid."""
        self._step(pointer)
        if schema is True:
            return [({}, fuel)]
        if schema is False:
            return []
        if not isinstance(schema, dict):
            raise SchemaError("invalid", pointer, "a schema must be an object or a boolean")
        found = [(own_keywords(schema, pointer), fuel)]
        if "$ref" in schema:
            found = self._all(found, self._referenced(schema["$ref"], at(pointer, "$ref"), fuel), pointer)
        for index, part in enumerate(_branches(schema, "allOf", pointer)):
            found = self._all(found, self.variants(part, at(pointer, "allOf", index), fuel), pointer)
        if "anyOf" in schema:
            options = [option for branch in self._options(schema, "anyOf", pointer, fuel) for option in branch]
            found = self._all(found, options, pointer)
        if "oneOf" in schema:
            found = self._all(found, self._exactly_one(schema, pointer, fuel), pointer)
        return found

    def _options(self, schema: Schema, keyword: str, pointer: str, fuel: int) -> list[list[tuple[Schema, int]]]:
        branches = _branches(schema, keyword, pointer)
        return [self.variants(branch, at(pointer, keyword, i), fuel) for i, branch in enumerate(branches)]

    def _exactly_one(self, schema: Schema, pointer: str, fuel: int) -> list[tuple[Schema, int]]:
        """The branches of oneOf, if no value that is made for one can be valid for another."""
        # What stands beside oneOf often tells the branches apart, so it is merged in before they are compared.
        beside = own_keywords(schema, pointer)
        branches = self._options(schema, "oneOf", pointer, fuel)
        merged = [self._all([(beside, fuel)], branch, pointer) for branch in branches]
        for i, branch in enumerate(merged):
            others = [other for j, others in enumerate(merged) if j != i for other in others]
            for flat, _ in branch:
                if not all(self._excludes(flat, other, pointer, fuel, depth=4) for other, _ in others):
                    message = "oneOf whose branches may overlap; anyOf allows that"
                    raise SchemaError("unsupported", at(pointer, "oneOf", i), message)
        return [option for branch in branches for option in branch]

    def _all(
        self, left: list[tuple[Schema, int]], right: list[tuple[Schema, int]], pointer: str
    ) -> list[tuple[Schema, int]]:
        """Both must hold: every pair merged, without those that exclude each other."""
        if len(left) * len(right) > MAX_VARIANTS:
            raise SchemaError("too_complex", pointer, f"more than {MAX_VARIANTS} combinations of anyOf and oneOf")
        self._step(pointer, cost=sum(len(right) * _size(flat) for flat, _ in left))
        self._step(pointer, cost=sum(len(left) * _size(flat) for flat, _ in right))
        pairs = [(merge(first, second, pointer), min(fuel, other)) for first, fuel in left for second, other in right]
        return [(flat, fuel) for flat, fuel in pairs if flat is not None]

    # References

    def _referenced(self, reference: Any, pointer: str, fuel: int) -> list[tuple[Schema, int]]:
        if not isinstance(reference, str):
            raise SchemaError("invalid", pointer, "$ref must be a text")
        if self._is_cyclic(reference, pointer):
            fuel -= 1
            if fuel < 0:
                return []
        return self.variants(self._find(reference, pointer), reference.removeprefix("#"), fuel)

    def _find(self, reference: str, pointer: str) -> Any:
        if reference != "#" and not reference.startswith("#/"):
            raise SchemaError("unsupported", pointer, "only references into the schema itself, such as #/$defs/name")
        found: Any = self._root
        for step in unquote(reference)[2:].split("/") if reference != "#" else []:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isascii() and name.isdigit() and int(name) < len(found):
                found = found[int(name)]
            else:
                raise SchemaError("invalid", pointer, f"nothing is defined at {reference}")
        return found

    def _is_cyclic(self, reference: str, pointer: str) -> bool:
        """Whether following references from here can come back here."""
        if reference not in self._cyclic:
            seen: set[str] = set()
            pending = self._references_in(self._find(reference, pointer))
            while pending:
                following = pending.pop()
                if following not in seen:
                    seen.add(following)
                    pending += self._references_in(self._find_or_none(following))
            self._cyclic[reference] = reference in seen
        return self._cyclic[reference]

    def _find_or_none(self, reference: str) -> Any:
        try:
            return self._find(reference, "")
        except SchemaError:
            return None  # it stands in data, or is refused with its place when a value needs it

    @staticmethod
    def _references_in(value: Any) -> list[str]:
        found: list[str] = []
        pending = [value]
        while pending:
            inner = pending.pop()
            if isinstance(inner, dict):
                if isinstance(inner.get("$ref"), str):
                    found.append(inner["$ref"])
                pending += inner.values()
            elif isinstance(inner, list):
                pending += inner
        return found

    # Values and overlaps

    def accepts(self, schema: Any, value: Any, pointer: str, fuel: int) -> bool:
        """Whether a value of the schema's text is valid. Raises SchemaError where a pattern or format would decide."""
        return any(self.accepts_flat(flat, value, pointer, left) for flat, left in self.variants(schema, pointer, fuel))

    def accepts_flat(self, flat: Schema, value: Any, pointer: str, fuel: int) -> bool:
        self._step(pointer)
        if not _type_names(value) & types_of(flat):
            return False
        if "enum" in flat:
            key = json_key(value)
            self._step(pointer, cost=len(key) // CHARACTERS_A_STEP)
            if key not in self._keys(flat["enum"]):
                return False
        if isinstance(value, str):
            return self._accepts_text(flat, value, pointer)
        if isinstance(value, list):
            return self._accepts_list(flat, value, pointer, fuel)
        if isinstance(value, dict):
            return self._accepts_object(flat, value, pointer, fuel)
        return not is_number(value) or _accepts_number(flat, value)

    def _keys(self, options: list[Any]) -> frozenset[str]:
        """Of an enum, made once: all its values are looked for in it. Kept beside it, so that its id is its own."""
        if id(options) not in self._enum_keys:
            self._enum_keys[id(options)] = options, frozenset(json_key(option) for option in options)
        return self._enum_keys[id(options)][1]

    def _accepts_text(self, flat: Schema, value: str, pointer: str) -> bool:
        if {"pattern", "format"} & flat.keys():
            raise SchemaError("unsupported", pointer, "a pattern or format together with enum or const")
        return _within(len(value), flat, "minLength", "maxLength")

    def _accepts_list(self, flat: Schema, value: list[Any], pointer: str, fuel: int) -> bool:
        if flat.get("uniqueItems") and len({json_key(item) for item in value}) < len(value):
            return False
        return _within(len(value), flat, "minItems", "maxItems") and all(
            self.accepts(item_schema(flat, index), item, pointer, fuel) for index, item in enumerate(value)
        )

    def _accepts_object(self, flat: Schema, value: Schema, pointer: str, fuel: int) -> bool:
        if not set(flat.get("required", ())) <= value.keys():
            return False
        return _within(len(value), flat, "minProperties", "maxProperties") and all(
            self.accepts(property_schema(flat, name), item, pointer, fuel) for name, item in value.items()
        )

    def _excludes(self, made: Schema, other: Schema, pointer: str, fuel: int, depth: int) -> bool:
        """Whether no value that is made for the first flat schema is valid for the other. False if in doubt."""
        if "enum" in made:
            values = [value for value in made["enum"] if self.accepts_flat(made, value, pointer, fuel)]
            return not any(self.accepts_flat(other, value, pointer, fuel) for value in values)
        if "enum" in other:
            return not any(self.accepts_flat(made, value, pointer, fuel) for value in other["enum"])
        mine, theirs = made_types(made), types_of(other)
        if "number" in theirs:
            theirs.add("integer")
        if "number" in mine and "integer" in theirs:
            theirs.add("number")  # 2.0 is an integer
        return all(self._excludes_type(made, other, name, pointer, fuel, depth) for name in mine & theirs)

    def _excludes_type(self, made: Schema, other: Schema, name: str, pointer: str, fuel: int, depth: int) -> bool:
        if name == "object":
            return self._excludes_objects(made, other, pointer, fuel, depth)
        if name in {"integer", "number"}:
            return not interval_of(made).meets(interval_of(other))
        if name == "string":
            return _apart(made, other, "minLength", "maxLength")
        return name == "array" and _apart(made, other, "minItems", "maxItems")

    def _excludes_objects(self, made: Schema, other: Schema, pointer: str, fuel: int, depth: int) -> bool:
        declared, required = made.get("properties", {}), made.get("required", [])
        if declared and not set(other.get("required", ())) <= declared.keys() | set(required):
            return True
        return depth > 0 and any(
            self._excludes_schema(property_schema(made, key), property_schema(other, key), pointer, fuel, depth - 1)
            for key in required
        )

    def _excludes_schema(self, made: Any, other: Any, pointer: str, fuel: int, depth: int) -> bool:
        mine, theirs = self.variants(made, pointer, fuel), self.variants(other, pointer, fuel)
        return all(self._excludes(a, b, pointer, fuel, depth) for a, _ in mine for b, _ in theirs)

    def _step(self, pointer: str, cost: int = 1) -> None:
        self._num_steps += cost
        if self._num_steps > MAX_STEPS:
            raise SchemaError("too_complex", pointer, "the schema combines too much")


def _size(flat: Schema) -> int:
    """What merging it costs, in steps."""
    return sum(len(value) for value in flat.values() if isinstance(value, dict | list)) // ENTRIES_A_STEP


# Keywords


def own_keywords(schema: Schema, pointer: str) -> Schema:
    """The restricting keywords of a schema, checked and in one form: type a list, const an enum of one."""
    for keyword in schema:
        if keyword in _REFUSED or (keyword == "$id" and pointer):
            raise SchemaError("unsupported", at(pointer, keyword), f"the keyword {keyword} is not supported")
    flat = {key: value for key, value in schema.items() if key in _UNDERSTOOD - {"$ref", "allOf", "anyOf", "oneOf"}}
    for keyword in flat:
        _check_keyword(keyword, flat[keyword], at(pointer, keyword))
    if "type" in flat:
        flat["type"] = [flat["type"]] if isinstance(flat["type"], str) else flat["type"]
    _read_enum(flat)
    _read_arrays(flat)
    _read_unevaluated(schema, flat, pointer)
    for low, high in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        _read_old_exclusive(flat, low, high)
    return flat


def _read_enum(flat: Schema) -> None:
    if "const" in flat:
        value = flat.pop("const")
        known = {json_key(option) for option in flat.get("enum", [value])}
        flat["enum"] = [value] if json_key(value) in known else []


def _read_arrays(flat: Schema) -> None:
    """A list of items and additionalItems are the older names of prefixItems and items."""
    additional = flat.pop("additionalItems", None)
    if isinstance(flat.get("items"), list):
        flat["prefixItems"] = flat.pop("items")
        if additional is not None:
            flat["items"] = additional


def _read_unevaluated(schema: Schema, flat: Schema, pointer: str) -> None:
    value = flat.pop("unevaluatedProperties", None)
    if value is None:
        return
    if {"$ref", "allOf", "anyOf", "oneOf"} & schema.keys() or value not in (True, False):
        place = at(pointer, "unevaluatedProperties")
        raise SchemaError("unsupported", place, "unevaluatedProperties beside $ref, allOf, anyOf or oneOf")
    flat.setdefault("additionalProperties", value)


def _read_old_exclusive(flat: Schema, bound: str, exclusive: str) -> None:
    """In older drafts exclusiveMinimum is a boolean that speaks of minimum."""
    value = flat.get(exclusive)
    if isinstance(value, bool):
        del flat[exclusive]
        if value and bound in flat:
            flat[exclusive] = flat.pop(bound)


def _check_keyword(keyword: str, value: Any, pointer: str) -> None:
    if not _is_well_formed(keyword, value):
        raise SchemaError("invalid", pointer, f"the value of {keyword} is not valid")


def _is_well_formed(keyword: str, value: Any) -> bool:
    if keyword == "type":
        names = [value] if isinstance(value, str) else value
        return isinstance(names, list) and bool(names) and all(isinstance(n, str) and n in TYPES for n in names)
    if keyword in _COUNTS:
        return is_number(value) and value >= 0 and value == int(value)
    if keyword in _BOUNDS:
        return is_number(value) or (isinstance(value, bool) and keyword.startswith("exclusive"))
    if keyword == "multipleOf":
        return is_number(value) and value > 0
    if keyword == "required":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    if keyword in {"pattern", "format"}:
        return isinstance(value, str)
    if keyword == "uniqueItems":
        return isinstance(value, bool)
    if keyword in {"enum", "prefixItems"}:
        return isinstance(value, list)
    return keyword != "properties" or isinstance(value, dict)


def _branches(schema: Schema, keyword: str, pointer: str) -> list[Any]:
    branches = schema.get(keyword, [])
    if keyword in schema and not (isinstance(branches, list) and branches):
        raise SchemaError("invalid", at(pointer, keyword), f"{keyword} must be a list of schemas")
    return list(branches)


def property_schema(flat: Schema, name: str) -> Any:
    """What a property of this name must satisfy."""
    return flat.get("properties", {}).get(name, flat.get("additionalProperties", True))


def item_schema(flat: Schema, index: int) -> Any:
    prefix = flat.get("prefixItems", [])
    return prefix[index] if index < len(prefix) else flat.get("items", True)


# Merging


def merge(first: Schema, second: Schema, pointer: str) -> Schema | None:
    """A flat schema for what satisfies both, None if their types exclude each other."""
    if not first or not second:
        return first or second
    merged = {**first, **second}
    if "type" in first and "type" in second:
        merged["type"] = _common_types(first["type"], second["type"])
        if not merged["type"]:
            return None
    if "enum" in first and "enum" in second:
        known = {json_key(value) for value in second["enum"]}
        merged["enum"] = [value for value in first["enum"] if json_key(value) in known]
    for keyword in first.keys() & second.keys():
        if keyword.startswith(("min", "exclusiveMin")):
            merged[keyword] = max(first[keyword], second[keyword])
        elif keyword.startswith(("max", "exclusiveMax")):
            merged[keyword] = min(first[keyword], second[keyword])
        elif keyword in {"pattern", "format", "multipleOf"} and first[keyword] != second[keyword]:
            raise SchemaError("unsupported", at(pointer, keyword), f"two different values of {keyword} at once")
    if first.get("uniqueItems") or second.get("uniqueItems"):
        merged["uniqueItems"] = True
    _merge_objects(first, second, merged)
    _merge_arrays(first, second, merged)
    return merged


def _common_types(first: list[str], second: list[str]) -> list[str]:
    """What is in both; an integer is a number too."""
    wider, other = set(first), set(second)
    for names in (wider, other):
        names |= {"integer"} if "number" in names else set()
    return [name for name in TYPES if name in wider & other]


def both(first: Any, second: Any) -> Any:
    if first is True or first == second:
        return second
    return first if second is True else {"allOf": [first, second]}


def _merge_objects(first: Schema, second: Schema, merged: Schema) -> None:
    names = [*first.get("properties", {}), *second.get("properties", {})]
    if "properties" in first or "properties" in second:
        merged["properties"] = {
            name: both(property_schema(first, name), property_schema(second, name)) for name in names
        }
    if "additionalProperties" in first and "additionalProperties" in second:
        merged["additionalProperties"] = both(first["additionalProperties"], second["additionalProperties"])
    if "required" in first or "required" in second:
        merged["required"] = list(dict.fromkeys([*first.get("required", []), *second.get("required", [])]))


def _merge_arrays(first: Schema, second: Schema, merged: Schema) -> None:
    length = max(len(first.get("prefixItems", [])), len(second.get("prefixItems", [])))
    if length:
        merged["prefixItems"] = [both(item_schema(first, i), item_schema(second, i)) for i in range(length)]
    if "items" in first and "items" in second:
        merged["items"] = both(first["items"], second["items"])


# Values


def _type_names(value: Any) -> set[str]:
    if value is None:
        return {"null"}
    if isinstance(value, bool):
        return {"boolean"}
    if is_number(value):
        return {"number", "integer"} if value == int(value) else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


def _accepts_number(flat: Schema, value: int | float) -> bool:
    divisor = flat.get("multipleOf")
    return value in interval_of(flat) and (divisor is None or Fraction(repr(value)) % Fraction(repr(divisor)) == 0)


def _within(count: int, flat: Schema, low: str, high: str) -> bool:
    return bool(flat.get(low, 0) <= count <= flat.get(high, count))


def _apart(first: Schema, second: Schema, low: str, high: str) -> bool:
    """Whether no count is within the bounds of both."""
    return any(a.get(low, 0) > b[high] for a, b in ((first, second), (second, first)) if high in b)
