"""Who changed what, newest first."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.management.arguments import duration, number
from accounts.management.base import HouseCommand
from accounts.models import AuditEntry

MOST = 10_000


class Command(HouseCommand):
    help = (
        "Show the audit log, newest first: who changed which row, when, what it was and what it is. "
        "Sign-ins are in it, too."
    )
    examples = (
        "audit_log",
        "audit_log --actor olga --within 7d",
        'audit_log --model accounts.tenant --name "Alice\'s" --json',
        "audit_log --action refused --most 500",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--actor", help="the whole name of a person, key or command")
        parser.add_argument("--action", choices=AuditEntry.Action.values)
        parser.add_argument("--model", help="such as accounts.tenant")
        parser.add_argument("--name", help="the beginning of the row's name")
        parser.add_argument("--within", type=duration, metavar="TIME", help="of the last 90s, 30m, 12h or 7d")
        parser.add_argument("--most", type=number(MOST), default=50, help="so many; 50 without it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = AuditEntry.objects.order_by("-pk")
        wanted = {
            "actor": options["actor"],
            "action": options["action"],
            "model": options["model"],
            "name__startswith": options["name"],
            "created_at__gte": options["within"] and timezone.now() - options["within"],
        }
        rows = rows.filter(**{name: value for name, value in wanted.items() if value})
        return {"entries": [_row(each) for each in rows[: options["most"]]]}

    def show(self, result: dict[str, Any]) -> None:
        if not result["entries"]:
            self.stdout.write("There is no such entry.")
        for row in result["entries"]:
            what = f"{row['model']} {row['name']}".strip()
            self.stdout.write(
                f"{row['created_at']:%Y-%m-%d %H:%M:%S} {row['actor_kind']} {row['actor']}: {row['action']} {what}"
            )
            for name, (was, now) in row["diff"].items():
                self.stdout.write(f"    {name}: {was} → {now}")


def _row(row: AuditEntry) -> dict[str, Any]:
    names = ("id", "created_at", "actor_kind", "actor", "action", "model", "row", "name", "diff")
    return {name: getattr(row, name) for name in names}
