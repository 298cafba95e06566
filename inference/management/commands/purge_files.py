"""Remove stored files and batches whose time is over; the web does so every hour."""

from __future__ import annotations

from typing import Any

from django.utils import timezone

from accounts.management.base import HouseCommand
from inference.batches import files


class Command(HouseCommand):
    help = "Remove stored files that have expired, batches that ended FILE_DAYS ago, and bytes that belong to nobody."
    examples = ("purge_files", "purge_files --json")

    def run(self, options: dict[str, Any]) -> dict[str, int]:
        return files.purge(timezone.now())

    def show(self, result: dict[str, int]) -> None:
        self.stdout.write(f"{result['files']} files, {result['batches']} batches, {result['strays']} strays removed.")
