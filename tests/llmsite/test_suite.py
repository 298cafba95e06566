"""The suite's own ground: what conftest promises to the other tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OUTER_DATABASE_URL, OUTER_REDIS_URL, STATE_DIR, VALKEY

pytestmark = pytest.mark.integration


def test_the_suite_has_a_valkey_of_its_own(valkey: Any) -> None:
    valkey.set("a", "b")
    assert valkey.get("a") == b"b"
    assert valkey.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_nothing_is_left_from_the_test_before(valkey_connection: Any) -> None:
    assert valkey_connection.dbsize() == 0


def test_settings_are_those_of_this_test_process_or_of_the_services_it_was_given(db: None) -> None:
    from django.conf import settings
    from django.db import connection

    assert settings.CONFIG.state == STATE_DIR
    assert (OUTER_REDIS_URL or f"unix://{VALKEY.socket}") == settings.REDIS_URL
    assert connection.vendor == ("postgresql" if OUTER_DATABASE_URL else "sqlite")


def test_sqlite_in_tests_is_a_file_in_write_ahead_mode(db: None) -> None:
    from django.db import connection

    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA journal_mode")
            assert cursor.fetchone() == ("wal",)


def test_the_demo_model_is_there(model_path: Path) -> None:
    with model_path.open("rb") as file:
        assert file.read(4) == b"GGUF"
