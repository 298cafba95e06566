"""Grant an adapter to tenants."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.db import transaction

from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand
from inference.catalog import granting
from inference.management.naming import adapter_named, as_adapter_row
from inference.vetting.inspection import RegistrationError


class Command(HouseCommand):
    help = "Grant an adapter to tenants. Each gets it at the position (llama.cpp's id) after its last one."
    examples = (
        'grant_adapter smollm2:shakespeare "Alice\'s"',
        'grant_adapter shakespeare "Alice\'s" --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("adapter", help="model:adapter, or the adapter's name where one model has it")
        parser.add_argument("tenants", nargs="+", metavar="tenant")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        row = adapter_named(self, options["adapter"])
        tenants = [tenant_named(self, name) for name in options["tenants"]]
        try:
            with transaction.atomic():  # to all of them, or to none
                for tenant in tenants:
                    granting.grant(row, tenant)
        except RegistrationError as error:
            self.fail(error.code, error.message)
        return as_adapter_row(row)

    def show(self, result: dict[str, Any]) -> None:
        granted = ", ".join(f"{name} (id {position})" for name, position in result["granted"].items())
        self.stdout.write(f"{result['model']}:{result['name']} is granted to {granted}.")
