"""Which stretch of time a quota counts in. Pure date arithmetic in UTC; called by quotas.py.

A period runs from the tenant's anchor day (1 to 28) at midnight to the same day of the next month. The anchor day only
shapes periods that do not exist yet: rows, once written, stand.
"""

from __future__ import annotations

from datetime import UTC, datetime


def calendar_period(anchor_day: int, now: datetime) -> tuple[datetime, datetime]:
    """The month around `now` as (start, end), start <= now < end. Raises ValueError for a day outside 1..28."""
    if not 1 <= anchor_day <= 28:
        raise ValueError(f"anchor day {anchor_day} does not exist in every month")
    now = now.astimezone(UTC)
    anchor = datetime(now.year, now.month, anchor_day, tzinfo=UTC)
    return (anchor, _months_later(anchor, 1)) if anchor <= now else (_months_later(anchor, -1), anchor)


def next_period(anchor_day: int, now: datetime, previous_end: datetime | None) -> tuple[datetime, datetime]:
    """The period to open at `now`, behind the one that ended at `previous_end`.

    It starts where the calendar says, but never inside the previous one: an operator who ends a period early, or moves
    the anchor day, gets a short period and not two at once. A `previous_end` after `now` does not count.
    """
    start, end = calendar_period(anchor_day, now)
    if previous_end is not None and start < previous_end <= now:
        start = previous_end
    return start, end


def _months_later(moment: datetime, months: int) -> datetime:
    index = moment.year * 12 + moment.month - 1 + months
    return moment.replace(year=index // 12, month=index % 12 + 1)
