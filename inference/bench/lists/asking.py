"""Asks for each list in this process, through the URL table and the middleware, and counts what the database is asked.

A time is that of the whole answer, made and rendered; the first one is not counted. Nothing of it crosses a network.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from django.db import connection
from django.db.backends.signals import connection_created
from django.test import Client

from inference.bench.lists.addresses import (
    OPERATOR_KEY,
    OWNER,
    OWNER_OF_LITTLE,
    SUPERUSER,
    TENANT_KEY,
    Address,
)
from inference.bench.lists.rows import Filled

ROUNDS = 3
MOST_SQL = 600
"""Characters of a statement that are kept."""


class PageFailed(Exception):
    """A list did not answer with 200."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One answer: its time, this process's processor time, and its longest statement's time, in milliseconds."""

    name: str
    who: str
    queries: int
    milliseconds: float
    cpu_milliseconds: float
    sql_milliseconds: float
    sql: str


@dataclass(slots=True)
class Watched:
    """What the database was asked, by all threads: (seconds, statement)."""

    asked: list[tuple[float, str]]

    def __call__(self, execute: Callable[..., Any], sql: str, params: Any, many: bool, context: Any) -> Any:
        began = time.perf_counter()
        try:
            return execute(sql, params, many, context)
        finally:
            self.asked.append((time.perf_counter() - began, sql))


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    """Statements of this thread's connection and of all that are opened meanwhile."""
    found = Watched([])

    def opened(connection: Any, **_: Any) -> None:
        if found not in connection.execute_wrappers:
            connection.execute_wrappers.append(found)

    opened(connection)
    connection_created.connect(opened)
    try:
        yield found
    finally:
        connection_created.disconnect(opened)
        connection.execute_wrappers.remove(found)


class Askers:
    """A signed-in browser, or a key, for each kind of asker."""

    def __init__(self, filled: Filled) -> None:
        people = {
            SUPERUSER: filled.superuser,
            OWNER: filled.owner_of_largest,
            OWNER_OF_LITTLE: filled.owner_of_smallest,
        }
        self._clients: dict[str, Client] = {}
        for name, user in people.items():
            self._clients[name] = Client(SERVER_NAME="localhost")
            self._clients[name].force_login(user)
        for name, key in ((TENANT_KEY, filled.tenant_key), (OPERATOR_KEY, filled.operator_key)):
            self._clients[name] = Client(SERVER_NAME="localhost", headers={"Authorization": f"Bearer {key}"})

    def ask(self, address: Address) -> None:
        """Raises PageFailed."""
        answer = self._clients[address.who].get(address.path)
        if answer.status_code != 200:
            raise PageFailed(f"{address.path}: {answer.status_code} {answer.content[:300]!r}")


def measure(askers: Askers, address: Address, seen: Watched, rounds: int = ROUNDS) -> Measured:
    """The middle of some rounds, after one that is not counted. Raises PageFailed."""
    askers.ask(address)
    runs = [asked_once(askers, address, seen) for _ in range(rounds)]
    return sorted(runs, key=lambda run: run.milliseconds)[rounds // 2]


def asked_once(askers: Askers, address: Address, seen: Watched) -> Measured:
    """Raises PageFailed."""
    seen.asked.clear()
    began, computed = time.perf_counter(), time.process_time()
    askers.ask(address)
    seconds, cpu = time.perf_counter() - began, time.process_time() - computed
    asked = list(seen.asked)
    took, sql = max(asked, default=(0.0, ""))
    return Measured(
        name=address.name,
        who=address.who,
        queries=len(asked),
        milliseconds=round(1000 * seconds, 1),
        cpu_milliseconds=round(1000 * cpu, 1),
        sql_milliseconds=round(1000 * took, 1),
        sql=sql[:MOST_SQL],
    )
