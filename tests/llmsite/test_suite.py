"""The suite's own ground: what conftest promises to the other tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.__main__ import MOST_FAILURES, without_group
from tests.conftest import OUTER_DATABASE_URL, OUTER_REDIS_URL, REPOSITORY, STATE_DIR, VALKEY
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


UNSTEADY = """
import pathlib

def test_that_fails_the_first_time():
    mark = pathlib.Path(__file__).with_suffix(".ran")
    has_run = mark.exists()
    mark.touch()
    assert has_run

def test_beside_it():
    pass
"""


def run_suite(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """`python -m tests` on one file of tests, outside the repository: without its options and fixtures."""
    (folder / "test_given.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    command = [sys.executable, "-m", "tests", str(folder), "--rootdir", str(folder), "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


def test_what_fails_beside_others_is_run_once_more_and_named(tmp_path: Path) -> None:
    run = run_suite(tmp_path, UNSTEADY)
    first, _, second = run.stdout.partition("run once more, alone:")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 failed, 1 passed" in first
    assert second.split()[0] == "test_given.py::test_that_fails_the_first_time"
    assert "1 passed" in second


def test_what_fails_alone_too_fails_the_run(tmp_path: Path) -> None:
    run = run_suite(tmp_path, "def test_wrong():\n    assert False\n")
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert run.stdout.count("1 failed") == 2


def test_many_that_fail_are_not_run_again(tmp_path: Path) -> None:
    many = UNSTEADY + "".join(f"def test_{number}():\n    assert False\n" for number in range(MOST_FAILURES))
    run = run_suite(tmp_path, many)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "run once more" not in run.stdout


def test_a_suite_that_cannot_run_fails(tmp_path: Path) -> None:
    assert run_suite(tmp_path, "import no_such_module\n").returncode == pytest.ExitCode.INTERRUPTED


def test_names_of_tests_lose_their_group_alone() -> None:
    assert without_group("tests/a.py::test_one[a@b]@llama_site") == "tests/a.py::test_one[a@b]"
    assert without_group("tests/a.py::test_one[a@b]") == "tests/a.py::test_one[a@b]"
