"""Show what has been used."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone
from rich.table import Table

from accounts.identity.key_rows import principal_of
from accounts.ledger.usage import tenant_usage, usage
from accounts.management.arguments import key_meant, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import Tenant


class Command(HouseCommand):
    help = "Show this period's usage of all tenants, of one tenant, or of one key."
    examples = ("usage", 'usage --tenant "Alice\'s" --json', "usage --key 4fT9q2LmX0aB")

    def add_arguments(self, parser: CommandParser) -> None:
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--tenant", help="the tenant's name")
        whose.add_argument("--key", help="public id of a key")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        now = timezone.now()
        if options["key"]:
            return {"usage": [usage(principal_of(key_meant(self, options["key"])), now)]}
        if options["tenant"]:
            tenants = [tenant_named(self, options["tenant"])]
        else:
            tenants = list(Tenant.objects.select_related("plan").order_by("name"))
        return {"usage": [tenant_usage(tenant, now) for tenant in tenants]}

    def show(self, result: dict[str, Any]) -> None:
        table = Table("tenant", "key", "plan", "tokens used", "held", "of", "starts anew", "requests ever", box=None)
        table.columns[1].no_wrap = True
        for row in result["usage"]:
            limit = row["quota_monthly"]
            table.add_row(
                row["tenant"],
                row.get("api_key", "all"),
                row["plan"],
                f"{row['quota_used']:,}",
                f"{row['quota_reserved']:,}",
                "unlimited" if limit is None else f"{limit:,}",
                row["quota_reset_at"][:10],
                f"{row['total_requests']:,}",
            )
        self.console.print(table)
