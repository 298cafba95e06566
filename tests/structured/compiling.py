"""Schemas and tools straight to grammars, within bounds that a test chooses. Requests take those of fitting.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inference.structured import Compiled
from inference.structured.json_schema import Bounds, finish, schema_piece
from inference.structured.pieces import Rules
from inference.structured.tool_calls import MAX_CALLS, calls_piece

USUAL = Bounds()


def compile_schema(schema: dict[str, Any], bounds: Bounds = USUAL) -> Compiled:
    rules = Rules()
    return finish(rules, schema_piece(rules, schema, bounds))


def to_grammar(schema: dict[str, Any], bounds: Bounds = USUAL) -> str:
    return compile_schema(schema, bounds).grammar


def compile_calls(
    tools: Sequence[dict[str, Any]], tool: str | None = None, parallel: bool = False, format: str = "chatml"
) -> Compiled:
    rules, num_calls = Rules(), MAX_CALLS if parallel else 1
    return finish(rules, calls_piece(rules, tools, tool, format, bounds=USUAL, num_calls=num_calls))
