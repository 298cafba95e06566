"""Schemas that ask for much work: compiled or refused within the time that the door has for them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from inference.structured import SchemaError
from tests.structured.compiling import to_grammar

pytestmark = pytest.mark.unit

MAX_SECONDS = 1.5
"""Of processor time, so that a busy machine does not matter; none takes half of it on a slow one."""

MANY = {"enum": list(range(2_000))}


def _alike(keyword: str, number: int) -> dict[str, Any]:
    return {"$defs": {"e": MANY}, keyword: [{"$ref": "#/$defs/e"} for _ in range(number)]}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 100}
    return schema


def _web(number: int, links: int) -> dict[str, Any]:
    """Definitions that all refer to each other."""
    names = [f"d{i}" for i in range(number)]
    refs = [{"$ref": f"#/$defs/{name}"} for name in names]
    definitions = {
        name: {"type": "object", "properties": {f"q{j}": refs[(7 * i + j) % number] for j in range(links)}}
        for i, name in enumerate(names)
    }
    return {"$defs": definitions, **refs[0]}


HOSTILE: dict[str, dict[str, Any]] = {
    "an enum of thousands": {"enum": [f"{i:x}" for i in range(2_200)]},
    "enums that must both hold": {"enum": list(range(1_500)), "allOf": [{"enum": list(range(1_500))}]},
    "one enum 60 times, any": _alike("anyOf", 60),
    "one enum 60 times, exactly one": _alike("oneOf", 60),
    "one enum 200 times, all": _alike("allOf", 200),
    "an enum for every property": {
        "$defs": {"e": {"enum": list(range(1_500))}},
        "type": "object",
        "properties": {f"p{i}": {"$ref": "#/$defs/e"} for i in range(200)},
    },
    "an enum of long values": {"enum": [[i, {"a": [i] * 5}] for i in range(300)]},
    "arrays in arrays": _nested(14),
    "objects merged 300 times": {
        "$defs": {"e": {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(300)}}},
        "allOf": [{"$ref": "#/$defs/e"} for _ in range(300)],
    },
    "branches told apart in pairs": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"enum": list(range(i * 30, i * 30 + 30))}}, "required": ["k"]}
            for i in range(60)
        ]
    },
    "a web of references": _web(30, 12),
    "hundreds of optional properties of any kind": {
        "type": "object",
        "properties": {f"p{i}": {} for i in range(400)},
    },
    "hundreds of ranges": {
        "type": "object",
        "properties": {f"p{i}": {"type": "number", "minimum": -1.234 * i, "maximum": 98.7 * i} for i in range(200)},
    },
    "repetition of repetition": {"type": "string", "pattern": "(" + "a?" * 120 + "){1,30}"},
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_no_schema_holds_the_door_up(schema: dict[str, Any]) -> None:
    started = time.thread_time()
    try:
        made = to_grammar(schema)
    except SchemaError as error:
        assert error.code in {"too_complex", "too_large", "unsupported"}
    else:
        assert len(made) <= 262_144
    assert time.thread_time() - started < MAX_SECONDS
