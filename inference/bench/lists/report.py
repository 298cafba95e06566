"""The lists' times for readers: docs/benchmarks/lists.json and lists.md. Pure, but for writing the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from inference.bench.lists.study import LIMIT_MS, too_slow
from inference.bench.page import grid
from inference.tuning import machine

FORMAT = 1
MOST_ROWS = 15
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}
HEADINGS = ("list", "who asks", "queries", "ms", "processor ms", "its longest query, ms")


def to_json(found: Sequence[dict[str, Any]], described: dict[str, object], measured_at: datetime) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "measured_at": measured_at.isoformat(timespec="seconds"),
        "machine": described,
        "versions": machine.versions(),
        "limit_ms": LIMIT_MS,
        "databases": list(found),
    }


def row(each: dict[str, Any]) -> list[str]:
    """The cells of HEADINGS."""
    times = (f"{each[name]:.0f}" for name in ("milliseconds", "cpu_milliseconds", "sql_milliseconds"))
    return [each["name"], each["who"], str(each["queries"]), *times]


def slowest(lists: Sequence[dict[str, Any]], most: int = MOST_ROWS) -> list[dict[str, Any]]:
    return sorted(lists, key=lambda each: -each["milliseconds"])[:most]


def verdict(one: dict[str, Any]) -> str:
    late = too_slow(one["lists"])
    return f"met by all {len(one['lists'])}" if not late else f"missed by {len(late)} of {len(one['lists'])}"


def markdown(found: Sequence[dict[str, Any]], described: dict[str, object], measured_at: datetime) -> str:
    rows = found[0]["rows"]
    lines = [
        f"# Lists at {rows['keys']:,} keys",
        "",
        "Every list of the console and of the API, asked for in each way that it offers (pages, searches, filters,",
        "orders, choices, a row's page), and the same as people of a tenant see them: measured by",
        f"`manage.py bench_lists` on {measured_at:%Y-%m-%d}: {described['processor']}, {described['cores']} cores,",
        f"{described['memory_gb']} GB, {described['system']}, Python {described['python']}; load average before:",
        f"{described['load_average_before']}.",
        "",
        f"{rows['keys']:,} keys of {rows['tenants']:,} tenants, {rows['ledger']:,} ledger entries,",
        f"{rows['receipts']:,} receipts, {rows['refusals']:,} refusals, {rows['days']:,} days' sums. One tenant has",
        "three in ten of all, one next to nothing.",
        "",
        *grid(
            ("database", f"each below {LIMIT_MS:.0f} ms", "median ms", "slowest ms", "most queries"),
            ((f"{NAMES[one['database']]} ({one['version']})", verdict(one), *_figures(one["lists"])) for one in found),
        ),
        "",
    ]
    for one in found:
        lines += [
            f"## The slowest on {NAMES[one['database']]}",
            "",
            *grid(HEADINGS, map(row, slowest(one["lists"]))),
            "",
        ]
    lines += [*_method(), ""]
    return "\n".join(lines)


def _figures(lists: Sequence[dict[str, Any]]) -> Iterator[str]:
    times = [each["milliseconds"] for each in lists]
    yield f"{median(times):.0f}"
    yield f"{max(times):.0f}"
    yield str(max(each["queries"] for each in lists))


def _method() -> list[str]:
    return [
        "A time is that of the whole answer made in one process, with its middleware, queries and template, without a",
        "network: the median of three, after one that is not counted. PostgreSQL has the statistics that autovacuum",
        "keeps; SQLite has none. All of them: [lists.json](lists.json). That no list asks more often where there are",
        "more rows is a test: `tests/llmsite/test_lists.py`.",
    ]


def write(
    folder: Path, found: Sequence[dict[str, Any]], described: dict[str, object], measured_at: datetime
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(to_json(found, described, measured_at), indent=0, separators=(",", ":"))
    written = {
        folder / "lists.json": f"{whole}\n",
        folder / "lists.md": markdown(found, described, measured_at),
    }
    for path, text in written.items():
        path.write_text(text)
    return list(written)
