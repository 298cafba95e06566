"""What `--help` says behind the options: examples, and what the exit statuses mean.

Standard library only: `manage.py up` imports it, which must stay small.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

OK, FAILED, DIFFERS, USAGE, INTERRUPTED, UNREAD = 0, 1, 2, 64, 130, 141
"""Exit statuses. USAGE is sysexits.h's EX_USAGE, so that a typing error never looks like a difference; INTERRUPTED and
UNREAD are what shells have for Ctrl-C and for a pipe that nobody reads any more."""
STATUSES: Mapping[int, str] = {
    OK: "done",
    FAILED: "refused or failed; standard error says why",
    USAGE: "words that were not understood",
    INTERRUPTED: "interrupted",
}


def parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """For those who parse before Django is there. argparse's own status for what it does not understand is 2."""
    try:
        return parser.parse_args(words)
    except SystemExit as end:
        raise SystemExit(USAGE if end.code == DIFFERS else end.code) from None


def epilog(examples: Sequence[str], statuses: Mapping[int, str] | None = None, more: str = "") -> str:
    """statuses: what differs from the usual ones, or comes to them."""
    lines = ["examples:", *(f"  python manage.py {example}" for example in examples), "", "exit statuses:"]
    lines += [f"  {number:<4}{meaning}" for number, meaning in sorted({**STATUSES, **(statuses or {})}.items())]
    return "\n".join([*lines, *(["", more] if more else [])])
