"""Money on PostgreSQL: the same tests again, and two processes that contend for one quota."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_quotas_hold_on_postgresql(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/accounts/test_quotas.py", "tests/accounts/test_quota_races.py")


def test_accounts_work_on_postgresql(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/accounts/test_audit.py",
        "tests/accounts/test_usage.py",
        "tests/accounts/test_commands.py",
        "tests/accounts/test_issuing.py",
        "tests/accounts/test_authentication.py",
    )


def test_days_prices_and_limits_for_a_time_hold_on_postgresql(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/accounts/test_days.py",
        "tests/accounts/test_prices.py",
        "tests/accounts/test_limit_rules.py",
        "tests/accounts/test_many_keys.py",
        "tests/inference/test_housekeeping.py",
        "tests/inference/api/test_usage_api.py",
    )


def test_two_processes_share_a_quota_on_postgresql(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/accounts/test_quota_processes.py")
