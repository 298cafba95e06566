"""Searches for the fastest file of a model: how far they are, what they found, and cancelling."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.arguments import number
from accounts.management.base import HouseCommand
from inference.tuning import desk
from inference.tuning.models import Optimization

ACTIONS = ("list", "cancel")
MOST = 10_000


class Command(HouseCommand):
    help = (
        "List what optimize_model and the console have measured or are measuring, newest first, or cancel one that "
        "runs: nothing of it is kept."
    )
    examples = ("optimizations", "optimizations list 7 --json", "optimizations cancel 7")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("ids", nargs="*", type=int, metavar="optimization", help="numbers, as the list has them")
        parser.add_argument("--most", type=number(MOST), default=50, help="list so many; 50 without it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = Optimization.objects.order_by("-id")
        if ids := set(options["ids"]):
            rows = rows.filter(pk__in=ids)
            if missing := sorted(ids - {row.pk for row in rows}):
                self.fail("optimization_not_found", f"There is no such one: {', '.join(map(str, missing))}.")
        if options["action"] == "list":
            return {"optimizations": [_row(each) for each in rows[: options["most"]]]}
        if not ids:
            self.fail("optimization_missing", "Say which: optimizations cancel NUMBER.")
        cancelled = [row.pk for row in rows if desk.cancel(row)]
        return {"cancelled": cancelled, "optimizations": [_row(each) for each in rows.all()]}

    def show(self, result: dict[str, Any]) -> None:
        if "cancelled" in result:
            self.stdout.write(f"{len(result['cancelled'])} cancelled; what had ended stays as it is.")
        table = Table("number", "model", "state", "now", "steps", "of", "kept", "gain", "asked by", "problem", box=None)
        for row in result["optimizations"]:
            found = row["result"] or {}
            table.add_row(
                str(row["id"]),
                row["name"],
                row["state"],
                row["step"] if row["state"] == Optimization.State.RUNNING else "",
                str(row["steps_done"]),
                str(row["steps_total"]),
                (found.get("variant") or {}).get("name", "-"),
                "-" if found.get("gain") is None else f"{found['gain']:.2f}x",
                row["asked_by"],
                row["problem"],
            )
        self.print_table(table)


def _row(row: Optimization) -> dict[str, Any]:
    names = ("id", "name", "state", "step", "part", "steps_done", "steps_total", "problem", "result")
    return {name: getattr(row, name) for name in (*names, "asked_by", "host", "created_at", "started_at")}
