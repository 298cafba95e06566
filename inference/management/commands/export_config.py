"""Write the configuration as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from inference.site_file import site_yaml


class Command(HouseCommand):
    help = (
        "Write plans, tenants, prices, limits, models, adapters and grants as YAML, for a repository of one's own. No "
        "secret is in it: keys are named by their public part. apply_config reads it."
    )
    examples = (
        "export_config --out site.yaml",
        "export_config",
        "export_config --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--out", help="write to this file; standard output without it")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        found = site_yaml.export()
        self._path = options["out"]
        if self._path:
            try:
                Path(self._path).write_text(site_yaml.as_yaml(found), encoding="utf-8")
            except OSError as error:
                self.fail("not_written", f"{self._path} cannot be written: {error.strerror}")
        return found

    def show(self, result: dict[str, Any]) -> None:
        if self._path:
            counts = ", ".join(f"{len(result[name])} {name}" for name in ("plans", "tenants", "models"))
            self.stdout.write(f"Written to {self._path}: {counts}.")
        else:
            self.stdout.write(site_yaml.as_yaml(result), ending="")
