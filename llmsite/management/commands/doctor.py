"""`manage.py doctor`, as Django lists it. manage.py itself calls it before Django loads: settings may be wrong."""

from __future__ import annotations

import sys
from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from llmsite import doctor


class Command(HouseCommand):
    help = "Look at settings, database, Redis, workers, models, disk and processor; say how to mend each."
    examples = doctor.EXAMPLES
    statuses = doctor.STATUSES
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        doctor.add_arguments(parser)

    def run(self, options: dict[str, Any]) -> None:
        chosen = [f"--{name.replace('_', '-')}" for name in ("json", "settings_table") if options[name]]
        sys.exit(doctor.main(chosen))
