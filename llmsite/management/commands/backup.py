"""Write a backup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.management.base import HouseCommand
from llmsite import backup


class Command(HouseCommand):
    help = (
        "Write the database to one file with checksums, while requests are served. Secrets and uploaded files are in "
        "it only when asked for. Stored responses are in the database, so keep the file as safe as that."
    )
    examples = (
        "backup",
        "backup --to /mnt/backups/monday.tar.gz --with-files",
        "backup --with-secrets --with-files --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--to", help="the file to write; STATE_DIR/backups/llmsite-<time>.tar.gz without it")
        parser.add_argument(
            "--with-secrets",
            action="store_true",
            help="the pepper and the secret key of STATE_DIR: whoever has it is you",
        )
        parser.add_argument(
            "--with-files", action="store_true", help="models and adapters below STATE_DIR; may be large"
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        config, now = settings.CONFIG, timezone.now()
        named = options["to"] or config.state / "backups" / f"llmsite-{now:%Y%m%dT%H%M%S}.tar.gz"
        path = Path(named).expanduser().absolute()
        with self.console.status("") as status:
            try:
                manifest = backup.make(
                    config,
                    path,
                    now,
                    with_secrets=options["with_secrets"],
                    with_files=options["with_files"],
                    say=lambda text: None if self.as_json else status.update(text),
                )
            except backup.BackupError as error:
                self.fail(error.code, str(error))
        return {
            "file": str(path),
            "bytes": path.stat().st_size,
            "engine": manifest.engine,
            "has_secrets": manifest.has_secrets,
            "num_files": manifest.num_files,
            "warnings": list(self._warnings(options, manifest)),
        }

    def _warnings(self, options: dict[str, Any], manifest: backup.Manifest) -> list[str]:
        if manifest.has_secrets:
            return ["The pepper and the secret key are in this file: whoever has it can sign in as anybody."]
        if options["with_secrets"]:
            return ["SECRET_KEY and KEY_PEPPER come from the environment and are not in STATE_DIR: keep them yourself."]
        return ["The pepper is not in this file: without it no API key of the backup works. Keep KEY_PEPPER elsewhere."]

    def show(self, result: dict[str, Any]) -> None:
        for warning in result["warnings"]:
            self.stderr.write(f"warning: {warning}")
        files = f", {result['num_files']} files" if result["num_files"] else ""
        self.stdout.write(f"Written to {result['file']}: {result['bytes']:,} bytes, {result['engine']}{files}.")
