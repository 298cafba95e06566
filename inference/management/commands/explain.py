"""Say what became of a request, and why."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.base import HouseCommand
from inference.inquiry.explain import explain


class Command(HouseCommand):
    help = "Say why a request was refused, or what it used and cost. The id is in X-Request-ID of its answer."
    examples = ("explain 0b1f6a52-3f4e-4c55-9a0e-2f6a6c1c9d10", "explain 0b1f6a52-3f4e-4c55-9a0e-2f6a6c1c9d10 --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("request_id", help="as in X-Request-ID")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        facts = explain(options["request_id"][:64])
        if facts is None:
            self.fail(
                "request_not_found",
                "Nothing is kept of this request: the id is wrong, it is older than receipts and refusals are kept, or "
                "it was one of too many in its second.",
            )
        return facts

    def show(self, result: dict[str, Any]) -> None:
        self.stdout.write(result["sentence"])
        refusal = result["refusal"]
        if refusal and refusal["limit"]:
            of = f" of the {refusal['of']}" if refusal["of"] else ""
            self.stdout.write(f"  limit that bound: {refusal['limit']}{of}, {refusal['value']}")
        for entry in result["ledger"]:
            self.stdout.write(
                f"  {entry['created_at']:%Y-%m-%d %H:%M:%S} {entry['kind']}: {entry['used_tokens']:+,} used, "
                f"{entry['reserved_tokens']:+,} held, {entry['cost']} {entry['reason']}".rstrip()
            )
