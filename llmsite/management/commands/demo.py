"""`manage.py demo`: the demo tenants, their keys and the demo model, once."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from llmsite.config import get_config
from llmsite.demo import DemoError, make_demo
from llmsite.processes.curl import demo_curl_line


class Command(BaseCommand):
    help = "Make the demo tenants, their keys and the demo model, once; their keys are in STATE_DIR/demo.json."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--renew", action="store_true", help="new keys and a new password, if demo.json was lost")
        parser.add_argument("--json", action="store_true", help="print where the file is, and whether it is new")

    def handle(self, *args: Any, **options: Any) -> None:
        config = get_config()
        file = config.state / "demo.json"
        progress = self.stderr.write if options["json"] else self.stdout.write
        try:
            is_new = make_demo(file, config.base_url, renew=options["renew"], say=progress)
        except DemoError as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps({"file": str(file), "created": is_new}))
            return
        self.stdout.write(f"{'Made' if is_new else 'Found'} the demo tenants; their keys are in {file}.")
        if options["verbosity"] > 0:
            self.stdout.write(demo_curl_line(config))
