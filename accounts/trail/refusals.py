"""One exception for everything that is refused before a token is computed.

It carries what a caller decides on: a stable code, whether to try again, and when. HTTP statuses are not known here:
each dialect has its own table (inference/api/errors.py).
"""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that was not taken; nothing is held or charged for it.

    code: stable, snake_case. retry_after: seconds after which the same request may pass, None if it never will.
    extra: JSON-able facts for the client: the limit that bound, its value, when it frees.
    """

    def __init__(self, code: str, message: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        self.extra = extra

    @property
    def retryable(self) -> bool:
        return self.retry_after is not None
