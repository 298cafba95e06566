"""What a plan allows, and how tenant and key narrow or widen it. Pure: no database, no Redis.

None means unlimited and 0 means none at all, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on one tenant or one key."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    concurrent_streams: int | None = None
    """Answers that are streamed at once; they count as requests at once, too."""
    queue_length: int | None = None
    """Requests that may wait for a slot."""
    monthly_tokens: int | None = None
    monthly_requests: int | None = None
    max_context: int | None = None
    """Prompt and output tokens of one request together."""
    max_output: int | None = None

    def overridden(self, overrides: Mapping[str, int | None]) -> Limits:
        """These limits with some replaced: a name that is absent is inherited, None is unlimited, 0 is none.

        Raises ValueError for an unknown name, or a value that is neither None nor a whole number from 0 to MAX_LIMIT.
        """
        validate_overrides(overrides)
        return replace(self, **overrides)


LIMIT_NAMES = tuple(field.name for field in fields(Limits))
MAX_LIMIT = 10**15
NORMAL_WEIGHT = 100
"""Of a plan: percent of a normal share of the slots."""


def validate_overrides(overrides: object) -> None:
    """Raises ValueError with a sentence that names the limit at fault."""
    if not isinstance(overrides, Mapping):
        raise ValueError('limits must be an object such as {"requests_per_minute": 60}')
    for name, value in overrides.items():
        if name not in LIMIT_NAMES:
            raise ValueError(f"unknown limit {name!r}: use one of {', '.join(LIMIT_NAMES)}")
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_LIMIT:
            raise ValueError(f"{name} must be null (unlimited) or a whole number from 0 to {MAX_LIMIT}")


MAX_NAMES = 200
MAX_NAME_LENGTH = 200


def validate_names(value: object) -> None:
    """For lists of allowed models and adapters; None is no list. Raises ValueError with a sentence."""
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError('use a list of names such as ["small"]')
    if len(value) > MAX_NAMES or max(map(len, value), default=0) > MAX_NAME_LENGTH:
        raise ValueError(f"{MAX_NAMES} names of {MAX_NAME_LENGTH} characters are the most")


Allowed = frozenset[str] | None
"""Names that may be used; None is no list of one's own."""


def narrowed(plan: Allowed, tenant: Allowed, key: Allowed) -> Allowed:
    """The tenant's list in the place of its plan's, and of that what the key's list has, too."""
    of_tenant = plan if tenant is None else tenant
    if key is None or of_tenant is None:
        return of_tenant if key is None else key
    return of_tenant & key
