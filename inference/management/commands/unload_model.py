"""Unload a model."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from inference.management.naming import served_named
from inference.transport import model_orders


class Command(HouseCommand):
    help = "Have all workers unload a model as soon as it is idle there. Its next request loads it again."
    examples = ("unload_model smollm2", "unload_model smollm2 --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", help="the model's name or alias")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        served = served_named(self, options["name"])
        return {"model": served.name, "num_workers": model_orders.unload(served)}

    def show(self, result: dict[str, Any]) -> None:
        if not result["num_workers"]:
            self.stdout.write(f"{result['model']} is not loaded.")
            return
        self.stdout.write(f"{result['model']} is unloaded as soon as it is idle.")
