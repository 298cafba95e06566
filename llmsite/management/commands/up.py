"""`manage.py up`, as Django lists it. manage.py itself hands it to the supervisor before Django loads."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from llmsite.processes import supervisor


class Command(HouseCommand):
    help = "Start the web, a worker, beat and an embedded Valkey, and keep them running."
    examples = supervisor.EXAMPLES
    statuses = supervisor.STATUSES
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        supervisor.add_arguments(parser)

    def run(self, options: dict[str, Any]) -> None:
        sys.exit(supervisor.main([f"--{name}" for name in ("demo", "json") if options[name]]))
