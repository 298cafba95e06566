"""Models and adapters on their way in: how far they are, and cancelling."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.arguments import number
from accounts.management.base import HouseCommand
from inference.imports import desk
from inference.imports.models import ModelImport

ACTIONS = ("list", "cancel")
MOST = 10_000


class Command(HouseCommand):
    help = (
        "List imports of models and adapters, newest first, and how far they are, or cancel some: what has come is "
        "removed, what is registered stays. fetch_model begins one."
    )
    examples = ("imports", "imports list --open --json", "imports cancel 12 13")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("ids", nargs="*", type=int, metavar="import", help="numbers, as the list has them")
        parser.add_argument("--open", action="store_true", help="only those that have not ended")
        parser.add_argument("--most", type=number(MOST), default=50, help="list so many; 50 without it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = ModelImport.objects.select_related("base_model").order_by("-id")
        if options["open"]:
            rows = rows.filter(state__in=ModelImport.OPEN)
        if ids := set(options["ids"]):
            rows = rows.filter(pk__in=ids)
            if missing := sorted(ids - {row.pk for row in rows}):
                self.fail("import_not_found", f"There is no such import: {', '.join(map(str, missing))}.")
        if options["action"] == "list":
            return {"imports": [_row(each) for each in rows[: options["most"]]]}
        if not ids:
            self.fail("import_missing", "Say which: imports cancel NUMBER.")
        cancelled = [row.pk for row in rows if desk.cancel(row)]
        return {"cancelled": cancelled, "imports": [_row(each) for each in rows.all()]}

    def show(self, result: dict[str, Any]) -> None:
        if "cancelled" in result:
            self.stdout.write(f"{len(result['cancelled'])} cancelled; what had ended stays as it is.")
        if not result["imports"]:
            self.stdout.write("There is no such import.")
            return
        table = Table("import", "kind", "name", "state", "bytes", "of", "asked by", "problem", box=None)
        for row in result["imports"]:
            table.add_row(
                str(row["id"]),
                row["kind"],
                row["name"],
                row["state"],
                f"{row['received_bytes']:,}",
                "-" if row["total_bytes"] is None else f"{row['total_bytes']:,}",
                row["asked_by"],
                row["problem"],
            )
        self.print_table(table)


def _row(row: ModelImport) -> dict[str, Any]:
    names = ("id", "kind", "name", "url", "state", "received_bytes", "total_bytes", "asked_by", "problem", "created_at")
    return {**{name: getattr(row, name) for name in names}, "model": row.base_model.name if row.base_model else None}
