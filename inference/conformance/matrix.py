"""Runs the checks of the dialects, one after the other, and says how each ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from inference.conformance import anthropic, llamacpp, native, openai
from inference.conformance.target import Check, Skipped, Target, Unmet, Unreachable

DIALECTS = {
    "native": native.CHECKS,
    "openai": openai.CHECKS,
    "anthropic": anthropic.CHECKS,
    "llamacpp": llamacpp.CHECKS,
}


@dataclass(frozen=True, slots=True)
class Result:
    """outcome: passed, failed or skipped."""

    dialect: str
    name: str
    outcome: str
    seen: str
    seconds: float


def chosen(dialects: Iterable[str]) -> list[Check]:
    return [check for name in dialects for check in DIALECTS[name]]


def run(target: Target, checks: Iterable[Check], say: Callable[[Check], None] = lambda check: None) -> list[Result]:
    """Raises Unreachable where the server answers nothing at all; later it is a check that failed."""
    target.get("/healthz")
    found = []
    for check in checks:
        say(check)
        began = time.monotonic()
        outcome, seen = _run(check, target)
        found.append(Result(check.dialect, check.name, outcome, seen, round(time.monotonic() - began, 3)))
    return found


def _run(check: Check, target: Target) -> tuple[str, str]:
    try:
        check.run(target)
    except Skipped as skipped:
        return "skipped", str(skipped)
    except (Unmet, Unreachable) as unmet:
        return "failed", str(unmet)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # the answer has another form
        return "failed", f"an answer of another form: {type(error).__name__} {error}"[:200]
    return "passed", ""
