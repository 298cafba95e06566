"""The served models: which there are, when they are loaded, and removing."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.db.models import ProtectedError
from rich.table import Table

from accounts.management.base import HouseCommand
from inference.catalog import model_rows, registry
from inference.management.listing import as_row
from inference.management.naming import model_named
from inference.models import ServedModel

LOAD_MODES = {
    "eager": ServedModel.LoadMode.EAGER,
    "lazy": ServedModel.LoadMode.LAZY,
    "switch-off": ServedModel.LoadMode.OFF,
}
ACTIONS = ("list", *LOAD_MODES, "default", "remove")
MOST_NAMED = 10


class Command(HouseCommand):
    help = (
        "List the served models: file, context, slots, memory, when they are loaded. Or have some loaded when a worker "
        "starts (eager) or on their first request (lazy), switch them off, make one the default, or remove them: their "
        "variants and aliases go with them, their files stay. One with adapters, or that guesses for another, is not "
        "removed."
    )
    examples = (
        "models",
        "models --json",
        "models switch-off smollm2",
        "models lazy smollm2",
        "models default smollm2",
        "models remove smollm2",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("names", nargs="*", metavar="name", help="of models; default takes one")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        action = options["action"]
        chosen = [model_named(self, name) for name in options["names"]]
        pks = [row.pk for row in chosen]
        if action != "list" and not chosen:
            self.fail("model_missing", f"Say which: models {action} NAME.")
        if action == "remove":
            self._remove(pks)
            return {"removed": [row.name for row in chosen]}
        if action == "default":
            if len(chosen) != 1:
                self.fail("model_ambiguous", "Only one model can be the default.")
            model_rows.make_default(pks[0])
        elif action != "list":
            model_rows.set_load_mode(pks, LOAD_MODES[action])
        rows = ServedModel.objects.select_related("draft_model").order_by("name")
        found = registry.with_active_variants(rows.filter(pk__in=pks) if pks else rows)
        return {"models": [as_row(row) for row in found]}

    def _remove(self, pks: list[int]) -> None:
        try:
            model_rows.remove(pks)
        except ProtectedError as error:
            named = sorted({f"{row._meta.verbose_name} {row}" for row in error.protected_objects})
            self.fail("model_in_use", f"Nothing was removed, it is needed by: {', '.join(named[:MOST_NAMED])}.")

    def show(self, result: dict[str, Any]) -> None:
        if "removed" in result:
            self.stdout.write(f"Removed: {', '.join(result['removed'])}. The files stay.")
            return
        if not result["models"]:
            self.stdout.write("No model is registered: python manage.py register_model PATH --name NAME")
            return
        table = Table("name", "file type", "parameters", "slots × context", "memory", "load", "pool", "file", box=None)
        for model in result["models"]:
            table.add_row(
                model["name"] + (" (default)" if model["default"] else ""),
                model["quantization"] + (f" (variant {model['variant']})" if model["variant"] else ""),
                f"{model['num_parameters'] / 1e6:,.0f} M",
                f"{model['n_slots']} × {model['n_ctx']}",
                f"{model['memory_bytes'] / 1e6:,.0f} MB",
                model["load_mode"],
                model["pool"],
                model["path"],
            )
        self.print_table(table)
