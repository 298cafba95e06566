"""List the served models."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from accounts.management.base import HouseCommand
from inference.management.listing import as_row
from inference.models import ServedModel

WIDE = 400


class Command(HouseCommand):
    help = "List the served models: file, context, slots, memory, when they are loaded."
    examples = ("models", "models --json")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"models": [as_row(row) for row in ServedModel.objects.select_related("draft_model").order_by("name")]}

    def show(self, result: dict[str, Any]) -> None:
        if not result["models"]:
            self.stdout.write("No model is registered: python manage.py register_model PATH --name NAME")
            return
        console = self.console
        if not console.is_terminal:  # a pipe or a file has no width to keep to
            console.width = WIDE
        table = Table("name", "file type", "parameters", "slots × context", "memory", "load", "pool", "file", box=None)
        for model in result["models"]:
            table.add_row(
                model["name"] + (" (default)" if model["default"] else ""),
                model["quantization"],
                f"{model['num_parameters'] / 1e6:,.0f} M",
                f"{model['n_slots']} × {model['n_ctx']}",
                f"{model['memory_bytes'] / 1e6:,.0f} MB",
                model["load_mode"],
                model["pool"],
                model["path"],
            )
        console.print(table)
