"""Grammars for calls of tools, in the notations that chat models were trained on.

Only the forced cases: a model that may also answer in prose is left free. Text alone, no special tokens: llama.cpp
matches a token by its text whatever kind it is. Tools are OpenAI's or Anthropic's. Pure, called at the door.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inference.structured.json_schema import Bounds, schema_piece
from inference.structured.pieces import EMPTY, NEWLINE, Piece, Rules, choice, literal, optional, repeat, sequence
from inference.structured.schema_forms import SchemaError, at

MAX_TOOLS = 128
MAX_CALLS = 8
"""Calls in one answer where several are allowed."""

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NO_ARGUMENTS = {"type": "object", "properties": {}}
_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class _Format:
    """How one call is written, from its name in JSON and its arguments, and what stands around and between calls."""

    call: Callable[[str, Piece, Piece, Piece], Piece]
    start: str = ""
    between: str = ""
    end: str = ""


def _json_call(name: str, arguments: Piece, space: Piece, newline: Piece, *, key: str = "arguments") -> Piece:
    head = [literal('{"name":'), space, literal(f"{json.dumps(name)},"), space]
    return sequence(*head, literal(f'"{key}":'), space, arguments, literal("}"))


def _tagged_call(name: str, arguments: Piece, space: Piece, newline: Piece) -> Piece:
    call = _json_call(name, arguments, space, newline)
    return sequence(literal("<tool_call>"), newline, call, newline, literal("</tool_call>"))


def _mistral_call(name: str, arguments: Piece, space: Piece, newline: Piece) -> Piece:
    return sequence(literal(f"[TOOL_CALLS]{name}[ARGS]"), arguments)


def _parameters_call(name: str, arguments: Piece, space: Piece, newline: Piece) -> Piece:
    return _json_call(name, arguments, space, newline, key="parameters")


def _qwen_call(name: str, arguments: Piece, space: Piece, newline: Piece) -> Piece:
    return sequence(literal(f"✿FUNCTION✿: {name}"), NEWLINE, literal("✿ARGS✿: "), arguments)


TOOL_CALL_FORMATS: dict[str, _Format] = {
    "chatml": _Format(_tagged_call, between="\n"),
    "mistral": _Format(_mistral_call),
    "mistral-old": _Format(_json_call, start="[TOOL_CALLS][", between=", ", end="]"),
    "json": _Format(_json_call, between="\n"),
    "llama3": _Format(_parameters_call, between="; "),
    "qwen-old": _Format(_qwen_call, between="\n"),
}


def calls_piece(
    rules: Rules,
    tools: Sequence[dict[str, Any]],
    tool: str | None,
    format: str,
    *,
    bounds: Bounds,
    num_calls: int,
    is_lenient: bool = False,
) -> Piece:
    """Up to so many calls as a piece of a grammar.

    `tool` names the only one that may be called, None allows all ("required"); formats: TOOL_CALL_FORMATS. is_lenient:
    arguments of a schema that cannot be kept are any object. Raises SchemaError with a pointer into the list of tools,
    ValueError for an unknown format.
    """
    if format not in TOOL_CALL_FORMATS:
        raise ValueError(f"unknown tool call format {format!r}")
    functions = _functions(tools)
    if tool is not None and tool not in functions:
        raise SchemaError("invalid", "", f"there is no tool named {tool!r}")
    form = TOOL_CALL_FORMATS[format]
    space = rules.name("space", optional(literal(" ")))
    newline = rules.name("newline", optional(NEWLINE))
    written = _any_arguments if is_lenient else _arguments
    calls = [
        rules.name(f"call-{name}", form.call(name, written(rules, schema, pointer, bounds), space, newline))
        for name, (schema, pointer) in functions.items()
        if tool is None or name == tool
    ]
    return _row(rules, form, rules.name("call", choice(calls)), num_calls)


def _row(rules: Rules, form: _Format, call: Piece, num_calls: int) -> Piece:
    between = NEWLINE if form.between == "\n" else literal(form.between)
    following = rules.name("next-call", sequence(between, call)) if num_calls > 1 else EMPTY
    more = repeat(following, 0, num_calls - 1)
    return sequence(literal(form.start), call, more, literal(form.end))


def _functions(tools: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], str]]:
    """The schema of the arguments of each tool by name, and its place."""
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise SchemaError("invalid", "", f"between 1 and {MAX_TOOLS} tools are needed")
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for index, tool in enumerate(tools):
        pointer, function = at("", index), tool
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
            pointer, function = at(pointer, "function"), tool["function"]
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise SchemaError("invalid", at(pointer, "name"), "a tool needs a name of 1 to 128 of A-Z a-z 0-9 _ . -")
        if name in found:
            raise SchemaError("invalid", at(pointer, "name"), f"two tools named {name!r}")
        key = "input_schema" if "input_schema" in function else "parameters"
        found[name] = (_NO_ARGUMENTS if function.get(key) is None else function[key]), at(pointer, key)
    return found


def _arguments(rules: Rules, schema: Any, pointer: str, bounds: Bounds) -> Piece:
    """The arguments' texts: objects, whatever else the schema allows."""
    try:
        if isinstance(schema, dict) and schema.get("type", "object") != "object":
            raise SchemaError("invalid", "/type", "the arguments of a tool are an object")
        return schema_piece(rules, {"type": "object", **schema} if isinstance(schema, dict) else schema, bounds)
    except SchemaError as error:
        raise SchemaError(error.code, pointer + error.pointer, error.message) from error


def _any_arguments(rules: Rules, schema: Any, pointer: str, bounds: Bounds) -> Piece:
    """Of the schema where it can be kept, if not within these bounds; else any object."""
    try:
        return _arguments(rules, schema, pointer, bounds)
    except SchemaError as error:
        try:
            _arguments(Rules(), schema, pointer, Bounds())
        except SchemaError:
            return schema_piece(rules, _ANY_OBJECT, bounds)
        raise error
