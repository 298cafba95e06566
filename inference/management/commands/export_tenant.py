"""Everything of a tenant in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand
from inference.departure import export


class Command(HouseCommand):
    help = (
        "Write everything that is kept of a tenant as lines of JSON: its rows, ledger and receipts, stored responses "
        "and the content of its files. No secret is in it; keep the file as safe as what the tenant said."
    )
    examples = (
        'export_tenant "Alice\'s" --to alice.jsonl',
        'export_tenant "Alice\'s" --to /mnt/exports/alice.jsonl --replace --json',
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("tenant", help="the tenant's name")
        parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="with mode 0600")
        parser.add_argument("--replace", action="store_true", help="a file that is there")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant, place = tenant_named(self, options["tenant"]), options["to"]
        if place.exists() and not options["replace"]:
            self.fail("file_exists", f"{place} is there already: give another name, or --replace.")
        scratch = place.with_name(f"{place.name}.part")
        number = 0
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(scratch, flags, 0o600), "wb") as file:
                for line in export.lines(tenant, timezone.now()):
                    number += file.write(line) > 0
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(place)
        except FileExistsError:
            self.fail("file_exists", f"{scratch} is there already: another export runs, or was ended. Remove it.")
        except BaseException as error:  # Ctrl-C or the database, too: what the tenant said is not left lying about
            scratch.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            self.fail("file_unwritable", f"{place} cannot be written: {error.strerror}.")
        return {"tenant": tenant.name, "file": str(place), "lines": number, "bytes": place.stat().st_size}

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(
            f"Wrote {result['lines']:,} lines, {result['bytes']:,} bytes, of {result['tenant']} to {result['file']}."
        )
