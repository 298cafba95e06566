"""Idempotency, resume and background on PostgreSQL and Redis: the same tests again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_keys_and_streams_hold_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/inference/test_holding.py",
        "tests/inference/api/test_idempotency.py",
        "tests/inference/api/test_resuming.py",
    )
