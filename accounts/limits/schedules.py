"""Limits for a time: which rules are in force at a moment, and when that changes next. Pure; all times are UTC.

identity/key_rows.py reads the rows (LimitRule) with a key and asks here; no clock is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

MAX_LAST_DAYS = 28
MAX_RULES = 200
"""Of one key with its tenant and plan: those that were made last."""
DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One limit has another value, for a time."""

    id: int
    level: str
    """plan, tenant or key"""
    limit: str
    value: int | None
    starts_at: datetime
    ends_at: datetime | None = None
    daily: tuple[time, time] | None = None
    """From and until; until before from is on the next day."""
    last_days: int | None = None

    def is_in_force(self, now: datetime) -> bool:
        now = now.astimezone(UTC)
        if now < self.starts_at or (self.ends_at is not None and now >= self.ends_at):
            return False
        if self.last_days is not None:
            return (now + self.last_days * DAY).month != now.month
        if self.daily is None:
            return True
        start, end = self.daily
        moment = now.time()
        return start <= moment < end if start < end else moment >= start or moment < end

    def next_change(self, now: datetime) -> datetime | None:
        """The first moment after `now` at which `is_in_force` may answer otherwise; None: it never will."""
        now = now.astimezone(UTC)
        if now < self.starts_at:
            return self.starts_at
        if self.ends_at is not None and now >= self.ends_at:
            return None
        moments = [self.ends_at] if self.ends_at is not None else []
        midnight = datetime(now.year, now.month, now.day, tzinfo=UTC)
        if self.last_days is not None:
            moments.append(midnight + DAY)
        elif self.daily is not None:
            hours = [datetime.combine(midnight.date(), each, UTC) for each in self.daily]
            moments += [hour if hour > now else hour + DAY for hour in hours]
        return min(moments, default=None)


def in_force(rules: Sequence[Rule], level: str, now: datetime) -> dict[str, int | None]:
    """Limit → value of a level's rules at this moment; of several for one limit the one that was made last."""
    found = (rule for rule in sorted(rules, key=lambda rule: rule.id) if rule.level == level and rule.is_in_force(now))
    return {rule.limit: rule.value for rule in found}


def next_change(rules: Iterable[Rule], now: datetime) -> datetime | None:
    moments = [moment for rule in rules if (moment := rule.next_change(now)) is not None]
    return min(moments, default=None)
