"""Constrained output as pure text: GBNF grammars checked before llama.cpp sees them, or made from JSON Schema.

Standard library only, no clock and no thread: the web process calls it at the door, tests call it directly. What runs
a grammar (the sampler, its dry run in a child process) lives in the engine and must not come here.
"""

from inference.structured.gbnf import GENERATED_LIMITS, REQUEST_LIMITS, GrammarError, Limits, validate
from inference.structured.json_schema import (
    Compiled,
    Options,
    SchemaError,
    compile_fitting,
    compile_schema,
    compile_within,
    json_object_grammar,
    max_length,
    to_grammar,
)
from inference.structured.tool_calls import TOOL_CALL_FORMATS, compile_tool_calls, fit_tool_calls, tool_call_grammar

__all__ = [
    "GENERATED_LIMITS",
    "REQUEST_LIMITS",
    "TOOL_CALL_FORMATS",
    "Compiled",
    "GrammarError",
    "Limits",
    "Options",
    "SchemaError",
    "compile_fitting",
    "compile_schema",
    "compile_tool_calls",
    "compile_within",
    "fit_tool_calls",
    "json_object_grammar",
    "max_length",
    "to_grammar",
    "tool_call_grammar",
    "validate",
]
