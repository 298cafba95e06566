"""List the adapters."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.base import HouseCommand
from inference.management.naming import as_adapter_row, model_named
from inference.models import Adapter

WIDE = 400


class Command(HouseCommand):
    help = "List the LoRA adapters: model, rank, targets, who may use them and with which id."
    examples = ("adapters", "adapters --model smollm2", "adapters --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--model", help="of this model only")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = Adapter.objects.select_related("base_model", "owner").order_by("base_model__name", "name")
        if options["model"]:
            rows = rows.filter(base_model=model_named(self, options["model"]))
        return {"adapters": [as_adapter_row(row) for row in rows]}

    def show(self, result: dict[str, Any]) -> None:
        if not result["adapters"]:
            self.stdout.write("No adapter is registered: python manage.py register_adapter PATH --model MODEL")
            return
        console = self.console
        if not console.is_terminal:  # a pipe or a file has no width to keep to
            console.width = WIDE
        table = Table("name", "rank", "changes", "size", "scale", "for", "file", box=None)
        for adapter in result["adapters"]:
            granted = [f"{name} ({position})" for name, position in adapter["granted"].items()]
            users = (["every tenant"] if adapter["visibility"] == "shared" else []) + granted
            table.add_row(
                f"{adapter['model']}:{adapter['name']}" + ("" if adapter["enabled"] else " (off)"),
                str(adapter["rank"]),
                ", ".join(adapter["targets"]),
                f"{adapter['size_bytes'] / 1e6:,.1f} MB",
                f"{adapter['default_scale']:g}",
                ", ".join(users) or "nobody",
                adapter["path"],
            )
        console.print(table)
