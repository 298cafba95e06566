"""Refused requests, newest first."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone
from rich.table import Table

from accounts.management.arguments import duration, number, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import RefusedRequest

MOST = 10_000


class Command(HouseCommand):
    help = (
        "List refused requests, newest first: when, whose, the code, and the limit that bound. "
        "Why one was refused in a sentence says explain."
    )
    examples = (
        "refusals",
        'refusals --tenant "Alice\'s" --within 1h',
        "refusals --code quota_exhausted --most 500 --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", help="of this tenant")
        parser.add_argument("--code", help="with this code (docs/errors.md)")
        parser.add_argument("--within", type=duration, metavar="TIME", help="of the last 90s, 30m, 12h or 7d")
        parser.add_argument("--most", type=number(MOST), default=50, help="so many; 50 without it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = RefusedRequest.objects.select_related("tenant", "key").order_by("-pk")
        if options["tenant"]:
            rows = rows.filter(tenant=tenant_named(self, options["tenant"]))
        if options["code"]:
            rows = rows.filter(code=options["code"])
        if options["within"]:
            rows = rows.filter(created_at__gte=timezone.now() - options["within"])
        return {"refusals": [_row(each) for each in rows[: options["most"]]]}

    def show(self, result: dict[str, Any]) -> None:
        if not result["refusals"]:
            self.stdout.write("Nothing was refused.")
            return
        table = Table("time (UTC)", "request", "tenant", "code", "limit", "value", "route", box=None)
        for row in result["refusals"]:
            limit = f"{row['limit']} of the {row['of']}" if row["of"] else row["limit"]
            more = f" and {row['num_more']:,} more" if row["num_more"] else ""
            table.add_row(
                f"{row['created_at']:%Y-%m-%d %H:%M:%S}",
                row["request_id"],
                row["tenant"] or "-",
                row["code"] + more,
                limit or "-",
                "-" if row["value"] is None else f"{row['value']:,}",
                row["route"],
            )
        self.print_table(table)


def _row(row: RefusedRequest) -> dict[str, Any]:
    return {
        "request_id": row.request_id,
        "created_at": row.created_at,
        "tenant": row.tenant.name if row.tenant else None,
        "key": row.key.display if row.key else None,
        "route": row.route,
        "code": row.code,
        "limit": row.limit,
        "of": row.bound_to,
        "value": row.value,
        "frees_at": row.frees_at,
        "message": row.message,
        "num_more": row.num_more,
    }
