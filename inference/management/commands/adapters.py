"""The adapters: which there are, switching on and off, and removing."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.base import HouseCommand
from inference.catalog import adapter_rows
from inference.management.naming import adapter_named, as_adapter_row, model_named
from inference.models import Adapter
from inference.vetting.inspection import RegistrationError

ACTIONS = ("list", "switch-on", "switch-off", "remove")


class Command(HouseCommand):
    help = (
        "List the LoRA adapters: model, rank, targets, who may use them and with which id. Or switch some on or off, "
        "then they do not exist for tenants, or remove them with their grants; their files stay."
    )
    examples = (
        "adapters",
        "adapters --model smollm2",
        "adapters --json",
        "adapters switch-off smollm2:poet",
        "adapters remove smollm2:poet",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("names", nargs="*", metavar="adapter", help="model:adapter")
        parser.add_argument("--model", help="of this model only")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        action = options["action"]
        chosen = [adapter_named(self, name) for name in options["names"]]
        pks = [row.pk for row in chosen]
        if action != "list" and not chosen:
            self.fail("adapter_missing", f"Say which: adapters {action} MODEL:ADAPTER.")
        if action == "remove":
            try:
                adapter_rows.remove(pks)
            except RegistrationError as error:
                self.fail(error.code, error.message)
            return {"removed": [str(row) for row in chosen]}
        if action != "list":
            adapter_rows.set_enabled(pks, action == "switch-on")
        rows = Adapter.objects.select_related("base_model", "owner").order_by("base_model__name", "name")
        if options["model"]:
            rows = rows.filter(base_model=model_named(self, options["model"]))
        rows = rows.filter(pk__in=pks) if pks else rows
        return {"adapters": [as_adapter_row(row) for row in rows]}

    def show(self, result: dict[str, Any]) -> None:
        if "removed" in result:
            self.stdout.write(f"Removed: {', '.join(result['removed'])}. The files stay.")
            return
        if not result["adapters"]:
            self.stdout.write("No adapter is registered: python manage.py register_adapter PATH --model MODEL")
            return
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
        self.print_table(table)
