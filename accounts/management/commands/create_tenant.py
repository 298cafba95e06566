"""Make a tenant."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db import transaction

from accounts.limits.plans import plan_named
from accounts.management.arguments import add_limits, add_origins, overrides, sentence
from accounts.management.base import HouseCommand
from accounts.models import Tenant


class Command(HouseCommand):
    help = "Make a tenant on a plan, with limits of its own if you like."
    examples = (
        'create_tenant "Alice\'s" --plan standard',
        'create_tenant "Bob\'s" --plan free --monthly-tokens 1000000 --quota-anchor-day 15 --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the tenant's name, unique")
        parser.add_argument(
            "--plan", default="standard", help="name of its plan; admin, standard and free are made when first used"
        )
        parser.add_argument(
            "--quota-anchor-day", type=int, default=1, metavar="DAY", help="1 to 28; the month starts on it"
        )
        add_origins(parser)
        add_limits(parser)

    @transaction.atomic
    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        """Refused, it leaves no plan behind that was made for it."""
        plan, is_new = plan_named(options["plan"])
        if plan is None:
            self.fail("plan_not_found", f"There is no plan {options['plan']!r}: `manage.py plan make` makes one.")
        tenant = Tenant(
            name=options["name"],
            plan=plan,
            quota_anchor_day=options["quota_anchor_day"],
            limit_overrides=overrides(options, {}),
            allowed_origins=options["allow_origin"] or [],
        )
        try:
            tenant.full_clean()
        except ValidationError as error:
            self.fail("tenant_invalid", sentence(error))
        tenant.save()
        return {"id": tenant.pk, "name": tenant.name, "plan": plan.name, "plan_created": is_new}

    def show(self, result: dict[str, Any]) -> None:
        if result["plan_created"]:
            self.stdout.write(f"Made the plan {result['plan']} with its usual limits.")
        self.stdout.write(f"Made the tenant {result['name']} on the plan {result['plan']}.")
