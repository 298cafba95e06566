"""`manage.py up`, as Django lists it. manage.py itself hands it to the supervisor before Django loads."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from llmsite.processes import supervisor


class Command(BaseCommand):
    help = "Start the web, a worker, beat and an embedded Valkey, and keep them running."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        supervisor.add_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        sys.exit(supervisor.main(["--demo"] if options["demo"] else []))
