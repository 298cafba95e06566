"""Prove the ledger."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from accounts.ledger.audit import audit
from accounts.management.base import HouseCommand


class Command(HouseCommand):
    help = (
        "Replay the whole ledger and check that no reservation passed its limit, none was charged twice, and every "
        "period is the sum of its entries. May run while requests are served."
    )
    examples = ("audit_ledger", "audit_ledger --json")
    statuses = {0: "the ledger is proven", 1: "it does not hold; the problems are listed"}

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        report = audit()
        facts = {**asdict(report), "clean": report.is_clean}
        if not report.is_clean:
            if not self.as_json:
                self._list(facts)
            self.fail("ledger_differs", f"The ledger does not hold: {len(report.problems)} problems.", **facts)
        return facts

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(
            f"The ledger holds: {result['num_entries']:,} entries, {result['num_periods']:,} periods, "
            f"{result['num_reservations']:,} reservations ({result['num_open']:,} open); "
            f"{result['used_tokens']:,} tokens and {result['used_requests']:,} requests charged."
        )

    def _list(self, facts: dict[str, Any]) -> None:
        for problem in facts["problems"]:
            self.stdout.write(f"{problem['code']}: {problem['subject']}: {problem['message']}")
