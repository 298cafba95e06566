"""The one check a grammar passes before llama.cpp sees it.

`validate` refuses what llama.cpp refuses and what kills or hangs it. Nothing here knows a vocabulary, so `<think>` is
checked for form only. Called at the door for a request's grammar, and on every grammar that this package makes.
"""

from __future__ import annotations

from inference.structured.gbnf_expansion import check
from inference.structured.gbnf_parser import parse
from inference.structured.gbnf_tree import GENERATED_LIMITS, REQUEST_LIMITS, Grammar, GrammarError, Limits

__all__ = ["GENERATED_LIMITS", "REQUEST_LIMITS", "Grammar", "GrammarError", "Limits", "parse", "validate"]


def validate(grammar: str, limits: Limits = REQUEST_LIMITS) -> None:
    """Refuse a grammar that llama.cpp would refuse, or that could kill or stall the process that runs it.

    Raises GrammarError: too_large, too_deep, syntax, duplicate_rule, undefined_rule, no_root, repetition,
    left_recursion, never_ends, too_ambiguous. Takes time linear in the limits, some ten milliseconds at most.
    """
    check(parse(grammar, limits), limits)
