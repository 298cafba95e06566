"""Constrained output as pure text: GBNF grammars checked before llama.cpp sees them, or made from JSON Schema.

Standard library only, no clock and no thread: the web process calls it at the door, tests call it directly. What runs
a grammar (the sampler, its dry run in a child process) lives in the engine and must not come here.
"""

from inference.structured.fitting import (
    CallsForm,
    EitherForm,
    Form,
    JsonForm,
    behind_thoughts,
    fit,
    thought_overhead,
    widest,
)
from inference.structured.gbnf import GENERATED_LIMITS, REQUEST_LIMITS, GrammarError, Limits, validate
from inference.structured.json_schema import Compiled, SchemaError
from inference.structured.tool_calls import TOOL_CALL_FORMATS

__all__ = [
    "GENERATED_LIMITS",
    "REQUEST_LIMITS",
    "TOOL_CALL_FORMATS",
    "CallsForm",
    "Compiled",
    "EitherForm",
    "Form",
    "GrammarError",
    "JsonForm",
    "Limits",
    "SchemaError",
    "behind_thoughts",
    "fit",
    "thought_overhead",
    "validate",
    "widest",
]
