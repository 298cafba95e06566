"""Make the registry what models.yaml says."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from inference.management.listing import hashing
from inference.site_file import models_yaml
from inference.site_file.models_form import ModelsYamlError, place_of_file


class Command(HouseCommand):
    help = (
        "Make the registry what a models.yaml says: the file of MODELS_YAML, else of --file, else config/models.yaml. "
        "All of it or nothing; running it twice changes nothing. The format is in docs/registry.md."
    )
    examples = (
        "sync_models --dry-run",
        "sync_models --file /etc/llmsite/models.yaml --prune",
        "sync_models --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--file", help="the file; MODELS_YAML in the environment comes first")
        parser.add_argument("--dry-run", action="store_true", help="check the file and say what would change")
        parser.add_argument("--prune", action="store_true", help="switch off models that the file does not name")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        path = place_of_file(options["file"])
        try:
            with hashing(self.console, hidden=self.as_json) as progress:
                outcome = models_yaml.sync(path, dry_run=options["dry_run"], prune=options["prune"], progress=progress)
        except ModelsYamlError as error:
            self.fail(error.code, "\n".join(error.problems), problems=error.problems)
        return {
            "file": str(outcome.path),
            "dry_run": options["dry_run"],
            "default_model": outcome.default,
            "changes": [asdict(change) for change in outcome.changes],
            "warnings": outcome.warnings,
        }

    def show(self, result: dict[str, Any]) -> None:
        for warning in result["warnings"]:
            self.stderr.write(f"warning: {warning}")
        for change in result["changes"]:
            details = "; ".join(f"{name}: {text}" for name, text in change["details"].items())
            self.stdout.write(f"{change['action']:<13}{change['name']}{'  ' + details if details else ''}")
        self.stdout.write(f"default      {result['default_model'] or 'none'}")
        if result["dry_run"]:
            self.stdout.write("Nothing was changed: this was a dry run.")
