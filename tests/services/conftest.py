"""PostgreSQL and Redis beside the suite: tests here skip where they do not answer, and fail under REQUIRE_SERVICES=1.

TEST_POSTGRESQL_URL and TEST_REDIS_URL say where; the defaults are the loopback ports. Each test process makes and
drops a database of its own, and takes a Redis database only if it is empty.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

POSTGRESQL_URL = os.environ.get("TEST_POSTGRESQL_URL", "postgres://postgres@127.0.0.1:5432/postgres")
REDIS_URL = os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379")
REPOSITORY = Path(__file__).parent.parent.parent
SECONDS = 400.0
"""For a part of the suite, run again within one test: machines differ by a factor of three."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS + 30))


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """URL of an empty PostgreSQL database of this test process; that and the one of `run_on_services` are dropped."""
    import psycopg

    name = f"llmsite_test_{uuid.uuid4().hex[:12]}"
    try:
        with psycopg.connect(POSTGRESQL_URL, autocommit=True, connect_timeout=2) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
    except psycopg.OperationalError as error:
        pytest.skip(f"no PostgreSQL at {urlsplit(POSTGRESQL_URL).hostname}: {error}")
    yield urlsplit(POSTGRESQL_URL)._replace(path=f"/{name}").geturl()
    with psycopg.connect(POSTGRESQL_URL, autocommit=True) as connection:
        for each in (name, f"test_{name}"):
            connection.execute(f'DROP DATABASE IF EXISTS "{each}" WITH (FORCE)')


@pytest.fixture(scope="module")
def own_database(postgresql_url: str) -> Iterator[str]:
    """URL of a database that a site may have to itself."""
    import psycopg

    name = f"llmsite_site_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield urlsplit(postgresql_url)._replace(path=f"/{name}").geturl()
    with psycopg.connect(postgresql_url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    """URL of an empty Redis database that this test process may flush."""
    import redis

    for number in range(15, 0, -1):
        with (Path(tempfile.gettempdir()) / f"llmsite-test-redis-{number}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another test process has it
            connection = redis.Redis.from_url(f"{REDIS_URL}/{number}", socket_connect_timeout=2)
            try:
                is_empty = connection.dbsize() == 0
            except redis.RedisError as error:
                pytest.skip(f"no Redis at {REDIS_URL}: {error}")
            if is_empty:
                yield f"{REDIS_URL}/{number}"
                connection.flushdb()
                return
    pytest.skip(f"no empty database in the Redis at {REDIS_URL}")


@pytest.fixture
def run_on_services(postgresql_url: str, redis_server_url: str) -> Callable[..., None]:
    """Runs other tests again, on PostgreSQL and Redis: `run_on_services("tests/accounts/test_quotas.py")`.

    Their database is migrated once, and every run leaves it empty.
    """

    def run(*arguments: str, timeout_seconds: float = SECONDS) -> None:
        # With DJANGO_SETTINGS_MODULE in the environment pytest-django reads the settings before conftest has set them.
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--reuse-db", *arguments],
            cwd=REPOSITORY,
            env={
                **{name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"},
                "LLMSITE_TEST_DATABASE_URL": postgresql_url,
                "LLMSITE_TEST_REDIS_URL": redis_server_url,
            },
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]

    return run
