"""Show or set which web pages may ask with a tenant's keys."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser

from accounts.management.arguments import add_origins, sentence, tenant_named
from accounts.management.base import HouseCommand


class Command(HouseCommand):
    help = (
        "Show the origins of the web pages that browsers let ask with a tenant's keys; --allow-origin adds one, "
        "--remove-origin takes one away, --none takes all."
    )
    examples = (
        'allowed_origins --tenant "Alice\'s"',
        'allowed_origins --tenant "Alice\'s" --allow-origin https://app.example.org --allow-origin http://localhost:5173',
        'allowed_origins --tenant "Alice\'s" --none --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", required=True, help="the tenant's name")
        add_origins(parser)
        parser.add_argument("--remove-origin", action="append", metavar="ORIGIN", help="one that is there; repeatable")
        parser.add_argument("--none", action="store_true", help="take all away, before any is added")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"])
        before = [] if options["none"] else list(tenant.allowed_origins)
        removed = options["remove_origin"] or []
        for origin in removed:
            if origin not in before:
                self.fail("origin_not_found", f"{origin!r} is not among the tenant's origins.")
        found = [origin for origin in before if origin not in removed]
        found += [origin for origin in dict.fromkeys(options["allow_origin"] or []) if origin not in found]
        if found != tenant.allowed_origins:
            tenant.allowed_origins = found
            try:
                tenant.full_clean()
            except ValidationError as error:
                self.fail("origins_invalid", sentence(error))
            tenant.save(update_fields=["allowed_origins"])
        return {"tenant": tenant.name, "allowed_origins": found}

    def show(self, result: dict[str, Any]) -> None:
        listed = ", ".join(result["allowed_origins"]) or "none"
        self.stdout.write(f"Web pages that may ask with keys of {result['tenant']}: {listed}")
