"""Which quotas need a second operator: numbers and the installation's threshold, QUOTA_APPROVAL_TOKENS. No rows.

Plan, Tenant and LimitRule ask before they are saved, so every way to a higher quota goes by here: console, operator's
API, commands, files. Asking for a raise and approving it is raises.py's.
"""

from __future__ import annotations

from django.conf import settings
from django.core.exceptions import ValidationError

LIMIT = "monthly_tokens"


class RaiseError(ValidationError):
    """What was asked of a raise cannot be done; its message says why."""


def is_above(tokens: int | None) -> bool:
    """Whether so many tokens a month need a second operator; None is unlimited. Never while the threshold is 0."""
    threshold: int = settings.CONFIG.quota_approval_tokens
    return threshold > 0 and (tokens is None or tokens > threshold)


def check(wanted: int | None, had: int | None) -> None:
    """Raises RaiseError where going from `had` to `wanted` tokens a month would need a second operator."""
    if not is_above(wanted) or not _is_more(wanted, had):
        return
    threshold = f"{settings.CONFIG.quota_approval_tokens:,}"
    raise RaiseError(
        f"More than {threshold} tokens a month need a second operator: ask for it with a quota raise of a tenant "
        "(console, manage.py quota_raise, POST /v1/admin/quota-raises), which another one approves.",
        code="approval_required",
    )


def _is_more(wanted: int | None, had: int | None) -> bool:
    return had is not None and (wanted is None or wanted > had)
