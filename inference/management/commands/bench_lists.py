"""`manage.py bench_lists`: fills databases of its own and times every list of the console and the API."""

from __future__ import annotations

import subprocess
import tempfile
from argparse import ArgumentParser
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console

from accounts.management.base import HouseCommand
from accounts.management.help import DIFFERS
from inference.bench import tables
from inference.bench.children import NotStarted
from inference.bench.lists import report, study
from inference.bench.lists.sizes import MAX_KEYS, MIN_KEYS
from inference.management.commands.bench import LOG_WIDTH, between
from inference.tuning import machine
from llmsite.config import BASE_DIR
from llmsite.processes.valkey import ValkeyError


class Command(HouseCommand):
    help = "Time every list of the console and the API at 100,000 keys, in databases of its own."
    examples = (
        "bench_lists",
        "bench_lists --postgresql postgres://postgres@127.0.0.1:5432/postgres",
        "bench_lists --keys 2000 --only Ledger --out bench-results --json",
    )
    statuses = {DIFFERS: "a list took longer than it may"}
    requires_system_checks: list[str] = []  # its databases are its own

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--keys",
            type=between(MIN_KEYS, MAX_KEYS, int),
            default=study.USUAL_KEYS,
            help="Keys; ten times as many ledger entries, twice as many receipts (100000).",
        )
        parser.add_argument(
            "--postgresql",
            default="",
            help="URL of a server where a database may be made and dropped again. SQLite is measured always.",
        )
        parser.add_argument("--only", default="", help="Lists whose name contains this.")
        parser.add_argument(
            "--out", type=Path, default=BASE_DIR / "docs" / "benchmarks", help="Folder for the results."
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        terminal = Console(stderr=options["json"])
        if not terminal.is_terminal:
            terminal = Console(stderr=options["json"], width=LOG_WIDTH)
        described, now = machine.describe(), datetime.now(UTC)
        wanted = study.Options(keys=options["keys"], postgresql=options["postgresql"], only=options["only"])
        with tempfile.TemporaryDirectory(prefix="llmsite-lists-") as scratch:
            try:
                found = study.run(wanted, Path(scratch))
            except (NotStarted, ValkeyError, psycopg.Error, subprocess.TimeoutExpired) as error:
                self.fail("not_measured", str(error))
        for one in found:
            title = f"{report.NAMES[one['database']]}: {report.verdict(one)}; the slowest"
            terminal.print(tables.table(title, report.HEADINGS, map(report.row, report.slowest(one["lists"]))))
            if study.too_slow(one["lists"]):
                self.exit_status = DIFFERS
        for path in report.write(options["out"], found, described, now):
            terminal.print(f"written: {path}", markup=False, highlight=False)
        return report.to_json(found, described, now)

    def show(self, result: dict[str, Any]) -> None:
        """Nothing: the tables were printed as they were measured."""
