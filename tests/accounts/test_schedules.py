"""When a limit has another value: pure arithmetic."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounts.limits.schedules import Rule, in_force, next_change

pytestmark = pytest.mark.unit

NIGHT = (time(22), time(6))


def rule(number: int = 1, **changes: Any) -> Rule:
    values: dict[str, Any] = {
        "level": "tenant",
        "limit": "tokens_per_minute",
        "value": 100,
        "starts_at": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Rule(id=number, **{**values, **changes})


def at(day: int, hour: int = 12, month: int = 11) -> datetime:
    return datetime(2026, month, day, hour, tzinfo=UTC)


def test_a_raise_ends_on_its_day() -> None:
    raised = rule(starts_at=at(3), ends_at=at(5))
    assert [raised.is_in_force(at(day)) for day in (2, 3, 4, 5)] == [False, True, True, False]
    assert (raised.next_change(at(2)), raised.next_change(at(3)), raised.next_change(at(5))) == (at(3), at(5), None)


def test_a_night_goes_over_midnight() -> None:
    night = rule(daily=NIGHT)
    assert [night.is_in_force(at(4, hour)) for hour in (5, 6, 21, 22, 0)] == [True, False, False, True, True]
    assert night.next_change(at(4, 23)) == at(5, 6)
    assert night.next_change(at(4, 6)) == at(4, 22)


@pytest.mark.parametrize(("month", "first"), [(2, 26), (4, 28), (11, 28), (12, 29)])
def test_the_last_days_of_a_month_are_its_last_days(month: int, first: int) -> None:
    end = rule(last_days=3)
    assert not end.is_in_force(at(first - 1, month=month))
    assert end.is_in_force(at(first, month=month))
    assert not end.is_in_force(at(1, month=month % 12 + 1)) or month == 1


def test_of_overlapping_rules_the_one_that_was_made_last_counts() -> None:
    rules = [rule(7, value=None), rule(9, value=5), rule(8, value=10**6), rule(10, value=1, level="key")]
    assert in_force(rules, "tenant", at(3)) == {"tokens_per_minute": 5}
    assert in_force(rules, "key", at(3)) == {"tokens_per_minute": 1}
    ended = [rule(7, value=50), rule(9, value=5, ends_at=at(2))]
    assert in_force(ended, "tenant", at(3)) == {"tokens_per_minute": 50}


NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
MOMENTS = st.integers(0, 730 * 24 * 60).map(lambda minutes: NEW_YEAR + timedelta(minutes=minutes))
HOURS = st.times().map(lambda moment: moment.replace(second=0, microsecond=0))


@given(
    now=MOMENTS,
    later=MOMENTS,
    daily=st.none() | st.tuples(HOURS, HOURS).filter(lambda pair: pair[0] != pair[1]),
    last_days=st.none() | st.integers(1, 28),
    ends_at=st.none() | MOMENTS,
)
def test_nothing_changes_before_the_next_change(now: Any, later: Any, daily: Any, last_days: Any, ends_at: Any) -> None:
    rules = [rule(daily=daily), rule(2, last_days=last_days, ends_at=ends_at)]
    change = next_change(rules, now)
    assert change is None or change > now
    if later > now and (change is None or later < change):
        assert [each.is_in_force(now) for each in rules] == [each.is_in_force(later) for each in rules]
