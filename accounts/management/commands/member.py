"""Members of tenants: who belongs to which, and as what."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.arguments import person_named, sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import Membership, Tenant

ACTIONS = ("list", "add", "change", "remove")


class Command(HouseCommand):
    help = (
        "List who belongs to which tenant, add a person to one, give a member another role, or remove one. "
        "Accounts are made by the command person."
    )
    examples = (
        "member",
        'member list --tenant "Alice\'s" --json',
        'member add alice --tenant "Alice\'s" --role owner',
        'member change alice --tenant "Alice\'s" --role viewer',
        'member remove alice --tenant "Alice\'s"',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("person", nargs="?", help="the name that the person signs in with")
        parser.add_argument("--tenant", help="the tenant's name")
        parser.add_argument("--role", choices=Membership.MemberRole.values, help="member, unless it says, for add")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        action = options["action"]
        tenant = tenant_named(self, options["tenant"]) if options["tenant"] else None
        user = person_named(self, options["person"]) if options["person"] else None
        if action == "list":
            rows = Membership.objects.select_related("tenant", "user").order_by("tenant__name", "user__username")
            rows = rows.filter(tenant=tenant) if tenant else rows
            return {"members": [_row(each) for each in (rows.filter(user=user) if user else rows)]}
        if tenant is None or user is None:
            self.fail("member_missing", f"Say who and where: member {action} PERSON --tenant NAME.")
        if action == "add":
            row = Membership(tenant=tenant, user=user, role=options["role"] or Membership.MemberRole.MEMBER)
        else:
            row = self._there(tenant, user)
        if action == "remove":
            shown = _row(row)
            row.delete()
            return {"removed": shown}
        if action == "change":
            if options["role"] is None:
                self.fail("role_missing", f"Give --role: {', '.join(Membership.MemberRole.values)}.")
            row.role = options["role"]
        try:
            row.full_clean()
        except ValidationError as error:
            self.fail("member_invalid", sentence(error))
        row.save()
        return {"members": [_row(row)]}

    def _there(self, tenant: Tenant, user: Any) -> Membership:
        row = Membership.objects.select_related("tenant", "user").filter(tenant=tenant, user=user).first()
        if row is None:
            self.fail("member_not_found", f"{user.get_username()} does not belong to {tenant.name}.")
        return row

    def show(self, result: dict[str, Any]) -> None:
        if "removed" in result:
            self.stdout.write(f"{result['removed']['person']} belongs to {result['removed']['tenant']} no more.")
            return
        table = Table("tenant", "person", "role", box=None)
        for row in result["members"]:
            table.add_row(row["tenant"], row["person"], row["role"])
        self.print_table(table)


def _row(row: Membership) -> dict[str, Any]:
    return {
        "tenant": row.tenant.name,
        "person": row.user.get_username(),
        "role": row.role,
        "created_at": row.created_at,
    }
