"""From what a request says of its answer's form to one grammar that the engine gets, or a refusal with the place.

The request's clock. `grammar_from` is for every dialect's schema parsing or order: pure, some milliseconds, remembered.
What llama.cpp itself says to a grammar on a model's vocabulary is asked at admission (`dry_run`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import orjson

from accounts.refusals import Refusal
from inference.structured import GrammarError, SchemaError, to_grammar, validate


def grammar_from(grammar: str | None, json_schema: dict[str, Any] | None) -> str | None:
    """What SamplingParams.grammar is to be: GBNF, or None where the request wants no form. At most one may be given.

    grammar: GBNF of the client; "" is none, as in llama.cpp. json_schema: a JSON Schema; {} is any JSON value.
    Raises Refusal "invalid_grammar" (extra: field, reason, line, column) or "invalid_schema" (extra: field, reason,
    path: a JSON pointer into the schema), both 400. What it returns is within the bounds of inference/structured.
    """
    if grammar and json_schema is not None:
        raise Refusal(
            "invalid_grammar",
            "Field 'json_schema': give either a grammar or a json_schema, not both.",
            field="json_schema",
            reason="both_given",
        )
    if json_schema is not None:
        return _compiled(json_schema)
    return _checked(grammar) if grammar else None


def _checked(grammar: str) -> str:
    try:
        _validate(grammar)
    except GrammarError as error:
        raise Refusal(
            "invalid_grammar",
            f"Field 'grammar': {error}.",
            field="grammar",
            reason=error.code,
            line=error.line,
            column=error.column,
        ) from error
    return grammar


def _compiled(schema: dict[str, Any]) -> str:
    try:
        key = orjson.dumps(schema)  # in the order of its properties, which the answer's follow
    except (TypeError, ValueError, RecursionError) as error:
        raise _schema_refusal("invalid", "", "the schema holds what JSON cannot") from error
    try:
        return _compile(key)
    except SchemaError as error:
        raise _schema_refusal(error.code, error.pointer, error.message) from error


def _schema_refusal(reason: str, pointer: str, message: str) -> Refusal:
    place = pointer or "the root"
    return Refusal(
        "invalid_schema",
        f"Field 'json_schema': at {place[:200]}: {message[:500]}.",
        field="json_schema",
        reason=reason,
        path=pointer[:200],
    )


@lru_cache(maxsize=256)
def _validate(grammar: str) -> None:
    """Remembered where it is right."""
    validate(grammar)


@lru_cache(maxsize=64)
def _compile(schema: bytes) -> str:
    return to_grammar(orjson.loads(schema))
