"""Keep a model in memory."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from inference.catalog import model_rows
from inference.management.naming import served_named


class Command(HouseCommand):
    help = "Keep a model in memory once it is loaded: neither idle time nor another model unloads it."
    examples = ("pin_model smollm2", "pin_model smollm2 --off")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the model's name or alias")
        parser.add_argument("--off", action="store_true", help="let it be unloaded again")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        served = served_named(self, options["name"])
        changed = model_rows.pin([served.id], not options["off"])
        return {"model": served.name, "pinned": not options["off"], "changed": bool(changed)}

    def show(self, result: dict[str, Any]) -> None:
        words = "stays in memory once it is loaded" if result["pinned"] else "may be unloaded"
        self.stdout.write(f"{result['model']} {words}.")
