"""Leases, fair share, revocations, cut streams and restarts on PostgreSQL and Redis: the same tests again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Site, running_site
from tests.real.test_parking_real import compare_with_a_flood, revoke_while_it_runs

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_whoever_lost_a_lease_changes_nothing_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    """R9; and R7, R10: workers that are killed, and told to stop."""
    run_on_services(
        "tests/inference/test_worker_process.py",
        "tests/inference/test_stream.py::test_whoever_lost_the_lease_writes_nothing",
        "tests/inference/test_worker.py::test_a_worker_that_falls_silent_is_reaped_and_its_words_count_no_more",
    )


def test_what_is_revoked_or_cut_ends_on_postgresql_and_redis(run_on_services: Callable[..., None]) -> None:
    """R16, R3, R24."""
    run_on_services(
        "tests/inference/test_worker.py::test_revoking_ends_all_that_a_key_has_waiting_or_running",
        "tests/inference/test_worker.py::test_cancelling_a_running_request_frees_its_slot_and_charges_what_was_computed",
        "tests/inference/test_entitlements.py",
        "tests/test_auth_rate_quota.py::test_a_revoked_key_ends_what_it_has_running",
        "tests/test_integrate_generate.py::test_a_closed_connection_frees_its_slot",
        "tests/test_integrate_generate.py::test_streams_that_are_cut_anywhere_pay_what_the_engine_computed_and_leave_nothing",
        "tests/test_integrate_generate.py::test_redis_down_is_a_503_and_charges_nothing",
    )


def test_a_restart_of_redis_loses_nothing_on_postgresql(run_on_services: Callable[..., None]) -> None:
    """R8."""
    run_on_services("tests/inference/test_redis_restart.py")


@pytest.fixture(scope="module")
def site(own_database: str, redis_server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    state = tmp_path_factory.mktemp("services") / "state"
    with running_site(state, DATABASE_URL=own_database, REDIS_URL=redis_server_url) as site:
        yield site


@pytest.mark.model
def test_a_tenant_beside_a_flood_is_served_on_postgresql_and_redis(site: Site) -> None:
    """R15."""
    compare_with_a_flood(site)


@pytest.mark.model
def test_a_command_revokes_what_runs_on_postgresql_and_redis(site: Site) -> None:
    """R16."""
    revoke_while_it_runs(site)
