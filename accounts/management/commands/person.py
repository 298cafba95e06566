"""People who sign in to the console: accounts, roles in the installation, locking."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db import transaction
from django.db.models.functions import Lower
from rich.table import Table

from accounts.management.arguments import person_named, sentence
from accounts.management.base import HouseCommand
from accounts.models import StaffRole

ACTIONS = ("list", "add", "role", "lock", "unlock")
NO_ROLE = "none"


class Command(HouseCommand):
    help = (
        "List the accounts of the console, add one, make a person operator or auditor of the installation, or lock an "
        "account: its sessions end at the next page. Superusers are made by createsuperuser, passwords set by "
        "changepassword."
    )
    examples = (
        "person",
        "person add olga --email olga@example.org",
        "person role olga operator",
        "person role olga none --json",
        "person lock olga",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("name", nargs="?", help="that the person signs in with")
        parser.add_argument("role", nargs="?", choices=(*StaffRole.Role.values, NO_ROLE), help="for role")
        parser.add_argument("--email", default="", help="for add")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        action, name = options["action"], options["name"]
        if action == "list":
            rows = User.objects.select_related("staff_role").order_by(Lower("username"))
            return {"people": [_row(each) for each in ([person_named(self, name)] if name else rows)]}
        if not name:
            self.fail("person_missing", f"Say who: person {action} NAME.")
        if action == "add":
            return {"people": [_row(self._add(name, options["email"]))]}
        user = person_named(self, name)
        if action == "role":
            self._give(user, options["role"])
        else:
            user.is_active = action == "unlock"
            user.save(update_fields=["is_active"])
        return {"people": [_row(person_named(self, name))]}

    def _add(self, name: str, email: str) -> User:
        user = User(username=name, email=email)
        user.set_unusable_password()
        try:
            user.full_clean()
        except ValidationError as error:
            self.fail("person_invalid", sentence(error))
        user.save()
        return user

    def _give(self, user: User, role: str | None) -> None:
        if role is None:
            self.fail("role_missing", f"Say which: {', '.join(StaffRole.Role.values)} or {NO_ROLE}.")
        with transaction.atomic():
            row = StaffRole.objects.filter(user=user).first() or StaffRole(user=user)
            if role == NO_ROLE:
                if row.pk is not None:
                    row.delete()
                return
            row.role = role
            row.save()

    def show(self, result: dict[str, Any]) -> None:
        table = Table("person", "role", "state", "last sign-in", box=None)
        for row in result["people"]:
            last = f"{row['last_sign_in']:%Y-%m-%d %H:%M}" if row["last_sign_in"] else "never"
            state = "locked" if not row["is_active"] else "active" if row["has_password"] else "has no password yet"
            table.add_row(row["name"], row["role"], state, last)
        self.print_table(table)
        if any(not row["has_password"] for row in result["people"]):
            self.stdout.write("A password is set by: python manage.py changepassword NAME")


def _row(user: User) -> dict[str, Any]:
    staff_role: StaffRole | None = getattr(user, "staff_role", None)
    return {
        "id": user.pk,
        "name": user.get_username(),
        "email": user.email,
        "role": "superuser" if user.is_superuser else staff_role.role if staff_role else NO_ROLE,
        "is_active": user.is_active,
        "has_password": user.has_usable_password(),
        "last_sign_in": user.last_login,
    }
