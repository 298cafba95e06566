"""Ask a running server whether it speaks its dialects."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.management.base import CommandParser
from rich.table import Table
from rich.text import Text

from accounts.management.base import HouseCommand
from accounts.management.help import DIFFERS
from inference.conformance import matrix
from inference.conformance.target import Target, Unreachable

SIGNS = {"passed": ("✓", "green"), "failed": ("✗", "red"), "skipped": ("–", "dim")}


class Command(HouseCommand):
    help = (
        "Check the dialects of a server over HTTP with a key: native, OpenAI's, Anthropic's where it is there, "
        "llama.cpp's. About forty short requests, which are charged to the key like any others."
    )
    examples = (
        "conformance --key $API_KEY",
        "conformance --url https://llm.example.org --model smollm2 --dialect openai --dialect llamacpp",
        "conformance --json",
    )
    statuses = {0: "every check passed or was skipped", 1: "the server was not reached", 2: "a check failed"}
    more_help = "The key is --key, else API_KEY in the environment, which does not show in the list of processes."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--url", help="base URL of the server; this installation's without it")
        parser.add_argument("--key", help="a key with the scopes generate and usage")
        parser.add_argument("--model", help="the model to ask; the server's default without it")
        parser.add_argument(
            "--dialect", action="append", choices=list(matrix.DIALECTS), dest="dialects", help="repeatable; all without"
        )
        parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of one request (60)")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        url = options["url"] or settings.CONFIG.base_url
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            self.fail("url_invalid", f"{url!r} is no base URL such as http://127.0.0.1:8000.")
        key = options["key"] or os.environ.get("API_KEY", "")
        if not key:
            self.fail("key_missing", "Give a key: --key, or API_KEY in the environment.")
        if not 0 < options["timeout"] <= 3600:
            self.fail("timeout_invalid", "--timeout is a number of seconds up to 3600.")
        target = Target(url, key, options["model"], options["timeout"])
        checks = matrix.chosen(options["dialects"] or matrix.DIALECTS)
        with self.console.status("") as status:
            try:
                found = matrix.run(target, checks, lambda check: status.update(f"{check.dialect}: {check.name}"))
            except Unreachable as error:
                self.fail("unreachable", str(error))
        counts = {outcome: sum(each.outcome == outcome for each in found) for outcome in SIGNS}
        self.exit_status = DIFFERS if counts["failed"] else 0
        return {"url": url, **counts, "checks": [asdict(each) for each in found]}

    def show(self, result: dict[str, Any]) -> None:
        table = Table("dialect", "check", "", "seen", box=None)
        for check in result["checks"]:
            sign, style = SIGNS[check["outcome"]]
            table.add_row(check["dialect"], check["name"], Text(sign, style=style), Text(check["seen"]))
        self.console.print(table)
        self.stdout.write(f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped.")
