"""The shape of every command: `--json`, examples in `--help`, errors as one clear sentence and an exit status.

A command implements `run`, which returns what it did as JSON-able data, and `show`, which prints that for people.
"""

from __future__ import annotations

import argparse
import json
from abc import ABC, abstractmethod
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter
from rich.console import Console


class _HelpFormatter(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples as they are."""


class HouseCommand(BaseCommand, ABC):
    """`examples` are command lines without `manage.py`; `fail` ends the command with status 1."""

    examples: tuple[str, ...] = ()
    as_json = False

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        lines = "\n".join(f"  python manage.py {example}" for example in self.examples)
        parser = super().create_parser(
            prog_name,
            subcommand,
            formatter_class=_HelpFormatter,
            epilog=f"examples:\n{lines}" if lines else None,
            **kwargs,
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return parser

    def handle(self, *_args: Any, **options: Any) -> None:
        self.as_json = options["json"]
        result = self.run(options)
        if self.as_json:
            self.stdout.write(json.dumps(result, default=str, ensure_ascii=False))
        else:
            self.show(result)

    @abstractmethod
    def run(self, options: dict[str, Any]) -> Any:
        """Do the work and return it as JSON-able data."""

    def show(self, result: Any) -> None:
        """Print what `run` returned."""
        self.stdout.write(str(result))

    @property
    def console(self) -> Console:
        """For tables and progress bars; writes where the command's output goes."""
        return Console(file=self.stdout, highlight=False, soft_wrap=True)  # type: ignore[arg-type]

    def fail(self, code: str, message: str, **extra: Any) -> NoReturn:
        """End with status 1; with --json the same facts are on standard output as an object."""
        if self.as_json:
            self.stdout.write(json.dumps({"error": {"code": code, "message": message, **extra}}, default=str))
        raise CommandError(message)
