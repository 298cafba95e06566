"""`manage.py demo`: the demo tenants, their keys and the demo model, once."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from llmsite.config import get_config
from llmsite.demo import DemoError, make_demo
from llmsite.processes.curl import demo_curl_line


class Command(HouseCommand):
    help = "Make the demo tenants, their keys and the demo model, once; their keys are in STATE_DIR/demo.json."
    examples = ("demo", "demo --renew", "demo --json")
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--renew", action="store_true", help="new keys and a new password, if demo.json was lost")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        config = get_config()
        file = config.state / "demo.json"
        progress = self.stderr.write if self.as_json else self.stdout.write
        self._curl = options["verbosity"] > 0
        try:
            is_new = make_demo(file, config.base_url, renew=options["renew"], say=progress)
        except DemoError as error:
            self.fail("demo_failed", str(error))
        return {"file": str(file), "created": is_new}

    def show(self, result: dict[str, Any]) -> None:
        state = "Made" if result["created"] else "Found"
        self.stdout.write(f"{state} the demo tenants; their keys are in {result['file']}.")
        if self._curl:
            self.stdout.write(demo_curl_line(get_config()))
