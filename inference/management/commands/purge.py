"""Delete what is older than it is kept."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser
from django.utils import timezone
from redis import RedisError

from accounts import redis_client
from accounts.ledger import retention
from accounts.management.base import HouseCommand
from accounts.models import AuditEntry, RefusedRequest
from inference.models import Receipt
from inference.upkeep import housekeeping, leftovers


class Command(HouseCommand):
    help = (
        "Delete ledger entries, receipts, refusals and entries of the audit log that are older than LEDGER_DAYS, "
        "RECEIPT_DAYS, REFUSAL_DAYS and AUDIT_DAYS, "
        "in small transactions, while requests are served. Entries go once the statements of their months are kept. "
        "The web's housekeeping does the same, bit by bit. The logs of an embedded installation are written anew: what "
        "was deleted leaves the disk."
    )
    examples = ("purge --dry-run", "purge --json")

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="only say what would go")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        now = timezone.now()
        if not options["dry_run"]:
            return {"deleted": housekeeping.purge(now), "wiped": self._wipe()}
        before = housekeeping.before(now)
        found = {}
        if "ledger" in before:
            found["ledger_periods"] = retention.due_periods(before["ledger"]).count()
        if "receipts" in before:
            found["receipts"] = Receipt.objects.filter(created_at__lt=before["receipts"]).count()
        if "refusals" in before:
            found["refusals"] = RefusedRequest.objects.filter(created_at__lt=before["refusals"]).count()
        if "audit" in before:
            found["audit"] = AuditEntry.objects.filter(created_at__lt=before["audit"]).count()
        return {"would_delete": found}

    def _wipe(self) -> list[str]:
        """A site that does not run has a Valkey that does not answer: the housekeeping does it when it runs again."""
        try:
            return leftovers.wipe(redis_client.client())
        except RedisError as error:
            self.stderr.write(f"Redis does not answer ({type(error).__name__}): its log is written anew when it runs.")
            return []

    def show(self, result: dict[str, Any]) -> None:
        result.pop("wiped", None)
        for verb, numbers in result.items():
            words = ", ".join(f"{name} {number:,}" for name, number in numbers.items())
            self.stdout.write(f"{verb.replace('_', ' ').capitalize()}: {words}.")
