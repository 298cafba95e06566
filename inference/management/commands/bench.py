"""`manage.py bench`: measures, prints, writes docs/benchmarks. Everything it starts it stops."""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from accounts.management.base import HouseCommand
from inference.bench import batching, batching_report, calls, children, gateway, load, report, tables
from inference.bench.digest import digest
from inference.tuning import machine
from llmsite.config import BASE_DIR

LOG_WIDTH = 200
"""Columns where the output goes to a file or a pipe."""


def clients_list(text: str) -> tuple[int, ...]:
    """`1,4,16` as numbers from 1 to 512, ascending."""
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise ArgumentTypeError("use numbers separated by commas, such as 1,4,16,64") from error
    if numbers[0] < 1 or numbers[-1] > 512 or len(numbers) > 8:
        raise ArgumentTypeError("use up to eight numbers from 1 to 512")
    return numbers


def between(low: float, high: float, kind: type[int] | type[float]) -> Any:
    """An argparse type: a number within bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"use a number from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


class Command(HouseCommand):
    help = "Measure the path around the model beside the LiteLLM proxy, or (--engine) what one batch gains."
    examples = (
        "bench",
        "bench --no-peer --rounds 1",
        "bench --clients 1,16 --seconds 5 --out bench-results",
        "bench --engine --json",
    )
    requires_system_checks: list[str] = []  # its servers have a state folder of their own

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--engine", action="store_true", help="Measure batching with the real demo model instead.")
        parser.add_argument("--rounds", type=between(1, 50, int), help="Rounds over all arms (4; with --engine 5).")
        parser.add_argument("--seconds", type=between(0.2, 60, float), default=2.0, help="Time of one measurement (2).")
        parser.add_argument("--clients", type=clients_list, default=(1, 4, 16, 64), help="Clients at once (1,4,16,64).")
        parser.add_argument("--no-peer", action="store_true", help="Leave LiteLLM out.")
        parser.add_argument("--peer-workers", type=between(1, 64, int), default=1, help="LiteLLM's processes (1).")
        parser.add_argument(
            "--out", type=Path, default=BASE_DIR / "docs" / "benchmarks", help="Folder for the results."
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        if not sys.platform.startswith("linux"):
            self.fail("not_linux", "the benchmark reads Linux's /proc: run it on Linux")
        self.terminal = Console(stderr=options["json"])
        if not self.terminal.is_terminal:
            self.terminal = Console(stderr=options["json"], width=LOG_WIDTH)
        described, now = machine.describe(), datetime.now(UTC)
        measure = self._batching if options["engine"] else self._gateway
        with tempfile.TemporaryDirectory(prefix="llmsite-bench-") as scratch:
            try:
                found, paths = measure(options, Path(scratch), described, now)
            except (children.NotStarted, calls.CallRefused, load.LoadFailed) as error:
                self.fail("not_measured", str(error))
        for path in paths:
            self.terminal.print(f"written: {path}", markup=False, highlight=False)
        return found

    def show(self, result: dict[str, Any]) -> None:
        """Nothing: the tables were printed as they were measured."""

    def _gateway(
        self, options: dict[str, Any], scratch: Path, described: dict[str, object], now: datetime
    ) -> tuple[dict[str, Any], list[Path]]:
        wanted = gateway.Options(
            rounds=options["rounds"] or gateway.ROUNDS,
            seconds=options["seconds"],
            clients=options["clients"],
            with_peer=not options["no_peer"],
            peer_workers=options["peer_workers"],
        )
        study = gateway.run(wanted, scratch, self._say)
        study.notes.extend(machine.busyness(described))
        shown = digest(study)
        tables.print_tables(self.terminal, study, shown)
        paths = report.write(options["out"], study, shown, described, now)
        return report.to_json(study, shown, described, now), paths

    def _batching(
        self, options: dict[str, Any], scratch: Path, described: dict[str, object], now: datetime
    ) -> tuple[dict[str, Any], list[Path]]:
        wanted = batching.BatchOptions(rounds=options["rounds"] or batching.ROUNDS)
        study = batching.run(wanted, scratch, self._say)
        batching_report.print_tables(self.terminal, study)
        paths = batching_report.write(options["out"], study, described, now)
        return batching_report.to_json(study, described, now), paths

    def _say(self, text: str) -> None:
        self.terminal.print(text, style="dim", markup=False, highlight=False)
