"""Show or keep what a tenant used in a month."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.ledger import statements
from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand

STDOUT = "-"


class Command(HouseCommand):
    help = "Show the statement of a month, write it as CSV, or with --close keep it for good (the sweep does so, too)."
    examples = (
        'statement --tenant "Alice\'s"',
        'statement --tenant "Alice\'s" --month 2026-10 --csv october.csv',
        'statement --tenant "Alice\'s" --month 2026-10 --close --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", required=True, help="the tenant's name")
        parser.add_argument("--month", help="2026-10; the month before this one, unless it says")
        parser.add_argument("--close", action="store_true", help="keep it: it does not change any more")
        parser.add_argument("--csv", type=Path, metavar="FILE", help="write the lines there; - is standard output")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        self._is_table = str(options["csv"]) == STDOUT
        if self._is_table and self.as_json:
            self.fail("output_ambiguous", "Standard output takes one of them: give --csv a file, or leave --json out.")
        tenant, now = tenant_named(self, options["tenant"]), timezone.now()
        last = (now.date().replace(day=1) - timedelta(days=1)).replace(day=1)
        try:
            month = statements.month_of(options["month"]) if options["month"] else last
        except ValueError as error:
            self.fail("month_invalid", f"{error}".capitalize())
        if options["close"] and statements.close(tenant, month, now) is None:
            self.fail("month_open", "The month is not over, or a request of it may still be charged.")
        facts = statements.statement(tenant, month, now)
        if options["csv"]:
            self._write(options["csv"], statements.as_csv(facts))
        return facts

    def _write(self, path: Path, text: str) -> None:
        if self._is_table:
            self.stdout.write(text, ending="")
            return
        try:
            path.write_text(text, encoding="utf-8", newline="")
        except OSError as error:
            self.fail("file_unwritable", f"{path} cannot be written: {error.strerror}.")

    def show(self, result: dict[str, Any]) -> None:
        if self._is_table:  # what follows a table would be a row of it
            return
        self.stdout.write(
            f"{result['tenant']}, {result['month']} ({result['status']}): {result['requests']:,} requests, "
            f"{result['tokens']:,} tokens, {result['cost']} {result['currency']}"
        )
        for line in result["lines"]:
            name = " ".join(filter(None, (line["model"] or "corrections", line["adapters"], line["key"])))
            self.stdout.write(
                f"  {name}: {line['requests']:,} requests, {line['prompt_tokens']:,} in "
                f"({line['cached_tokens']:,} cached), {line['completion_tokens']:,} out, {line['cost']}"
            )
