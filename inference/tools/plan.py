"""What a request's tools mean, decided once at its door: what the model is shown, what forces it, what reads it.

Every dialect calls plan_tools; no dialect knows a format. Pure, some milliseconds where a grammar is made.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from accounts.trail.refusals import Refusal
from inference.chat.prompt import ChatTemplate
from inference.structured import CallsForm, EitherForm, JsonForm, SchemaError, widest
from inference.tools.events import Call
from inference.tools.formats import CHATML, FORMATS, ToolCallFormat, formats_of
from inference.tools.stream import ToolCallStream, parse

CHOICES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """prompt_tools: for ChatPrompt.tools. form: for GenerateOrder.form, of forced calls or of calls beside an answer in
    a schema; None leaves the order's as it is. formats: how its calls may look, none where it has no tools. names: of
    the tools. shown_texts: texts which, where the vocabulary has them as control tokens, must reach the answer's text
    (GenerateOrder.shown_texts)."""

    prompt_tools: tuple[Mapping[str, Any], ...] = ()
    form: CallsForm | EitherForm | None = None
    formats: tuple[ToolCallFormat, ...] = ()
    names: frozenset[str] = frozenset()

    @property
    def is_forced(self) -> bool:
        return isinstance(self.form, CallsForm)

    @property
    def grammar(self) -> str | None:
        """The widest of the form, for SamplingParams.grammar; None leaves the model free."""
        return None if self.form is None else widest(self.form).grammar

    @property
    def shown_texts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(token for each in self.formats for token in each.tokens))

    def read(self, text: str, *, rng: random.Random, is_thinking: bool = False) -> tuple[str, tuple[Call, ...]]:
        """The content and the calls of a whole answer. Without tools the text is the content."""
        return parse(text, self.formats, rng=rng, names=self.names, is_thinking=is_thinking)

    def stream(self, *, rng: random.Random, eager: bool | None = None, is_thinking: bool = False) -> ToolCallStream:
        """A reader for one choice. eager: None tells calls while they are written where a grammar makes them whole,
        so that only a cut can break them, and elsewhere when they are whole."""
        is_eager = self.is_forced if eager is None else eager
        return ToolCallStream(self.formats, rng=rng, names=self.names, eager=is_eager, is_thinking=is_thinking)


def plan_tools(
    template: ChatTemplate | None,
    tools: Sequence[Mapping[str, Any]],
    choice: str = "auto",
    *,
    name: str | None = None,
    parallel: bool = True,
    answer: JsonForm | None = None,
) -> ToolPlan:
    """template: the one that renders the conversation. tools: as OpenAI writes them. choice: none, auto or required;
    name: the one tool that must be called, whatever the choice says. parallel: several calls in one answer may be.
    answer: the form of an answer without calls, which forced calls take the place of.

    Raises Refusal "invalid_schema" (extra: field, reason, path, tool), "bad_request".
    """
    if choice not in CHOICES:
        raise Refusal("bad_request", f"tool_choice is one of {', '.join(CHOICES)}, or names a function.")
    is_forced = name is not None or choice == "required"
    names = frozenset(_name_of(tool) for tool in tools)
    if is_forced and not tools:
        raise Refusal("bad_request", "tool_choice asks for a call, and there are no tools.")
    if name is not None and name not in names:
        raise Refusal("bad_request", f"tool_choice names {name[:64]!r}, and no tool has this name.")
    if not tools or (choice == "none" and not is_forced):
        return ToolPlan()
    formats = _formats(template)
    form: CallsForm | EitherForm | None = None
    if is_forced or answer is not None:
        form = _form(tools, name, parallel, formats[0].name, None if is_forced else answer)
    return ToolPlan(tuple(tools), form, formats, names)


def _name_of(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _formats(template: ChatTemplate | None) -> tuple[ToolCallFormat, ...]:
    """Where the template shows no tools, the model is asked for the first form (chat/tool_text.py), and may do what
    it likes."""
    if template is None or not template.has_tools:
        return (CHATML, *(each for each in FORMATS if each is not CHATML))
    return formats_of(template.source)


def _form(
    tools: Sequence[Mapping[str, Any]], name: str | None, parallel: bool, format: str, answer: JsonForm | None
) -> CallsForm | EitherForm:
    """With the keys in their order, which the answer's follow."""
    try:
        calls = CallsForm(orjson.dumps(list(tools)), name, parallel, format)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refusal("invalid_schema", "Field 'tools': it holds what JSON cannot.", field="tools") from error
    form = calls if answer is None else EitherForm(calls, answer)
    try:
        widest(form)
    except SchemaError as error:
        raise _refusal(tools, error) from error
    return form


def _refusal(tools: Sequence[Mapping[str, Any]], error: SchemaError) -> Refusal:
    """Names the tool: its place in the list says little to who wrote it."""
    first, _, rest = error.pointer.removeprefix("/").partition("/")
    tool = _name_of(tools[int(first)]) if first.isdigit() and int(first) < len(tools) else None
    place = rest.removeprefix("function/") or "the root"
    where = f"tool {tool!r}, at {place[:200]}: " if tool else ""
    return Refusal(
        "invalid_schema",
        f"Field 'tools': {where}{error.message[:500]}.",
        field="tools",
        reason=error.code,
        path=error.pointer[:200],
        tool=tool,
    )
