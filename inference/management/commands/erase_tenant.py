"""Erase a tenant."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import redis
from django.core.management.base import CommandParser

from accounts.management.arguments import tenant_named
from accounts.management.base import HouseCommand
from accounts.management.plain import plain
from inference.departure import erasure


class Command(HouseCommand):
    help = (
        "Erase a tenant: what it said, its files, stored responses, slots, keys, members and names, everywhere. The "
        "ledger's sums and statements stay under a number, without names. It cannot be undone: export_tenant first."
    )
    examples = ('erase_tenant "Alice\'s"', 'erase_tenant "Alice\'s" --now --yes --json')

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("tenant", help="the tenant's name")
        parser.add_argument("--now", action="store_true", help="cancel what waits and runs, batches too")
        parser.add_argument("--yes", action="store_true", help="do not ask for the name again")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"])
        name = tenant.name
        if not options["yes"] and not self._is_meant(name):
            self.fail("not_confirmed", "The name was not repeated: nothing was erased.")
        try:
            told = erasure.erase(tenant, now_too=options["now"])
        except erasure.Busy as busy:
            self.fail(
                "tenant_busy",
                f"{name} is busy: {busy}. Wait, or cancel them with --now.",
                requests=busy.num_requests,
                batches=busy.num_batches,
            )
        except redis.RedisError:
            self.fail("redis_unreachable", "Redis does not answer. What was begun is finished by the same command.")
        return {"tenant": name, **asdict(told)}

    def _is_meant(self, name: str) -> bool:
        question = plain(f"Everything of {name} is erased for good. Its name again: ")
        self.stderr.write(question, style_func=str, ending="")  # standard output has the result alone
        self.stderr.flush()
        try:
            return input() == name
        except EOFError:  # nobody is there to ask
            return False

    def show(self, result: dict[str, Any]) -> None:
        rows = sum(result["counts"].values())
        self.stdout.write(
            f"{result['tenant']} is erased, {rows:,} rows and keys; its ledger is that of {result['name']}."
        )
        for path in result["files_kept"]:
            self.stdout.write(f"The file of an adapter of its own stays: {path}")
        for problem in result["problems"]:
            self.stdout.write(f"Not reached: {problem} Run it again for {result['name']}.")
