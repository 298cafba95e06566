"""Words that nobody else says, in every dialect, of a tenant that is erased afterwards: nothing of them is left."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests import stores
from tests.canary_search import Search, say_all
from tests.conftest import running_site
from tests.in_process import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow]
BOBS = "response of bob"
NOT_HERS = re.compile(f"{BOBS}|plain response")
"""What Bob has said: the stream of his first response may be there still."""


def test_nothing_of_an_erased_tenant_is_in_database_redis_and_state_folder(tmp_path: Path) -> None:
    state = tmp_path / "state"

    def left(search: Search) -> set[str]:
        with search.redis() as client:
            wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"], 20.0)
            places = (stores.sqlite_rows(state / "db.sqlite3"), stores.redis_values(client), stores.files(state))
            return set(search.in_pieces(*places))

    with running_site(state) as site:
        search = Search(site, lambda: stores.sqlite_rows(state / "db.sqlite3"), {})
        alice, bob = (tenant["name"] for tenant in site.demo["tenants"])
        caller = say_all(search)[1]
        search.manage("stored_responses", "--tenant", bob, "--days", "1")
        caller.responses(BOBS)
        named = search.canaries.mint("label", "name of the tenant")
        search.manage("tenant", "change", alice, "--new-name", named)
        time.sleep(2.0)  # refusals are written after a second, and what ended is settled
        assert len(left(search)) > 20, "there is something to erase"
        told = search.manage("erase_tenant", named, "--yes", "--now")
        assert told["problems"] == [] and told["counts"]["inference.storedresponse"] == 1
        rest = left(search)
        assert {name for name in rest if not NOT_HERS.search(name)} == set()
        assert rest, "the other tenant's is there"
        search.manage("erase_tenant", bob, "--yes", "--now")
        assert left(search) == set()
    found = search.in_pieces(stores.files(state))
    assert found == {}, "also once all processes have written what they write at the end"
