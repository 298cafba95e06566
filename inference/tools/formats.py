"""How chat models write calls of tools: one reader a format, and which formats a model's template speaks of.

The grammars that force the same forms are in inference/structured/tool_calls.py, under the same names. Sources: the
model cards and chat templates of Hermes 2 Pro, Qwen 2.5 and 3, Mistral and Devstral, Llama 3.1 and 3.2, and Qwen-Agent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from inference.tools.json_object import Broken
from inference.tools.tape import Reading, Tape


@dataclass(frozen=True, slots=True)
class ToolCallFormat:
    """name: as in TOOL_CALL_FORMATS. marker: what a call begins with, "" where it is JSON alone, which counts at the
    beginning of an answer only. read: goes behind it. signs: a template that holds one of them means this format.
    tokens: what vocabularies may have as control tokens. has_short_ids: ids of calls have nine letters and digits.
    """

    name: str
    marker: str
    read: Callable[[Tape], Reading]
    signs: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    has_short_ids: bool = False


def _read_tagged(tape: Tape) -> Reading:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>"""
    yield from tape.blanks()
    yield from tape.call()
    yield from tape.optional("</tool_call>")
    tape.commit()


def _read_mistral(tape: Tape) -> Reading:
    """Behind [TOOL_CALLS]: the array of the old form, or name[ARGS]{...}, perhaps with [CALL_ID]id between."""
    yield from tape.blanks()
    if tape.text[tape.position] in "[{":
        yield from _read_array(tape)
        return
    start = tape.position
    yield from tape.name()
    name = tape.text[start : tape.position]
    yield from tape.blanks()
    if tape.text[tape.position] == "[":
        yield from _maybe_call_id(tape)
        yield from tape.expect("[ARGS]")
        yield from tape.blanks()
    yield from tape.arguments_of(name)


def _maybe_call_id(tape: Tape) -> Reading:
    start = tape.position
    try:
        yield from tape.expect("[CALL_ID]")
        yield from tape.name()
    except Broken:
        tape.position = start


def _read_array(tape: Tape, *, is_sure: bool = True) -> Reading:
    """One call, or several between brackets."""
    if tape.text[tape.position] != "[":
        yield from tape.call(is_sure=is_sure)
        return
    tape.position += 1
    while True:
        yield from tape.blanks()
        yield from tape.call(is_sure=is_sure)
        yield from tape.blanks()
        if tape.text[tape.position] != ",":
            break
        tape.position += 1
    yield from tape.expect("]")
    tape.commit()


def _read_old_qwen(tape: Tape) -> Reading:
    """Behind ✿FUNCTION✿: the name, and ✿ARGS✿: {...} on the next line."""
    yield from tape.has(":")
    yield from tape.blanks()
    start = tape.position
    yield from tape.name()
    name = tape.text[start : tape.position]
    yield from tape.has("✿ARGS✿", ":")
    yield from tape.blanks()
    yield from tape.arguments_of(name)
    for marker in ("✿RESULT✿", "✿RETURN✿"):
        yield from tape.optional(marker, ":")
        tape.commit()


def _read_python_tag(tape: Tape) -> Reading:
    """Behind <|python_tag|>, which nothing but calls follow."""
    yield from tape.blanks()
    yield from _read_row(tape, is_sure=True)


def _read_bare(tape: Tape) -> Reading:
    yield from _read_row(tape, is_sure=False)


def _read_row(tape: Tape, *, is_sure: bool) -> Reading:
    """JSON calls, one behind the other, with a semicolon between or none."""
    yield from _read_array(tape, is_sure=is_sure)
    while True:
        yield from tape.optional(";")
        yield from tape.blanks()
        if tape.text[tape.position] not in "{[":
            return
        yield from _read_array(tape, is_sure=is_sure)


_MISTRAL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
CHATML = ToolCallFormat(
    "chatml", "<tool_call>", _read_tagged, ("<tool_call>",), ("<tool_call>", "</tool_call>")
)  # fmt: skip
MISTRAL = ToolCallFormat("mistral", "[TOOL_CALLS]", _read_mistral, ("[ARGS]",), _MISTRAL_TOKENS, has_short_ids=True)
MISTRAL_OLD = ToolCallFormat(
    "mistral-old", "[TOOL_CALLS]", _read_mistral, ("[TOOL_CALLS]",), _MISTRAL_TOKENS, has_short_ids=True
)
QWEN_OLD = ToolCallFormat("qwen-old", "✿FUNCTION✿", _read_old_qwen, ("✿FUNCTION✿",))
LLAMA3 = ToolCallFormat(
    "llama3", "<|python_tag|>", _read_python_tag, ("<|python_tag|>", '"parameters": '), ("<|python_tag|>",)
)
JSON = ToolCallFormat("json", "", _read_bare)
FORMATS = (CHATML, MISTRAL, MISTRAL_OLD, QWEN_OLD, LLAMA3, JSON)
"""All of them, in the order in which a template is asked for them."""


def formats_of(template: str | None) -> tuple[ToolCallFormat, ...]:
    """Those that a template's text has signs of, the one to be forced first; all where it has none."""
    found = [each for each in FORMATS if any(sign in (template or "") for sign in each.signs)]
    if not found:
        return FORMATS
    if LLAMA3 in found:
        found.append(JSON)  # Llama 3 leaves its tag out as often as not
    return tuple(found)
