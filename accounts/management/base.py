"""The shape of every command: `--json`, examples and exit statuses in `--help`, errors as one clear sentence.

A command implements `run`, which returns what it did as JSON-able data, and `show`, which prints that for people.
Runs before Django's set-up where a command must (`up`, `doctor`): no model and no setting is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

import redis
from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter
from django.db import InterfaceError, OperationalError
from rich.console import Console
from rich.table import Table

from accounts.management.help import DIFFERS, FAILED, INTERRUPTED, OK, UNREAD, USAGE, epilog
from accounts.management.plain import plain, plain_json
from accounts.trail import audit_log

WIDE = 400
"""Columns of a table that goes to a pipe or a file, which have no width to keep to."""


class _HelpFormatter(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the examples as they are."""


class HouseCommand(BaseCommand, ABC):
    """`examples` are command lines without `manage.py`; `fail` ends the command with status 1.

    statuses: what exit statuses mean beyond the usual ones. exit_status: `run` may set one of them.
    """

    examples: tuple[str, ...] = ()
    statuses: Mapping[int, str] = {}
    more_help = ""
    as_json = False
    exit_status = OK
    _has_begun = False

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        parser = super().create_parser(
            prog_name,
            subcommand,
            formatter_class=_HelpFormatter,
            epilog=epilog(self.examples, self.statuses, self.more_help),
            **kwargs,
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        return parser

    def run_from_argv(self, argv: list[str]) -> None:
        try:
            try:
                self._run(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # whoever read it has enough, as `head` does; what is done is done
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(UNREAD)

    def _run(self, argv: list[str]) -> None:
        try:
            super().run_from_argv(argv)
        except SystemExit as end:
            if end.code == DIFFERS and not self._has_begun:  # argparse's own status for what it does not understand
                if "--json" in argv:
                    self._tell_json("usage", "The words were not understood: standard error says which.")
                sys.exit(USAGE)
            raise

    def handle(self, *_args: Any, **options: Any) -> None:
        self.as_json, self.exit_status, self._has_begun = options["json"], OK, True
        result = self._result(options)
        if self.as_json:
            self.stdout.write(plain_json(json.dumps(result, default=str, ensure_ascii=False)))
        else:
            self.show(plain(result))
        if self.exit_status:
            sys.exit(self.exit_status)

    def _result(self, options: dict[str, Any]) -> Any:
        """What `run` returns; of what keeps any command from its work, a sentence."""
        name = type(self).__module__.rpartition(".")[2]
        try:
            with audit_log.acting(lambda: audit_log.of_the_shell(name)):
                return self.run(options)
        except redis.RedisError as error:
            why = f"Redis does not answer ({type(error).__name__})"
            self.fail("redis_unreachable", f"{why}: `manage.py doctor` says more.")
        except (OperationalError, InterfaceError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            self.fail("database_unavailable", f"The database fails ({why}): `manage.py doctor` says more.")
        except KeyboardInterrupt:
            self.fail("interrupted", "Interrupted.", status=INTERRUPTED)

    @abstractmethod
    def run(self, options: dict[str, Any]) -> Any:
        """Do the work and return it as JSON-able data."""

    def show(self, result: Any) -> None:
        """Print what `run` returned."""
        self.stdout.write(str(result))

    @property
    def console(self) -> Console:
        """For tables and progress bars; writes where the command's output goes. Brackets in a name are no markup."""
        return Console(file=self.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)  # type: ignore[arg-type]

    def print_table(self, table: Table) -> None:
        """As wide as the terminal; what is no terminal has all of each line."""
        console = self.console
        if not console.is_terminal:
            console.width = WIDE
        console.print(table)

    def fail(self, code: str, message: str, *, status: int = FAILED, **extra: Any) -> NoReturn:
        """End with that status; with --json the same facts are on standard output as an object."""
        if self.as_json:
            self._tell_json(code, message, **extra)
        raise CommandError(plain(message), returncode=status)

    def _tell_json(self, code: str, message: str, **extra: Any) -> None:
        self.stdout.write(json.dumps({"error": {"code": code, "message": message, **extra}}, default=str))
