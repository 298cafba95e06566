"""Aliases of adapters: point, try a version out on a share, promote it, roll back."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone
from rich.table import Table

from accounts.management.base import HouseCommand
from inference.catalog import aliases, version_figures
from inference.management.naming import model_named
from inference.models import AdapterAlias, ServedModel
from inference.vetting.inspection import RegistrationError

ACTIONS = ("list", "set", "canary", "end-canary", "promote", "roll-back", "remove", "compare")


def percentage(text: str) -> int:
    """A whole number from 0 to 100."""
    if not (text.isascii() and text.isdigit() and int(text[:4]) <= 100):
        raise argparse.ArgumentTypeError("a share is a whole number of percent from 0 to 100")
    return int(text)


def hours(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= version_figures.MAX_HOURS):
        raise argparse.ArgumentTypeError(f"hours are a whole number from 1 to {version_figures.MAX_HOURS}")
    return int(text)


class Command(HouseCommand):
    help = (
        "Names for adapters: point one at a version, try another version out on a share of the conversations, promote "
        "it or roll back, and compare the versions. Without an action it lists the aliases."
    )
    examples = (
        "alias",
        "alias set smollm2:support support-v1",
        "alias canary smollm2:support support-v2 --share 10",
        "alias compare smollm2:support --hours 2 --json",
        "alias promote smollm2:support",
        "alias roll-back smollm2:support",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("alias", nargs="?", help="model:alias")
        parser.add_argument("version", nargs="?", help="the name of the adapter, for set and canary")
        parser.add_argument("--share", type=percentage, metavar="PERCENT", help="of the conversations, for canary")
        parser.add_argument("--hours", type=hours, default=24, help="how far compare looks back; 24 without it")
        parser.add_argument(
            "--force", action="store_true", help="set and promote also where a tenant may not use the new version"
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        self._action = options["action"]
        try:
            if self._action == "list":
                rows = AdapterAlias.objects.select_related("base_model", "target", "canary", "previous")
                return {"aliases": [aliases.as_alias_row(row) for row in rows]}
            base, name = self._named(options)
            if self._action == "set":
                version = aliases.version_of(base, self._version(options))
                return aliases.as_alias_row(aliases.point(base, name, version, force=options["force"]))
            return self._change(self._there(base, name), options)
        except RegistrationError as error:
            self.fail(error.code, error.message, fields=dict(error.fields))

    def _change(self, row: AdapterAlias, options: dict[str, Any]) -> dict[str, Any]:
        match self._action:
            case "canary":
                if options["share"] is None:
                    self.fail("share_missing", "Give --share, a whole number of percent from 0 to 100.")
                version = aliases.version_of(row.base_model, self._version(options))
                row = aliases.try_out(row, version, options["share"])
            case "end-canary":
                row = aliases.end_trial(row)
            case "promote":
                row = aliases.promote(row, force=options["force"])
            case "roll-back":
                row = aliases.roll_back(row)
            case "remove":
                aliases.remove([row.pk])
            case "compare":
                compared = version_figures.compare(row, timezone.now(), options["hours"])
                return {**aliases.as_alias_row(row), "hours": options["hours"], "versions": compared}
        return aliases.as_alias_row(row)

    def _named(self, options: dict[str, Any]) -> tuple[ServedModel, str]:
        model, colon, name = (options["alias"] or "").rpartition(":")
        if not colon:
            self.fail("alias_missing", f"Name the alias as model:alias, as in: alias {self._action} smollm2:support")
        return model_named(self, model), name

    def _there(self, base: ServedModel, name: str) -> AdapterAlias:
        row = aliases.find(base, name)
        if row is None:
            self.fail("alias_not_found", f"There is no alias {base.name}:{name[:64]}: `manage.py alias` lists them.")
        return row

    def _version(self, options: dict[str, Any]) -> str:
        if not options["version"]:
            self.fail("version_missing", "Name the adapter that is to answer: `manage.py adapters` lists them.")
        return str(options["version"])

    def show(self, result: dict[str, Any]) -> None:
        if self._action == "list":
            self._list(result["aliases"])
        elif self._action == "compare":
            self._compare(result)
        elif self._action == "remove":
            self.stdout.write(f"{result['model']}:{result['name']} is gone; its versions stay.")
        else:
            self.stdout.write(f"{result['model']}:{result['name']} is answered by {_in_words(result)}.")

    def _list(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.stdout.write("No alias yet: python manage.py alias set MODEL:ALIAS ADAPTER")
            return
        table = Table("alias", "answered by", "a roll back returns to", box=None)
        for row in rows:
            table.add_row(f"{row['model']}:{row['name']}", _in_words(row), row["previous"] or "-")
        self.print_table(table)

    def _compare(self, result: dict[str, Any]) -> None:
        names = ("version", "requests", "failed", "cancelled", "first token, median", "95 %", "tokens/s")
        table = Table(*names, box=None)
        for row in result["versions"]:
            seconds = (row["first_token_p50_seconds"], row["first_token_p95_seconds"])
            table.add_row(
                row["version"],
                str(row["requests"]),
                "-" if row["failed_percent"] is None else f"{row['failed']} ({row['failed_percent']:g} %)",
                str(row["cancelled"]),
                *("-" if each is None else f"{each:.3f} s" for each in seconds),
                "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:g}",
            )
        self.print_table(table)


def _in_words(row: dict[str, Any]) -> str:
    return f"{row['target']}, {row['share']} % by {row['canary']}" if row["canary"] else str(row["target"])
