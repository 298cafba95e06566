"""`manage.py bench_engine`: llmsite beside llama-server and llama_cpp.server; writes docs/benchmarks/engine.*."""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import ArgumentParser, ArgumentTypeError
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from accounts.management.base import HouseCommand
from inference.bench import calls, children, environments, load
from inference.bench.servers import report, study
from inference.bench.servers.workloads import LETTERS, WORKLOADS
from inference.management.commands.bench import LOG_WIDTH, between
from inference.tuning import machine
from llmsite.config import BASE_DIR


def letters(text: str) -> tuple[str, ...]:
    """`a,b` as letters of workloads."""
    wanted = tuple(dict.fromkeys(text.split(",")))
    unknown = [letter for letter in wanted if letter not in LETTERS]
    if unknown:
        raise ArgumentTypeError(f"{unknown[0]!r}: use some of {','.join(LETTERS)}")
    return wanted


def listed() -> str:
    return "workloads:\n" + "\n".join(f"  {workload.letter}  {workload.title}" for workload in WORKLOADS)


class Command(HouseCommand):
    help = "Measure the engine over HTTP beside llama.cpp's own server and llama-cpp-python's."
    examples = ("bench_engine", "bench_engine --quick", "bench_engine --only a,b --rounds 5 --out bench-results --json")
    more_help = listed()
    requires_system_checks: list[str] = []  # its servers have a state folder of their own

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--rounds", type=between(1, 50, int), help="Rounds over all workloads (3; 1 with --quick).")
        parser.add_argument(
            "--only", type=letters, default=(), help=f"Workloads, such as a,b ({LETTERS[0]} to {LETTERS[-1]})."
        )
        parser.add_argument("--quick", action="store_true", help="One round with shorter answers.")
        parser.add_argument(
            "--threads",
            type=between(1, 512, int),
            default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            help="Threads of each server (one per processor).",
        )
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
        wanted = study.Options(
            rounds=options["rounds"] or (1 if options["quick"] else study.ROUNDS),
            only=options["only"],
            quick=options["quick"],
        )
        with tempfile.TemporaryDirectory(prefix="llmsite-bench-") as scratch:
            try:
                found = study.run(wanted, Path(scratch), options["threads"], self._say)
            except (
                children.NotStarted,
                calls.CallRefused,
                load.LoadFailed,
                environments.PeerUnavailable,
            ) as error:
                self.fail("not_measured", str(error))
        found.notes.extend(machine.busyness(described))
        report.print_tables(self.terminal, found)
        for path in report.write(options["out"], found, described, now):
            self.terminal.print(f"written: {path}", markup=False, highlight=False)
        return report.to_json(found, described, now)

    def show(self, result: dict[str, Any]) -> None:
        """Nothing: the tables were printed as they were measured."""

    def _say(self, text: str) -> None:
        self.terminal.print(text, style="dim", markup=False, highlight=False)
