"""What was said is where docs/privacy.md says, with PostgreSQL and Redis in the place of the embedded stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import canary_search, stores

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow]


def test_what_was_said_is_where_the_table_says_on_postgresql_and_redis(
    postgresql_url: str, redis_server_url: str, tmp_path: Path
) -> None:
    canary_search.run(
        tmp_path / "state",
        lambda: stores.postgresql_rows(postgresql_url),
        DATABASE_URL=postgresql_url,
        REDIS_URL=redis_server_url,
    )
