"""The suite's ground, on the servers that a real installation uses."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_the_suite_also_stands_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/llmsite/test_suite.py", "-k", "not valkey_of_its_own")


def test_no_list_asks_postgresql_more_often_among_more_rows(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/llmsite/test_lists.py")
