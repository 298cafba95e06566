"""Months that begin on an anchor day, and what happens when a period ends early."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.ledger.periods import calendar_period, next_period

pytestmark = pytest.mark.unit


def utc(year: int, month: int, day: int, hour: int = 0) -> datetime:
    return datetime(year, month, day, hour, tzinfo=UTC)


@pytest.mark.parametrize(
    ("anchor_day", "now", "start", "end"),
    [
        (1, utc(2026, 11, 21), utc(2026, 11, 1), utc(2026, 12, 1)),
        (1, utc(2026, 12, 1), utc(2026, 12, 1), utc(2027, 1, 1)),
        (15, utc(2026, 1, 14, 23), utc(2025, 12, 15), utc(2026, 1, 15)),
        (28, utc(2028, 2, 29), utc(2028, 2, 28), utc(2028, 3, 28)),
    ],
)
def test_a_month_begins_on_the_anchor_day(anchor_day: int, now: datetime, start: datetime, end: datetime) -> None:
    assert calendar_period(anchor_day, now) == (start, end)


def test_periods_are_in_utc_wherever_the_clock_is() -> None:
    east = datetime(2026, 12, 1, 0, 30, tzinfo=timezone(timedelta(hours=2)))
    assert calendar_period(1, east) == (utc(2026, 11, 1), utc(2026, 12, 1))


@pytest.mark.parametrize("day", [0, 29, 31])
def test_a_day_that_some_months_lack_is_refused(day: int) -> None:
    with pytest.raises(ValueError, match="every month"):
        calendar_period(day, utc(2026, 1, 1))


moments = st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@given(st.integers(1, 28), moments)
def test_every_moment_is_in_one_period_and_periods_touch(anchor_day: int, now: datetime) -> None:
    start, end = calendar_period(anchor_day, now)
    assert start <= now < end
    assert start.day == end.day == anchor_day
    assert calendar_period(anchor_day, end)[0] == end
    assert timedelta(days=28) <= end - start <= timedelta(days=31)


def test_a_period_that_was_ended_early_is_followed_by_a_short_one() -> None:
    ended = utc(2026, 11, 10)
    assert next_period(1, utc(2026, 11, 21), ended) == (ended, utc(2026, 12, 1))


def test_a_period_long_ago_does_not_stretch_the_next() -> None:
    assert next_period(1, utc(2026, 11, 21), utc(2026, 5, 1)) == (utc(2026, 11, 1), utc(2026, 12, 1))
    assert next_period(1, utc(2026, 11, 21), None) == (utc(2026, 11, 1), utc(2026, 12, 1))


def test_an_end_in_the_future_does_not_count() -> None:
    assert next_period(1, utc(2026, 11, 21), utc(2026, 11, 25)) == (utc(2026, 11, 1), utc(2026, 12, 1))
