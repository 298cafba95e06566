"""PostgreSQL that lets go of everybody, again and again, under load: nothing is lost or charged twice (R6)."""

from __future__ import annotations

import time
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.conftest import manage, running_site
from tests.llmsite.test_supervisor import wait_until
from tests.mixed_load import MixedLoad
from tests.real.test_chaos_real import CLIENTS, EVERY_SECONDS, SECONDS, is_ready, wait_for_ends

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow]

CUT = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()"


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_connections_that_are_cut_lose_nothing_and_charge_nothing_twice(tmp_path: Path, own_database: str) -> None:
    name = urlsplit(own_database).path.lstrip("/")
    with running_site(tmp_path / "state", DATABASE_URL=own_database) as site:
        load = MixedLoad(site.base_url, [site.key, site.other_key], CLIENTS)
        began, num_cut = time.monotonic(), []
        load.start()
        try:
            while time.monotonic() - began < SECONDS:
                time.sleep(EVERY_SECONDS / 2)
                with psycopg.connect(own_database, autocommit=True) as connection:
                    (number,) = connection.execute(CUT, [name]).fetchone() or (0,)
                num_cut.append(number)
        finally:
            load.stop(150.0)
        wait_until(lambda: is_ready(site), seconds=60)
        print(f"{num_cut} connections cut; {len(load.accepted)} requests; {dict(load.outcomes)}")
        assert sum(num_cut) > 0 and not load.wrong, "\n".join(load.wrong)
        assert any(outcome.endswith((" 200", " whole")) for outcome in load.outcomes), load.outcomes
        states = wait_for_ends(site, load.accepted)
        lost = {request_id for request_id, state in states.items() if state in ("waiting", "running", "404")}
        assert not lost, f"{len(lost)} of {len(states)} requests have no end: {sorted(lost)[:5]}"
        proof = manage(site, "audit_ledger")
        assert proof["clean"], proof
        with psycopg.connect(own_database) as connection:
            (num_open,) = connection.execute("select sum(reserved_tokens) from accounts_quotaperiod").fetchone() or (
                -1,
            )
        assert num_open == 0
