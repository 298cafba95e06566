"""Set the limits of a tenant or of a key."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db import transaction

from accounts.limits.precedence import LIMIT_NAMES
from accounts.management.arguments import add_limits, key_meant, overrides, sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import APIKey, Plan, Tenant


class Command(HouseCommand):
    help = "Set limits of a tenant, or with --key of one key; usage so far stands. Without a limit it shows them."
    examples = (
        'set_quota --tenant "Alice\'s" --monthly-tokens 2000000',
        'set_quota --tenant "Alice\'s" --plan free --requests-per-minute inherit',
        "set_quota --key 4fT9q2LmX0aB --concurrent-requests 2 --monthly-tokens unlimited --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        whose = parser.add_mutually_exclusive_group(required=True)
        whose.add_argument("--tenant", help="the tenant's name")
        whose.add_argument("--key", help="public id of a key")
        parser.add_argument("--plan", help="move the tenant to this plan")
        add_limits(parser)

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        try:
            with transaction.atomic():
                return self._set_key(options) if options["key"] else self._set_tenant(options)
        except ValidationError as error:
            self.fail("limits_invalid", sentence(error))

    def _set_tenant(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"])
        if options["plan"]:
            tenant.plan = self._plan(options["plan"])
        tenant.limit_overrides = overrides(options, tenant.limit_overrides)
        tenant.full_clean()
        tenant.save(update_fields=["plan", "limit_overrides"])
        return {"tenant": tenant.name, "plan": tenant.plan.name, **_limits(tenant)}

    def _set_key(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["plan"]:
            self.fail("plan_of_a_key", "A key has no plan: give --plan with --tenant.")
        key = key_meant(self, options["key"])
        key.limit_overrides = overrides(options, key.limit_overrides)
        key.full_clean()
        key.save(update_fields=["limit_overrides"])
        return {"tenant": key.tenant.name, "key": key.display, **_limits(key)}

    def _plan(self, name: str) -> Plan:
        plan = Plan.objects.filter(name=name).first()
        if plan is None:
            self.fail("plan_not_found", f"There is no plan {name!r}.")
        return plan

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(f"Limits of {result.get('key') or result['tenant']}:")
        for name, value in result["limits"].items():
            origin = "set here" if name in result["overrides"] else "inherited"
            self.stdout.write(f"  {name}: {'unlimited' if value is None else f'{value:,}'} ({origin})")


def _limits(row: Tenant | APIKey) -> dict[str, Any]:
    limits = row.limits
    return {"limits": {name: getattr(limits, name) for name in LIMIT_NAMES}, "overrides": row.limit_overrides}
