"""Words that nobody else says, in every dialect: where docs/privacy.md allows them, nowhere else, and gone in time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import canary_search, stores

pytestmark = [pytest.mark.integration, pytest.mark.model, pytest.mark.slow]


def test_what_was_said_is_where_the_table_says_and_goes_in_time(tmp_path: Path) -> None:
    state = tmp_path / "state"
    canary_search.run(state, lambda: stores.sqlite_rows(state / "db.sqlite3"))
