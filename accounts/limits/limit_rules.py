"""Writing limits for a time, checked. Called by commands, the console, the API; the row announces itself."""

from __future__ import annotations

from accounts.models import LimitRule


def save(rule: LimitRule) -> None:
    """Raises ValidationError. In force everywhere within a second of its beginning."""
    rule.full_clean()
    rule.save()
