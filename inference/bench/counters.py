"""How many database queries and Redis round trips requests cost, from the servers' own counters.

Queries: django-prometheus counts them in every process, /metrics sums them up. Round trips: Valkey counts how often it
read from a client's socket (a pipeline is one read), and each command by name (those that scripts issue included).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import redis
from prometheus_client.parser import text_string_to_metric_families

QUERY_COUNTERS = ("django_db_execute_total", "django_db_execute_many_total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Totals since the servers started, at one moment (monotonic seconds)."""

    at: float
    queries: float
    redis_reads: int
    redis_commands: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Work a second, or per request."""

    queries: float
    redis_round_trips: float
    redis_commands: Mapping[str, float] = field(default_factory=dict)


def sum_queries(metrics: str) -> float:
    """Database queries in a Prometheus text."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name in QUERY_COUNTERS
    )


def read(metrics: str, client: redis.Redis) -> Counters:
    stats = client.info("stats")
    commands = client.info("commandstats")
    assert isinstance(stats, dict)
    assert isinstance(commands, dict)
    return Counters(
        at=time.monotonic(),
        queries=sum_queries(metrics),
        redis_reads=int(stats["total_reads_processed"]),
        redis_commands={name.removeprefix("cmdstat_"): int(row["calls"]) for name, row in commands.items()},
    )


def work_a_second(before: Counters, after: Counters) -> Work:
    """What an idle installation does by itself."""
    return _divide(before, after, after.at - before.at)


def work_per_request(before: Counters, after: Counters, num_requests: int, idle: Work) -> Work | None:
    """What each request cost, less what an idle installation does in the same time. None without requests."""
    if num_requests == 0:
        return None
    seconds = after.at - before.at
    raw = _divide(before, after, num_requests)
    share = seconds / num_requests

    def net(total: float, background: float) -> float:
        return max(0.0, total - background * share)

    commands = {name: net(calls, idle.redis_commands.get(name, 0.0)) for name, calls in raw.redis_commands.items()}
    return Work(
        queries=net(raw.queries, idle.queries),
        redis_round_trips=net(raw.redis_round_trips, idle.redis_round_trips),
        redis_commands={name: calls for name, calls in commands.items() if calls >= 0.005},
    )


def _divide(before: Counters, after: Counters, by: float) -> Work:
    names = after.redis_commands
    return Work(
        queries=(after.queries - before.queries) / by,
        redis_round_trips=(after.redis_reads - before.redis_reads) / by,
        redis_commands={name: (names[name] - before.redis_commands.get(name, 0)) / by for name in names},
    )
