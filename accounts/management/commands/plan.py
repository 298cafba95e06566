"""Plans: list, make, change, remove."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db.models import Count, ProtectedError
from rich.table import Table

from accounts.limits.precedence import LIMIT_NAMES
from accounts.management.arguments import INHERIT, add_allowed, add_limits, allowed, overrides, plan_meant, sentence
from accounts.management.base import HouseCommand
from accounts.models import Plan, Role

ACTIONS = ("list", "make", "change", "remove")
POLICIES = ("installation", "closed", "open")
NO_LIMIT = "unlimited"


class Command(HouseCommand):
    help = (
        "List the plans with their limits, make one, change one, or remove one that no tenant is on. "
        "A change counts for all its tenants at once."
    )
    examples = (
        "plan",
        "plan make team --requests-per-minute 300 --monthly-tokens 20000000 --weight 200",
        "plan change free --concurrent-requests 2 --max-slots 1 --json",
        "plan change team --monthly-tokens unlimited --allowed-models small,large",
        "plan remove team",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("name", nargs="?", help="of the plan")
        parser.add_argument("--new-name", help="for change")
        parser.add_argument("--role", choices=Role.values, help="what kind of customers it is for")
        parser.add_argument("--weight", type=int, metavar="PERCENT", help="share of the slots while others wait")
        parser.add_argument("--max-slots", metavar="N", help=f"requests of a tenant that run at once, or `{NO_LIMIT}`")
        parser.add_argument(
            "--redis-outage-policy", choices=POLICIES, help="requests a minute while they cannot be counted"
        )
        add_limits(parser, inherit=False)
        add_allowed(parser)

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        action, name = options["action"], options["name"]
        if action != "list" and not name:
            self.fail("plan_missing", f"Say which: plan {action} NAME.")
        if action == "remove":
            return self._remove(plan_meant(self, name))
        if action == "list":
            rows = Plan.objects.filter(pk=plan_meant(self, name).pk) if name else Plan.objects.all()
            return {"plans": _rows(rows)}
        if action == "make" and Plan.objects.filter(name=name).exists():
            self.fail("plan_invalid", f"There is a plan {name!r} already: plan change {name}.")
        row = Plan(name=name) if action == "make" else plan_meant(self, name)
        self._save(row, options)
        return {"plans": _rows(Plan.objects.filter(pk=row.pk))}

    def _save(self, row: Plan, options: dict[str, Any]) -> None:
        wanted: dict[str, Any] = {**overrides(options, {}), **allowed(options)}
        plain = {"name": options["new_name"], "role": options["role"], "weight": options["weight"]}
        wanted |= {name: value for name, value in plain.items() if value is not None}
        if options["redis_outage_policy"] is not None:
            policy = options["redis_outage_policy"]
            wanted["redis_outage_policy"] = "" if policy == POLICIES[0] else policy
        if options["max_slots"] is not None:
            wanted["max_slots"] = None if options["max_slots"] == NO_LIMIT else options["max_slots"]
        if any(options[name] == INHERIT for name in LIMIT_NAMES):
            self.fail("limits_invalid", f"A plan inherits from nothing: give a number or `{NO_LIMIT}`.")
        if row.pk is not None and not wanted:
            self.fail("nothing_to_change", "Say what to change, such as --monthly-tokens; --help lists it.")
        for name, value in wanted.items():
            setattr(row, name, value)
        try:
            row.full_clean()
            row.save()
        except ValidationError as error:
            self.fail("plan_invalid", sentence(error))

    def _remove(self, row: Plan) -> dict[str, Any]:
        shown = _rows(Plan.objects.filter(pk=row.pk))[0]
        try:
            row.delete()
        except ProtectedError:
            self.fail("plan_in_use", f"{shown['tenants']} tenants are on the plan {row.name}: move them first.")
        return {"removed": shown}

    def show(self, result: dict[str, Any]) -> None:
        if "removed" in result:
            self.stdout.write(f"Removed the plan {result['removed']['name']}.")
            return
        table = Table("plan", "role", "tenants", "weight", "slots", "limits", "models", "adapters", box=None)
        for row in result["plans"]:
            limits = ", ".join(f"{name} {value:,}" for name, value in row["limits"].items() if value is not None)
            table.add_row(
                row["name"],
                row["role"],
                str(row["tenants"]),
                f"{row['weight']} %",
                "any" if row["max_slots"] is None else str(row["max_slots"]),
                limits or "none",
                _names(row["allowed_models"]),
                _names(row["allowed_adapters"]),
            )
        self.print_table(table)


def _names(found: list[str] | None) -> str:
    return "all" if found is None else ", ".join(found) or "none"


def _rows(plans: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": row.pk,
            "name": row.name,
            "role": row.role,
            "tenants": row.num_tenants,
            "limits": {name: getattr(row, name) for name in LIMIT_NAMES},
            "weight": row.weight,
            "max_slots": row.max_slots,
            "redis_outage_policy": row.redis_outage_policy or POLICIES[0],
            "allowed_models": row.allowed_models,
            "allowed_adapters": row.allowed_adapters,
        }
        for row in plans.annotate(num_tenants=Count("tenants")).order_by("name")
    ]
