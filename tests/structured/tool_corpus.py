"""Tools with schemas of every kind, and something to ask of each, for calls that a grammar forces."""

from __future__ import annotations

from typing import Any

from tests.structured.corpus import EXPRESSION, LINKED, ORDER, PERSON, TREE, Schema

STRING: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
WHOLE: Schema = {"type": "integer"}
EMAIL: Schema = {"type": "string", "format": "email"}
COLOUR: Schema = {"enum": ["red", "green", "blue"]}


def closed(required: str = "", **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def listed(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


PLACE = closed(
    "lat lon", lat={**NUMBER, "minimum": -90, "maximum": 90}, lon={**NUMBER, "minimum": -180, "maximum": 180}
)
BOOKING: Schema = {
    "$defs": {"guest": closed("name", name=STRING, age={**WHOLE, "minimum": 0, "maximum": 120})},
    "type": "object",
    "properties": {
        "guests": listed({"$ref": "#/$defs/guest"}, minItems=1, maxItems=3),
        "payer": {"$ref": "#/$defs/guest"},
        "nights": {**WHOLE, "minimum": 1, "maximum": 30},
    },
    "required": ["guests", "nights"],
}
FILTERED: Schema = {
    "type": "object",
    "properties": {
        "filter": {
            "anyOf": [
                closed("field equals", field=STRING, equals={"type": ["string", "number", "boolean", "null"]}),
                closed("any", any=listed(closed("field above", field=STRING, above=NUMBER), minItems=1, maxItems=2)),
            ]
        }
    },
    "required": ["filter"],
}
TOOLS: dict[str, tuple[str, Schema]] = {
    "get_weather": ("What is the weather in Bonn?", closed("city", city=STRING, unit={"enum": ["C", "F"]})),
    "now": ("What time is it?", {"type": "object", "properties": {}}),
    "search": ("Look for books about bees.", closed("query", query=STRING, limit={**WHOLE, "minimum": 1})),
    "add_person": ("Ada is 36. Add her.", PERSON),
    "write_note": ("Note: call the plumber.", closed("text tags", text=STRING, tags=listed(STRING))),
    "route": ("How do I get from Bonn to Rome?", closed("start end", start=PLACE, end=PLACE, via=listed(PLACE))),
    "book": ("Book a room for Ada and Bo.", BOOKING),
    "order": ("Order two lamps.", ORDER),
    "plant_tree": ("A tree: 1 with children 2 and 3.", TREE),
    "link": ("The list 1, 2, 3.", LINKED),
    "calculate": ("What is 3 + 4 * 2?", EXPRESSION),
    "filter_rows": ("Rows where the price is above 3.", FILTERED),
    "anything": ("Do something.", closed("value", value={})),
    "set_labels": ("Label it red and new.", {"type": "object", "additionalProperties": STRING}),
    "scores": ("Ada has 3, Bo 4.", {"type": "object", "additionalProperties": {**WHOLE, "minimum": 0}}),
    "matrix": ("A unit matrix.", closed("rows", rows=listed(listed(NUMBER, minItems=2, maxItems=2), maxItems=2))),
    "schedule": ("Meet on Monday at nine.", closed("at", at={**STRING, "format": "date-time"}, title=STRING)),
    "send_mail": ("Write to Ada.", closed("to body", to=listed(EMAIL, minItems=1), body=STRING)),
    "pick": ("Pick colours.", closed("colours", colours={**listed(COLOUR), "uniqueItems": True})),
    "nullable": ("Clear the name.", closed("name", name={"type": ["string", "null"]}, by={"const": "user"})),
    "deep": ("Go deep.", closed("a", a=closed("b", b=closed("c", c=closed("d", d=listed(listed(STRING))))))),
    "either": ("A number or a word.", closed("value", value={"oneOf": [WHOLE, {**STRING, "maxLength": 20}]})),
    "code": ("The code is ABC-1234.", closed("sku", sku={**STRING, "pattern": "^[A-Z]{3}-\\d{4}$"})),
    "open_object": ("Save my settings.", {"type": "object"}),
}  # fmt: skip
WIDE = (
    "add_person",
    "write_note",
    "book",
    "order",
    "plant_tree",
    "calculate",
    "filter_rows",
    "scores",
    "send_mail",
    "deep",
)
"""Those of which there are far more than 1,000 different calls each."""


def tool(name: str) -> dict[str, Any]:
    ask, schema = TOOLS[name]
    description = f"For questions such as: {ask}"
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}
