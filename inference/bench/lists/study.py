"""Measures on each database: a scratch one, an embedded Valkey, a child that fills and asks. Everything is removed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from inference.bench.children import NotStarted
from llmsite.config import BASE_DIR
from llmsite.processes import valkey

LIMIT_MS = 300.0
USUAL_KEYS = 100_000
VALKEY_MB = 128
LONGEST_SECONDS = 4 * 3600


@dataclass(frozen=True, slots=True)
class Options:
    keys: int = USUAL_KEYS
    postgresql: str = ""
    """URL of a server where a database may be made and dropped; empty: SQLite alone."""
    only: str = ""
    """Lists whose name contains this."""


def run(options: Options, scratch: Path) -> list[dict[str, Any]]:
    """What the child found on SQLite, and on PostgreSQL. Raises NotStarted and psycopg.Error."""
    found = [_measured(options, scratch / "sqlite", "")]
    if options.postgresql:
        with database(options.postgresql) as url:
            found.append(_measured(options, scratch / "postgresql", url))
    return found


@contextlib.contextmanager
def database(server: str) -> Iterator[str]:
    """URL of an empty database on a PostgreSQL server, dropped in the end. Raises psycopg.Error."""
    name = f"llmsite_lists_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True, connect_timeout=5) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield urlsplit(server)._replace(path=f"/{name}").geturl()
    finally:
        with psycopg.connect(server, autocommit=True, connect_timeout=5) as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@contextlib.contextmanager
def redis_url(folder: Path) -> Iterator[str]:
    """An embedded Valkey for as long as the block lasts. Raises valkey.ValkeyError."""
    plan = valkey.ValkeyPlan(folder, folder / "valkey.sock", VALKEY_MB)
    server = valkey.start(plan, output=subprocess.DEVNULL)
    try:
        valkey.wait_until_it_answers(plan, lambda: server.poll() is None)
        yield f"unix://{plan.socket}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def _measured(options: Options, scratch: Path, database_url: str) -> dict[str, Any]:
    state = scratch / "state"
    state.mkdir(parents=True)
    command = [sys.executable, "-m", "inference.bench.lists.child", "--keys", str(options.keys)]
    with redis_url(scratch / "valkey") as redis:
        environment = {
            "DJANGO_SETTINGS_MODULE": "llmsite.settings",
            "DATABASE_URL": database_url,
            "REDIS_URL": redis,
            "STATE_DIR": str(state),
            "LOG_LEVEL": "WARNING",
        }
        done = subprocess.run(
            [*command, "--only", options.only],
            cwd=BASE_DIR,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=LONGEST_SECONDS,
            check=False,
        )
    if done.returncode:
        raise NotStarted(f"the measurement ended with {done.returncode}: its last words are above")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def too_slow(lists: list[dict[str, Any]], limit: float = LIMIT_MS) -> list[dict[str, Any]]:
    """Those beyond the limit, the slowest first."""
    return sorted((each for each in lists if each["milliseconds"] >= limit), key=lambda each: -each["milliseconds"])
