"""Fair share, batches, responses, roles and limits on PostgreSQL and Redis: the same tests again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_fair_share_holds_on_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/inference/test_fair_share.py", "tests/inference/test_fair_flow.py")


def test_batches_hold_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/inference/api/test_batches.py",
        "tests/inference/test_batch_redelivery.py",
        "tests/inference/test_batch_operators.py",
    )


def test_responses_hold_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/inference/api/test_responses.py", "tests/inference/api/test_response_output.py")


def test_roles_hold_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services("tests/accounts/test_roles.py")


def test_rates_and_the_audit_log_hold_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/accounts/test_audit_log.py", "tests/accounts/test_throttling.py", "tests/inference/test_admin.py"
    )


def test_tickets_are_settled_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/inference/test_settlement.py", "tests/inference/test_admission.py", "tests/inference/test_reaper.py"
    )


def test_several_answers_and_raises_hold_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    run_on_services(
        "tests/inference/api/test_several_answers.py", "tests/inference/test_queue.py", "tests/accounts/test_raises.py"
    )
