"""Take an adapter from tenants."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand
from inference.catalog import granting
from inference.management.naming import adapter_named, as_adapter_row


class Command(HouseCommand):
    help = "Take an adapter from tenants; their other adapters keep their positions. For them it does not exist then."
    examples = (
        'revoke_adapter smollm2:shakespeare "Alice\'s"',
        'revoke_adapter shakespeare "Alice\'s" --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("adapter", help="model:adapter, or the adapter's name where one model has it")
        parser.add_argument("tenants", nargs="+", metavar="tenant")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        row = adapter_named(self, options["adapter"])
        tenants = [tenant_named(self, name) for name in options["tenants"]]
        revoked = [tenant.name for tenant in tenants if granting.revoke(row, tenant)]
        return {**as_adapter_row(row), "revoked": revoked}

    def show(self, result: dict[str, Any]) -> None:
        revoked = ", ".join(result["revoked"]) or "nobody, it was not granted"
        self.stdout.write(f"{result['model']}:{result['name']} is taken from {revoked}.")
        if result["visibility"] == "shared":
            self.stdout.write("It is shared: every tenant may still use it.")
