"""Batches: which there are and how far, and cancelling."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone
from rich.table import Table

from accounts.management.arguments import number, tenant_named
from accounts.management.base import HouseCommand
from inference.batches import book, files
from inference.batches.models import Batch

ACTIONS = ("list", "cancel")
MOST = 10_000


class Command(HouseCommand):
    help = (
        "List batches, newest first, and how far they are, or cancel some: lines that run may end, the others are not "
        "begun. What their lines say is not shown."
    )
    examples = (
        "batches",
        'batches list --tenant "Alice\'s" --open --json',
        "batches cancel batch_0123456789abcdef01234567",
        'batches cancel --tenant "Alice\'s"',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("ids", nargs="*", metavar="batch", help="whole ids")
        parser.add_argument("--tenant", help="of this tenant; with cancel: all of its batches that are open")
        parser.add_argument("--open", action="store_true", help="only those that have not ended")
        parser.add_argument("--most", type=number(MOST), default=50, help="list so many; 50 without it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = Batch.objects.select_related("tenant").order_by("-created_at", "-id")
        ids = list(dict.fromkeys(options["ids"]))
        if options["tenant"]:
            rows = rows.filter(tenant=tenant_named(self, options["tenant"]))
        if options["open"]:
            rows = rows.filter(status__in=files.OPEN_STATES)
        if ids:
            rows = rows.filter(pk__in=ids)
            if missing := sorted(set(ids) - {row.pk for row in rows}):
                self.fail("batch_not_found", f"There is no such batch: {', '.join(missing)}.")
        if options["action"] == "list":
            return {"batches": [_row(each) for each in rows[: options["most"]]]}
        if not ids and not options["tenant"]:
            self.fail("batch_missing", "Say which: batches cancel BATCH, or --tenant NAME for all that are open.")
        meant = rows if ids else rows.filter(status__in=book.CANCELLABLE)
        cancelled = [row.pk for row in meant if book.cancel_by_hand(row, timezone.now())]
        shown = Batch.objects.select_related("tenant").filter(pk__in=ids or cancelled)
        return {"cancelled": cancelled, "batches": [_row(each) for each in shown.order_by("-created_at", "-id")]}

    def show(self, result: dict[str, Any]) -> None:
        if "cancelled" in result:
            self.stdout.write(f"{len(result['cancelled'])} cancelled; what had ended stays as it is.")
        if not result["batches"]:
            self.stdout.write("There is no such batch.")
            return
        table = Table("batch", "tenant", "state", "lines", "done", "failed", "endpoint", "made (UTC)", box=None)
        for row in result["batches"]:
            table.add_row(
                row["id"],
                row["tenant"],
                row["status"],
                f"{row['lines']:,}",
                f"{row['completed']:,}",
                f"{row['failed']:,}",
                row["endpoint"],
                f"{row['created_at']:%Y-%m-%d %H:%M}",
            )
        self.print_table(table)


def _row(row: Batch) -> dict[str, Any]:
    return {
        "id": row.pk,
        "tenant": row.tenant.name,
        "status": str(row.status),
        "endpoint": row.endpoint,
        "lines": row.num_lines,
        "completed": row.num_completed,
        "failed": row.num_failed,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
    }
