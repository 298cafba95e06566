"""Put a backup in the place of this installation's data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.management.base import HouseCommand
from llmsite import backup


class Command(HouseCommand):
    help = (
        "Put a backup in the place of this installation's data, migrate it, and prove its ledger as audit_ledger does. "
        "Every checksum is compared first. A site that runs is refused, and so is a target that holds something."
    )
    examples = (
        "restore /mnt/backups/monday.tar.gz",
        "restore /mnt/backups/monday.tar.gz --replace --json",
    )
    requires_system_checks: list[str] = []  # there may be no database yet

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", help="a file that `manage.py backup` wrote")
        parser.add_argument("--replace", action="store_true", help="also where there are tenants or users already")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        path = Path(options["file"]).expanduser().absolute()
        with self.console.status("") as status:
            try:
                done = backup.restore(
                    settings.CONFIG,
                    path,
                    timezone.now(),
                    replace=options["replace"],
                    say=lambda text: None if self.as_json else status.update(text),
                )
            except backup.BackupError as error:
                self.fail(error.code, str(error))
        ledger = {**asdict(done.report), "clean": done.report.is_clean}
        if not done.report.is_clean:
            message = f"The data is in place, but its ledger does not hold: {len(done.report.problems)} problems."
            self.fail("ledger_differs", message, ledger=ledger, kept=done.kept)
        return {
            "file": str(path),
            "made_at": done.manifest.made_at,
            "engine": done.manifest.engine,
            "num_files": done.num_files,
            "kept": done.kept,
            "warnings": done.warnings,
            "ledger": ledger,
        }

    def show(self, result: dict[str, Any]) -> None:
        for warning in result["warnings"]:
            self.stderr.write(f"warning: {warning}")
        for path in result["kept"]:
            self.stdout.write(f"What was there before is {path}.")
        ledger = result["ledger"]
        self.stdout.write(
            f"Restored what was there at {result['made_at']}. The ledger holds: {ledger['num_entries']:,} entries, "
            f"{ledger['used_tokens']:,} tokens charged."
        )
