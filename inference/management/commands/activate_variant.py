"""Serve a variant of a model under the model's name, or the model's own file again."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.base import HouseCommand
from inference.catalog import variants
from inference.management.naming import model_named
from inference.models import ModelVariant
from inference.vetting.inspection import RegistrationError


class Command(HouseCommand):
    help = (
        "Swap the file and settings that a model is served from; its name, its grants and its adapters stay. Workers "
        "follow within seconds, as soon as the model is idle. With --remove a variant is forgotten, its file stays. "
        "Without a variant: list those there are."
    )
    examples = (
        "activate_variant smollm2",
        "activate_variant smollm2 q8_0",
        "activate_variant smollm2 --revert",
        "activate_variant smollm2 q8_0 --remove",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("model", help="the served model")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("variant", nargs="?", help="one of its variants")
        which.add_argument("--revert", action="store_true", help="serve the model's own file again")
        parser.add_argument("--remove", action="store_true", help="forget the variant; an active one is reverted first")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        base = model_named(self, options["model"])
        changed = False
        if options["remove"] and not options["variant"]:
            self.fail("variant_missing", "Say which variant to remove.")
        if options["revert"]:
            changed = variants.revert(base)
        elif options["variant"]:
            row = ModelVariant.objects.filter(base_model=base, name=options["variant"]).first()
            if row is None:
                self.fail("variant_not_found", f"{base.name} has no variant {options['variant'][:64]!r}.")
            try:
                changed = bool(variants.remove([row.pk])) if options["remove"] else variants.activate(row)
            except RegistrationError as error:
                self.fail(error.code, error.message)
        rows = ModelVariant.objects.filter(base_model=base).select_related("base_model").order_by("name")
        return {
            "model": base.name,
            "changed": changed,
            "removed": options["variant"] if options["remove"] else None,
            "is_listing": not options["revert"] and not options["variant"],
            "variants": [variants.as_variant_row(each) for each in rows],
        }

    def show(self, result: dict[str, Any]) -> None:
        if result["is_listing"]:
            self._list(result)
            return
        if result["removed"]:
            self.stdout.write(f"Removed the variant {result['removed']} of {result['model']}; its file stays.")
            return
        active = next((each["name"] for each in result["variants"] if each["active"]), None)
        what = f"the variant {active}" if active else "its own file"
        self.stdout.write(f"{result['model']} {'is now' if result['changed'] else 'was already'} served from {what}.")

    def _list(self, result: dict[str, Any]) -> None:
        if not result["variants"]:
            self.stdout.write(f"No variant yet: python manage.py optimize_model {result['model']}")
            return
        table = Table("variant", "file type", "gain", "perplexity", "state", "file", box=None)
        for each in result["variants"]:
            state = "stale: the model's file has changed" if each["stale"] else "active" if each["active"] else ""
            table.add_row(
                each["name"],
                each["quantization"],
                f"{each['gain']:.2f}x" if each["gain"] else "-",
                f"{each['perplexity_increase_percent']:+.2f} %"
                if each["perplexity_increase_percent"] is not None
                else "-",
                state,
                each["path"],
            )
        self.print_table(table)
