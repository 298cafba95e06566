"""Correct what was used, with a reason."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.ledger import adjusting
from accounts.limits.precedence import MAX_LIMIT
from accounts.management.arguments import key_meant, tenant_named
from accounts.management.base import HouseCommand
from accounts.management.commands.set_price import amount


class Command(HouseCommand):
    help = "Correct the current period of a tenant, or with --key of one key and its tenant; negative gives back."
    examples = (
        'adjust --tenant "Alice\'s" --tokens -5000 --reason "an outage on Friday"',
        "adjust --key 4fT9q2LmX0aB --requests -2 --cost -0.35 --reason 'goodwill' --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        whose = parser.add_mutually_exclusive_group(required=True)
        whose.add_argument("--tenant", help="the tenant's name")
        whose.add_argument("--key", help="public id of a key")
        parser.add_argument("--tokens", type=int, default=0)
        parser.add_argument("--requests", type=int, default=0)
        parser.add_argument("--cost", type=amount, default=Decimal(0), help="in the currency; negative is a credit")
        parser.add_argument("--reason", required=True, help="stands in the ledger")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        key = key_meant(self, options["key"]) if options["key"] else None
        tenant = key.tenant if key else tenant_named(self, options["tenant"])
        if max(abs(options["tokens"]), abs(options["requests"])) > MAX_LIMIT:
            self.fail("adjustment_invalid", f"Numbers are at most {MAX_LIMIT}.")
        try:
            request_id = adjusting.adjust(
                tenant,
                key,
                tokens=options["tokens"],
                requests=options["requests"],
                cost=options["cost"],
                reason=options["reason"],
                now=timezone.now(),
            )
        except ValueError as error:
            self.fail("adjustment_invalid", str(error))
        return {"request_id": request_id, "tenant": tenant.name, "key": key.display if key else None}

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(f"Adjusted {result['key'] or result['tenant']}: {result['request_id']} in the ledger.")
