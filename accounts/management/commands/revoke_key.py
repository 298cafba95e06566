"""Revoke an API key."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.identity import issuing
from accounts.management.arguments import as_row, key_meant
from accounts.management.base import HouseCommand


class Command(HouseCommand):
    help = "Revoke an API key: every process refuses it within a second, and its running streams end."
    examples = ("revoke_key 4fT9q2LmX0aB", "revoke_key 4fT9q2LmX0aB --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key", help="public id of the key")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        key = key_meant(self, options["key"])
        changed = issuing.revoke(key)
        return {**as_row(key), "changed": changed}

    def show(self, result: dict[str, Any]) -> None:
        word = "is revoked" if result["changed"] else "was revoked before"
        self.stdout.write(f"{result['key']} of {result['tenant']} {word}.")
