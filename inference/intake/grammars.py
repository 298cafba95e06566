"""From what a request says of its answer's form to one grammar that the engine gets, or a refusal with the place.

The request's clock. `grammar_from` is for every dialect's schema parsing or order: pure, some milliseconds, remembered.
What llama.cpp itself says to a grammar on a model's vocabulary is asked at admission (`verdicts`), in a child process.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import orjson

from accounts.trail.refusals import Refusal
from inference.structured import GrammarError, JsonForm, SchemaError, validate, widest
from inference.tokenizers.pool import HasVocabulary, TokenizerPool, grammar_pool

MAX_VERDICTS = 4096
BAD_SECONDS = 600.0
"""A grammar that was refused is tried again after this: the machine may only have been busy."""


def grammar_from(grammar: str | None, json_schema: dict[str, Any] | None) -> str | None:
    """What SamplingParams.grammar is to be: GBNF, or None where the request wants no form. At most one may be given.

    grammar: GBNF of the client; "" is none, as in llama.cpp. json_schema: a JSON Schema; {} is any JSON value. Its
    grammar is the widest: admission knows how long the answer may be, and narrows it (form_from, forms.py).
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


def form_from(json_schema: dict[str, Any] | None) -> JsonForm | None:
    """For GenerateOrder.form, of a schema that grammar_from has taken."""
    return None if json_schema is None else JsonForm(orjson.dumps(json_schema))


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
        form = JsonForm(orjson.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise _schema_refusal("invalid", "", "the schema holds what JSON cannot") from error
    try:
        return widest(form).grammar
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


# What llama.cpp says to it


class Verdicts:
    """What was found of grammars on vocabularies, so that none is tried twice in a row. Bounded; any thread.

    A grammar that took too long or ended the child that tried it is not given to another child for BAD_SECONDS.
    """

    def __init__(self, pool: Callable[[], TokenizerPool], clock: Callable[[], float] = time.monotonic) -> None:
        self._pool, self._clock = pool, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, tuple[str, float]] = OrderedDict()

    def check(self, model: HasVocabulary, grammar: str) -> None:
        """Blocking: a child may have to try it. Raises Refusal "invalid_grammar", or what the pool raises."""
        key = hashlib.sha256(f"{model.digest} {grammar}".encode()).digest()
        problem = self._recall(key)
        if problem is None:
            problem = self._try(model, grammar)
            self._note(key, problem)
        if problem:
            raise Refusal("invalid_grammar", f"The grammar cannot be used: {problem}.", reason="refused_by_model")

    def _try(self, model: HasVocabulary, grammar: str) -> str:
        """What is wrong with it, "" where nothing is."""
        try:
            self._pool().ask(model, {"op": "grammar", "grammar": grammar})
        except Refusal as refusal:
            if refusal.code != "tokenizer_failed":
                raise
            was_answered = "reason" in refusal.extra
            return refusal.message if was_answered else "following it takes too long, or too much memory"
        return ""

    def _recall(self, key: bytes) -> str | None:
        with self._lock:
            problem, noted_at = self._known.get(key, (None, 0.0))
            if problem is None or (problem and self._clock() - noted_at > BAD_SECONDS):
                return None
            self._known.move_to_end(key)
            return problem

    def _note(self, key: bytes, problem: str) -> None:
        with self._lock:
            self._known[key] = problem, self._clock()
            self._known.move_to_end(key)
            while len(self._known) > MAX_VERDICTS:
                self._known.popitem(last=False)


@lru_cache(maxsize=1)
def verdicts() -> Verdicts:
    """Those of this process."""
    return Verdicts(grammar_pool)
