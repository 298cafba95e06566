"""`python -m inference.bench.lists.child`: fills the database of its environment, asks for every list, prints JSON.

Started by study.py with a database, a state folder and a Valkey of its own; progress goes to standard error: bars on a
terminal, else lines.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TextIO

import django
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EVERY_SECONDS = 10.0
Tell = Callable[[str, int, int], None]
"""What is written or asked for, how many of it there are, of how many."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--only", default="", help="Lists whose name contains this.")
    options = parser.parse_args()
    django.setup()
    terminal = Console(stderr=True)
    if terminal.is_terminal:
        columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=terminal) as progress:
            found = study(options.keys, options.only, _bars(progress))
    else:
        found = study(options.keys, options.only, lines(sys.stderr, time.monotonic))
    json.dump(found, sys.stdout)


def lines(out: TextIO, clock: Callable[[], float]) -> Tell:
    """A line when something begins and when it is done, and every EVERY_SECONDS in between."""
    began = clock()
    told: dict[str, float] = {}

    def tell(what: str, number: int, count: int) -> None:
        now = clock()
        if what not in told or number == count or now - told[what] >= EVERY_SECONDS:
            told[what] = now
            print(f"{now - began:6.0f} s  {what}: {number:,} of {count:,}", file=out, flush=True)

    return tell


def _bars(progress: Progress) -> Tell:
    tasks: dict[str, Any] = {}

    def tell(what: str, number: int, count: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=count)
        progress.update(tasks[what], completed=number)

    return tell


def study(num_keys: int, only: str, tell: Tell) -> dict[str, Any]:
    from django.core.management import call_command
    from django.db import connection
    from django.utils import timezone

    from inference.bench.lists import addresses, asking, rows
    from inference.bench.lists.sizes import Sizes

    call_command("migrate", verbosity=0, interactive=False)
    sizes, now, began = Sizes(num_keys), timezone.now(), time.monotonic()
    with asking.watched() as seen:
        filled = rows.fill(sizes, now, tell)
        seconds = time.monotonic() - began
        wanted = [each for each in addresses.every(filled, now) if only in each.name]
        askers = asking.Askers(filled)
        measured = []
        for number, address in enumerate(wanted, 1):
            measured.append(asdict(asking.measure(askers, address, seen)))
            tell("lists", number, len(wanted))
    counts = {name: getattr(sizes, name) for name in ("keys", "tenants", "ledger", "receipts", "refusals", "days")}
    with connection.cursor() as cursor:
        cursor.execute("SELECT version()" if connection.vendor == "postgresql" else "SELECT sqlite_version()")
        (version,) = cursor.fetchone()
    return {
        "database": connection.vendor,
        "version": str(version).partition(" on ")[0],
        "rows": counts,
        "fill_seconds": round(seconds, 1),
        "lists": measured,
    }


if __name__ == "__main__":
    main()
