"""Measure file formats and settings of a model on this machine, and keep the best as a variant."""

from __future__ import annotations

import threading
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.base import WIDE, HouseCommand
from accounts.management.help import INTERRUPTED
from inference.management.naming import model_named
from inference.management.steps import following, interruptible
from inference.tuning import desk, formats, optimizer, report
from inference.tuning.models import BOUNDS, Optimization
from inference.vetting.inspection import RegistrationError

State = Optimization.State
NUMBERS: dict[str, tuple[type[int] | type[float], str, str]] = {
    "max_perplexity_increase": (float, "PERCENT", "a format whose perplexity rises by more may not win"),
    "min_gain": (float, "PERCENT", "what gains less speed may not win; below 0 it may be slower by so much"),
    "max_minutes": (float, "N", "then what is measured decides"),
    "rounds": (int, "N", "measurements of each"),
    "seconds": (float, "N", "of each speed, at least"),
}


def bounded(low: float, high: float, kind: type[int] | type[float]) -> Callable[[str], float]:
    """An argparse type: a number within bounds."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ArgumentTypeError(f"use a number from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__
    return parse


def some_formats(text: str) -> str:
    try:
        return ",".join(each.name for each in formats.named(text))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


class Command(HouseCommand):
    help = (
        "Write a model in other file formats, measure them and their settings on this machine, and keep the fastest "
        "whose perplexity rises little as a variant, which activate_variant serves. The model itself is not changed. "
        "Measure while the machine is idle."
    )
    statuses = {
        0: "it was measured, whether anything was better or not; with --background: written down",
        1: "it could not be measured",
        INTERRUPTED: "interrupted, and nothing is left behind",
    }
    examples = (
        "optimize_model smollm2",
        "optimize_model smollm2 --formats Q4_0,Q8_0,IQ4_NL --max-perplexity-increase 5",
        "optimize_model big --max-minutes 60 --out /models --json",
        "optimize_model smollm2 --formats Q4_0 --min-gain -10 --background",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the served model")
        parser.add_argument(
            "--formats",
            type=some_formats,
            metavar="LIST",
            help=f"up to {formats.MAX_FORMATS} of {', '.join(formats.FORMATS)}; without it, what suits the model's own",
        )
        for name, (kind, metavar, text) in NUMBERS.items():
            default = getattr(Optimization(), name)
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=bounded(*BOUNDS[name], kind),
                default=default,
                metavar=metavar,
                help=f"{text} ({default:g})",
            )
        parser.add_argument(
            "--formats-only", action="store_true", help="do not try other numbers of threads and flash attention"
        )
        parser.add_argument(
            "--out", type=Path, metavar="FOLDER", help="for the file; STATE_DIR/models/variants without it"
        )
        parser.add_argument("--background", action="store_true", help="leave the work to the web, and do not wait")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        row = Optimization(
            base_model=model_named(self, options["name"]),
            formats=options["formats"] or "",
            tunes_settings=not options["formats_only"],
            folder=str(options["out"].absolute()) if options["out"] else "",
            is_attended=not options["background"],
            **{name: options[name] for name in NUMBERS},
        )
        with interruptible():
            try:
                desk.ask(row)
                if not options["background"]:
                    with following(self._wide_console(), hidden=self.as_json) as watch:
                        optimizer.work(row, threading.Event(), watch)
            except KeyboardInterrupt:
                self.fail("interrupted", "Stopped; nothing was changed or left behind.", status=INTERRUPTED)
            except RegistrationError as error:
                self.fail(error.code, error.message)
        row.refresh_from_db()
        return self._outcome(row)

    def _outcome(self, row: Optimization) -> dict[str, Any]:
        if row.state == State.FAILED:
            self.fail(row.problem_code, row.problem)
        if row.state == State.CANCELLED:
            self.fail("optimization_cancelled", "It was cancelled by somebody else; nothing is kept.")
        if row.result is None:
            return {"id": row.pk, "model": row.name, "state": row.state}
        return dict(row.result)

    def _wide_console(self) -> Any:
        console = self.console
        if not console.is_terminal:  # a pipe or a file has no width to keep to
            console.width = WIDE
        return console

    def show(self, result: dict[str, Any]) -> None:
        console = self._wide_console()
        if "state" in result:
            listed = f"manage.py optimizations list {result['id']}"
            console.print(f"The web measures it; `{listed}` and the console show how far it is.")
            return
        if result["requantized"]:
            console.print(report.REQUANTIZED.format(source=result["source"]["format"]))
        table = Table(*report.HEADINGS, box=None)
        for line in report.cells(result):
            table.add_row(*line)
        console.print(table)
        for text in (report.settings_tried(result), *result["notes"], report.kept(result)):
            if text:
                console.print(text)
        if variant := result["variant"]:
            console.print(f"Serve it: python manage.py activate_variant {result['model']} {variant['name']}")
