"""What diff_config and apply_config share: the file or standard input, and the changes on the screen."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from django.core.management.base import CommandParser
from rich.text import Text

from accounts.management.base import HouseCommand
from inference.management.listing import hashing
from inference.site_file import site_yaml
from inference.site_file.models_form import ModelsYamlError
from inference.site_file.plan import NOTHING, SitePlan
from inference.site_file.site_yaml import MAX_FILE_BYTES
from inference.vetting.inspection import absolute

STDIN = "-"
SIGNS = {"created": ("+", "green"), "updated": ("~", "yellow"), "switched_off": ("-", "red"), "suspended": ("-", "red")}


class SiteFileCommand(HouseCommand):
    """Reads a file, compares it, says what differs."""

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", nargs="?", default=STDIN, help="the file; - or nothing is standard input")
        parser.add_argument(
            "--prune",
            action="store_true",
            help="switch off models and suspend tenants that the lists of them in the file do not name",
        )

    def prepared(self, options: dict[str, Any], *, dry_run: bool) -> SitePlan:
        name = options["file"]
        path = absolute("standard input" if name == STDIN else name)
        try:
            file = site_yaml.parse(self._text(name), "standard input" if name == STDIN else str(path))
            with hashing(self.console, hidden=self.as_json) as progress:
                return site_yaml.prepare(file, path, dry_run=dry_run, prune=options["prune"], progress=progress)
        except ModelsYamlError as error:
            self.refuse(error)

    def refuse(self, error: ModelsYamlError) -> NoReturn:
        code = {"models_yaml_invalid": "config_invalid"}.get(error.code, error.code)
        self.fail(code, "\n".join(error.problems), problems=error.problems)

    def _text(self, name: str) -> str:
        try:
            if name == STDIN:
                data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
            else:
                with Path(name).open("rb") as file:
                    data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                self.fail("config_too_large", f"The file is larger than {MAX_FILE_BYTES >> 20} MiB.")
            return data.decode()
        except FileNotFoundError:
            self.fail("config_missing", f"There is no file {name}: `manage.py export_config --out {name}` writes one.")
        except (OSError, UnicodeDecodeError) as error:
            self.fail("config_unreadable", f"{name} cannot be read: {error}")

    def as_result(self, plan: SitePlan) -> dict[str, Any]:
        return {
            "differs": plan.differs,
            "changes": [asdict(change) for change in plan.changes if change.action not in NOTHING],
            "left": [f"{change.kind} {change.name}" for change in plan.changes if change.action == "left"],
            "num_unchanged": sum(change.action == "unchanged" for change in plan.changes),
            "warnings": plan.warnings,
        }

    def show(self, result: Any) -> None:
        console = self.console
        for change in result["changes"]:
            sign, style = SIGNS[change["action"]]
            console.print(Text(f"{sign} {change['kind']:<8}{change['name']}  {change['action']}", style=style))
            for name, text in change["details"].items():
                console.print(Text(f"    {name}: {text}"))
        if result["left"]:
            console.print(Text(f"not in the file, left as they are: {', '.join(result['left'])}", style="dim"))
        for warning in result["warnings"]:
            self.stderr.write(f"warning: {warning}")
