"""Replace an API key by a successor."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core.management.base import CommandParser

from accounts.identity import issuing
from accounts.management.arguments import as_row, duration, key_meant
from accounts.management.base import HouseCommand


class Command(HouseCommand):
    help = "Issue a successor with the same name, rights, limits and quota. The old key ends after the overlap."
    examples = ("rotate_key 4fT9q2LmX0aB --overlap 7d", "rotate_key 4fT9q2LmX0aB --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", help="public id of the key")
        parser.add_argument(
            "--overlap",
            type=duration,
            default=timedelta(0),
            metavar="TIME",
            help="how long the old key still works: 90s, 30m, 12h, 7d; not at all without it",
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        old = key_meant(self, options["key"])
        try:
            key, text = issuing.rotate(old, options["overlap"].total_seconds())
        except issuing.IssuingError as error:
            self.fail("key_not_rotated", str(error))
        return {**as_row(key), "key": text, "replaces": as_row(old)}

    def show(self, result: dict[str, Any]) -> None:
        old = result["replaces"]
        end = f"ends at {old['expires_at']}" if old["revoked_at"] is None else "is revoked"
        self.stdout.write(f"{old['key']} {end}. Its successor is shown only now:\n\n  {result['key']}\n")
