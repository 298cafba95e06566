"""Schemas with instances that must be accepted, as the tests of this folder and the real model use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Schema = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A schema, valid values whose usual text must be accepted, and values that must not."""

    name: str
    schema: Schema
    good: list[Any]
    bad: list[Any] = field(default_factory=list)


PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: Schema = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 3},
            },
            "required": ["value"],
        }
    },
}
LINKED: Schema = {
    "type": "object",
    "properties": {"head": {"type": "integer"}, "tail": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["head", "tail"],
}
SHAPE: Schema = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}},
            "required": ["kind", "radius"],
        },
        {
            "type": "object",
            "properties": {"kind": {"const": "square"}, "side": {"type": "number", "exclusiveMinimum": 0}},
            "required": ["kind", "side"],
        },
    ]
}
ORDER: Schema = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "placed": {"type": "string", "format": "date-time"},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-\\d{4}$"},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number", "minimum": 0, "maximum": 9999.99},
                },
                "required": ["sku", "count", "price"],
            },
        },
    },
    "required": ["id", "lines"],
}
BASED: Schema = {
    "allOf": [
        {"type": "object", "properties": {"id": {"type": "integer", "minimum": 1}}, "required": ["id"]},
        {"properties": {"id": {"maximum": 500}, "title": {"type": "string", "maxLength": 12}}, "required": ["title"]},
    ]
}
EXPRESSION: Schema = {
    "$defs": {
        "expression": {
            "anyOf": [
                {"type": "integer", "minimum": -9, "maximum": 9},
                {
                    "type": "object",
                    "properties": {
                        "op": {"enum": ["+", "-", "*"]},
                        "left": {"$ref": "#/$defs/expression"},
                        "right": {"$ref": "#/$defs/expression"},
                    },
                    "required": ["op", "left", "right"],
                    "additionalProperties": False,
                },
            ]
        }
    },
    "type": "object",
    "properties": {"expression": {"$ref": "#/$defs/expression"}},
    "required": ["expression"],
}
PHONE: Schema = {"type": "string", "pattern": "^(\\+\\d{1,3} )?\\(?[2-9]\\d{2}\\)?[-. ]\\d{3}[-. ]\\d{4}$"}
EXAMPLES = [
    Example("person", PERSON, [{"name": "Ada", "age": 36}, {"name": 'B"\\\n', "age": 0, "email": "a.b@c.example"}],
            [{"name": "", "age": 1}, {"name": "Ada"}, {"name": "Ada", "age": 131}, {"name": "A", "age": 1, "x": 2}]),
    Example("tree", TREE, [{"value": 1}, {"value": 1, "children": [{"value": -2}, {"value": 3, "children": []}]}],
            [{"children": []}, {"value": 1, "children": [{}]}]),
    Example("linked", LINKED, [{"head": 1, "tail": None}, {"head": 1, "tail": {"head": 2, "tail": None}}],
            [{"head": 1}]),
    Example("shape", SHAPE, [{"kind": "circle", "radius": 0.5}, {"kind": "square", "side": 12}],
            [{"kind": "circle", "side": 1}, {"kind": "circle", "radius": 0}]),
    Example("order", ORDER, [{"id": "123e4567-e89b-12d3-a456-426614174000", "placed": "2024-02-29T12:00:00Z",
                              "lines": [{"sku": "ABC-0001", "count": 2, "price": 9.99}]}],
            [{"id": "x", "lines": []}]),
    Example("based", BASED, [{"id": 1, "title": ""}, {"id": 500, "title": "déjà vu"}], [{"id": 501, "title": ""}]),
    Example("expression", EXPRESSION, [{"expression": 5}, {"expression": {"op": "+", "left": -9, "right": 9}}],
            [{"expression": 10}]),
    Example("colour", {"enum": ["red", "green", "blue"]}, ["red", "blue"], ["re", "yellow"]),
    Example("mixed enum", {"enum": [1, "1", None, True, 2.5, {"a": [1, 2]}, [], "\u0001"]},
            [1, "1", None, True, 2.5, {"a": [1, 2]}, []], [2, "2", False, {"a": [2]}]),
    Example("const", {"const": {"ok": True, "why": "as \"is\""}}, [{"ok": True, "why": "as \"is\""}], [{"ok": True}]),
    Example("typed enum", {"type": ["integer", "null"], "enum": [1, 2.5, "x", None, 30], "maximum": 10}, [1, None],
            [2.5, "x", 30]),
    Example("nullable", {"type": ["string", "null"], "maxLength": 5}, ["", "abc", None], ["abcdef", 1]),
    Example("union", {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "boolean"}, {"const": "none"}]},
            [5, True, False, "none"], [4, "some", None]),
    Example("tuple", {"type": "array", "prefixItems": [{"type": "string", "maxLength": 3}, {"type": "integer"}],
                      "items": {"type": "boolean"}, "minItems": 1, "maxItems": 5},
            [["a"], ["a", 1], ["a", 1, True, False]], [[], [1], ["a", "b"], ["a", 1, True, True, True, True]]),
    Example("closed tuple", {"type": "array", "items": [{"type": "integer"}, {"type": "null"}],
                             "additionalItems": False, "minItems": 2}, [[7, None]], [[7], [7, None, 1]]),
    Example("matrix", {"type": "array", "items": {"type": "array", "items": {"type": "number", "minimum": -1,
                       "maximum": 1}, "minItems": 2, "maxItems": 2}, "minItems": 2, "maxItems": 2},
            [[[0, 1], [-1, 0.5]]], [[[0, 2], [0, 0]], [[0, 0]]]),
    Example("tags", {"type": "array", "items": {"enum": ["a", "ab", "abc", "b", 1]}, "uniqueItems": True,
                     "minItems": 1, "maxItems": 3}, [["a"], ["a", "abc"], ["ab", "b", 1]],
            [[], ["a", "a"], ["a", "ab", "abc", "b"]]),
    Example("score map", {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
            [{}, {"a": 1, "b": 20}], [{"a": -1}, {"a": "x"}]),
    Example("range", {"type": "integer", "minimum": -17, "maximum": 1234}, [-17, -9, 0, 9, 10, 999, 1234],
            [-18, 1235]),
    Example("exclusive", {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 201}, [100, 200], [99, 201]),
    Example("large", {"type": "integer", "minimum": 10**15}, [10**15], [10**15 - 1]),
    Example("multiple", {"type": "integer", "multipleOf": 25, "minimum": -50, "maximum": 1000}, [-50, 0, 975],
            [10, 1025]),
    Example("ratio", {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, [0, 0.25, 0.999999], [1, 1.5]),
    Example("temperature", {"type": "number", "minimum": -273.15, "maximum": 56.7}, [-273.15, -273, -0.5, 0, 56.7],
            [-273.16, 56.8, 57]),
    Example("date", {"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01"]),
    Example("time", {"type": "string", "format": "time"}, ["23:59:59Z", "01:02:03.5+01:30"], ["24:00:00Z"]),
    Example("address", {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"},
                                  {"type": "string", "format": "hostname"}]},
            ["127.0.0.1", "db.example", "1:2:3:4:5:6:7:8"], ["256.0.0.1"]),
    Example("link", {"type": "string", "format": "uri"}, ["https://a-b.example:8080/x/y?q=1"], ["ftp:/x"]),
    Example("duration", {"type": "string", "format": "duration"}, ["P1D", "PT5M", "P1Y2M3DT4H"], ["P", "PT"]),
    Example("pattern", PHONE,
            ["+49 (234) 567-8901", "234.567.8901"], ["134-567-8901"]),
    Example("short word", {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 6}, ["ab", "abcdef"],
            ["a", "abcdefg", "aB"]),
    Example("path", {"type": "string", "pattern": "^/(?:[\\w.-]+/)*[^/\\s\"]*$", "maxLength": 30}, ["/", "/a/b.c"],
            ["a"]),
    Example("anything", {}, [1, "a", None, [1, {"a": []}], {"a": {"b": 2.5}}]),
    Example("string map", {"type": "object", "maxProperties": 2, "minProperties": 1,
                           "additionalProperties": {"type": "string"}}, [{"a": "b"}], [{}, {"a": 1}]),
    Example("settings", {"type": "object", "properties": {"mode": {"enum": ["on", "off"]}, "level": {"type": "integer",
                         "minimum": 1, "maximum": 5}, "note": {"type": ["string", "null"], "maxLength": 10}},
                         "minProperties": 1, "additionalProperties": False},
            [{"mode": "on"}, {"level": 3}, {"mode": "off", "note": None}], [{}, {"level": 6}, {"other": 1}]),
]  # fmt: skip
