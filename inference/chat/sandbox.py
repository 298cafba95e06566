"""The sandbox that templates are compiled and rendered in, with the names that templates of public models use.

A template comes with a model file and is a program of a stranger: it gets no attribute that leads out, nothing that it
can change, and bounded output. What no check here can stop (time, memory) is bounded by the process: this runs in
children that may be killed. The names are those of Hugging Face's `apply_chat_template`:
https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from inference.chat.prompt import MAX_TEMPLATE_BYTES
from inference.chat.user_text import MARK

MAX_OUTPUT_CHARACTERS = 4 << 20
"""Marks (user_text.py) included."""
MAX_PRODUCT = 1 << 20
MAX_POWER_BITS = 4096
MAX_INDENT = 16
MAX_DATE_FORMAT = 100
MAX_REASON = 300
_NOT_ASCII = re.compile(f"[^\x00-\x7f{MARK}]")


class TemplateError(Exception):
    """A template that cannot be rendered. `code` is stable; the message is for people and bounded.

    chat_template_invalid: it is no template. chat_template_refused: it raised an exception of its own on this
    conversation. chat_template_failed: it broke, or was stopped.
    """

    def __init__(self, code: str, message: str) -> None:
        printable = "".join(character for character in message if character.isprintable() or character == " ")
        super().__init__(printable[:MAX_REASON])
        self.code = code


class _Raised(Exception):
    """raise_exception, called by a template."""


class _Generation(Extension):
    """{% generation %}: marks what the assistant said, for training; here its body alone matters."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, and bounds on the operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_power(left, right)
        elif operator == "*":
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_POWER_BITS:
        raise SecurityError("a power is too large")


def _check_product(left: Any, right: Any) -> None:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | bytes | list | tuple) and isinstance(times, int) and len(many) * times > MAX_PRODUCT:
            raise SecurityError("a repetition is too long")


def _raise_exception(message: object = "") -> NoReturn:
    raise _Raised(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    if indent is not None and not 0 <= indent <= MAX_INDENT:
        raise SecurityError(f"tojson indents by {MAX_INDENT} at most")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text


def _environment() -> Sandbox:
    made = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], autoescape=False
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    del made.globals["lipsum"]
    return made


_ENVIRONMENT = _environment()


@dataclass(frozen=True, slots=True)
class Compiled:
    """A template, and the words that it knows: string literals of its expressions, names of the fields it reads."""

    template: jinja2.Template
    literals: frozenset[str]
    fields: frozenset[str]


@lru_cache(maxsize=32)
def compiled(source: str) -> Compiled:
    """Raises TemplateError."""
    if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
        raise TemplateError("chat_template_invalid", f"It is over {MAX_TEMPLATE_BYTES >> 10} KiB.")
    try:
        tree = _ENVIRONMENT.parse(source)
        template = _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError("chat_template_invalid", f"Line {error.lineno}: {error.message}") from error
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
        raise TemplateError("chat_template_invalid", f"It cannot be compiled ({type(error).__name__}).") from error
    literals = frozenset(each.value for each in tree.find_all(nodes.Const) if isinstance(each.value, str))
    return Compiled(template, literals, frozenset(each.attr for each in tree.find_all(nodes.Getattr)))


def clock(now: datetime) -> Callable[[str], str]:
    """strftime_now, at that moment."""

    def strftime_now(format: str) -> str:
        if len(format) > MAX_DATE_FORMAT:
            raise SecurityError("the format of a date is too long")
        return now.strftime(format)

    return strftime_now


def render(template: Compiled, variables: Mapping[str, Any]) -> str:
    """The template's text, marks included. Raises TemplateError."""
    pieces, length = [], 0
    try:
        for piece in template.template.generate(**variables):
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                raise SecurityError(f"it writes more than {MAX_OUTPUT_CHARACTERS} characters")
            pieces.append(piece)
    except _Raised as error:
        raise TemplateError("chat_template_refused", str(error).replace(MARK, "")) from error
    except MemoryError as error:
        raise TemplateError("chat_template_failed", "it uses more memory than a template may") from error
    except Exception as error:  # a stranger's program: it may raise anything
        raise TemplateError("chat_template_failed", f"{type(error).__name__}: {error}".replace(MARK, "")) from error
    return "".join(pieces)
