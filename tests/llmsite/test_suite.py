"""The suite's own ground: what conftest promises to the other tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OUTER_DATABASE_URL, OUTER_REDIS_URL, STATE_DIR, VALKEY
from tests.emptying import empty
from tests.timing import MOST_BUSY, Stopwatch

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


@pytest.mark.django_db(transaction=True)
def test_what_a_test_committed_goes_and_what_the_migrations_made_stays() -> None:
    from django.contrib.auth.models import Permission

    from accounts.models import Plan, Tenant

    made = Permission.objects.count()
    Tenant.objects.create(name="Alice's", plan=Plan.objects.create(name="cast"))
    empty("default")
    assert not Tenant.objects.exists()
    assert not Plan.objects.exists()
    assert Permission.objects.count() == made > 0


def test_a_stopwatch_takes_off_what_the_machine_was_busy_with_and_no_more() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not count what threads wait for")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # on the same processor
    try:
        began, watch = time.monotonic(), Stopwatch()
        while time.monotonic() - began < 0.5:
            pass
        seconds, passed = watch.seconds(), time.monotonic() - began
    finally:
        os.sched_setaffinity(0, before)
        busy.kill()
        busy.wait()
    assert passed / MOST_BUSY * 0.9 < seconds < 0.8 * passed
