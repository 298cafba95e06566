"""Tenants: who there is, suspend and activate, another plan or name."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db.models import Count, OuterRef, Q, Subquery
from django.utils import timezone
from rich.table import Table

from accounts.identity import tenants
from accounts.management.arguments import add_allowed, allowed, plan_meant, sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import QuotaPeriod, Tenant

ACTIONS = ("list", "suspend", "activate", "change")


class Command(HouseCommand):
    help = (
        "List the tenants, suspend and activate them, or change the name, plan or day of the month of one, or what it "
        "may use. What a suspended tenant has running ends within a second. Limits are set_quota's."
    )
    examples = (
        "tenant",
        'tenant suspend "Alice\'s" "Bob\'s"',
        'tenant activate "Alice\'s" --json',
        'tenant change "Alice\'s" --plan standard --allowed-models small,large',
        'tenant change "Alice\'s" --new-name "Alice and Dora"',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("names", nargs="*", metavar="name", help="of tenants; change takes one")
        parser.add_argument("--new-name", help="for change")
        parser.add_argument("--plan", help="for change: the name of a plan")
        parser.add_argument("--quota-anchor-day", type=int, metavar="DAY", help="for change: 1 to 28")
        add_allowed(parser, "for change: ")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        action = options["action"]
        named = [tenant_named(self, name) for name in options["names"]]
        if action != "list" and not named:
            self.fail("tenant_missing", f"Say whom: tenant {action} NAME.")
        changed: list[Tenant] = []
        if action == "suspend":
            changed = tenants.set_status(named, Tenant.Status.SUSPENDED)
        elif action == "activate":
            changed = tenants.set_status(named, Tenant.Status.ACTIVE)
        elif action == "change":
            changed = self._change(named, options)
        rows = _with_figures(Tenant.objects.filter(pk__in=[each.pk for each in named]) if named else None)
        return {"changed": [tenant.name for tenant in changed], "tenants": rows}

    def _change(self, named: list[Tenant], options: dict[str, Any]) -> list[Tenant]:
        if len(named) != 1:
            self.fail("tenant_ambiguous", "Change one tenant at a time.")
        tenant = named[0]
        wanted = {"name": options["new_name"], "quota_anchor_day": options["quota_anchor_day"]}
        wanted = {name: value for name, value in wanted.items() if value is not None} | allowed(options)
        if options["plan"] is not None:
            wanted["plan"] = plan_meant(self, options["plan"])
        if not wanted:
            self.fail("nothing_to_change", "Say what to change, such as --plan; --help lists it.")
        for name, value in wanted.items():
            setattr(tenant, name, value)
        try:
            tenant.full_clean()
        except ValidationError as error:
            self.fail("tenant_invalid", sentence(error))
        tenant.save(update_fields=list(wanted))
        return [tenant]

    def show(self, result: dict[str, Any]) -> None:
        if not result["tenants"]:
            self.stdout.write("No tenant yet: python manage.py create_tenant NAME")
            return
        table = Table("tenant", "status", "plan", "keys", "tokens this month", "of", box=None)
        for row in result["tenants"]:
            limit = row["monthly_tokens"]
            table.add_row(
                row["name"] + (" *" if row["name"] in result["changed"] else ""),
                row["status"],
                row["plan"],
                str(row["active_keys"]),
                f"{row['used_tokens']:,}",
                "unlimited" if limit is None else f"{limit:,}",
            )
        self.print_table(table)
        if result["changed"]:
            self.stdout.write("* changed now")


def _with_figures(rows: Any) -> list[dict[str, Any]]:
    now = timezone.now()
    period = QuotaPeriod.objects.filter(tenant=OuterRef("pk"), key=None, starts_at__lte=now, ends_at__gt=now)
    usable = Q(api_keys__revoked_at__isnull=True) & (
        Q(api_keys__expires_at__isnull=True) | Q(api_keys__expires_at__gt=now)
    )
    found = (Tenant.objects.all() if rows is None else rows).select_related("plan").order_by("name")
    found = found.annotate(
        active_keys=Count("api_keys", filter=usable), used_now=Subquery(period.values("used_tokens")[:1])
    )
    return [
        {
            "id": row.pk,
            "name": row.name,
            "status": row.status,
            "plan": row.plan.name,
            "quota_anchor_day": row.quota_anchor_day,
            "active_keys": row.active_keys,
            "used_tokens": row.used_now or 0,
            "monthly_tokens": row.limits.monthly_tokens,
            "allowed_models": row.allowed_models,
            "allowed_adapters": row.allowed_adapters,
            "created_at": row.created_at,
        }
        for row in found
    ]
