"""Ask for more tokens a month than one operator may give, and approve what another asked for."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser

from accounts.limits import raises
from accounts.management.arguments import UNLIMITED, limit_value, moment, sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import QuotaRaise


class Command(HouseCommand):
    help = "Ask for a quota above QUOTA_APPROVAL_TOKENS, approve or refuse one. Without arguments it lists them."
    examples = (
        'quota_raise --tenant "Alice\'s" --monthly-tokens 50000000 --reason "contract of May"',
        'quota_raise --tenant "Alice\'s" --monthly-tokens 90000000 --until 2026-12-24 --reason "launch"',
        "quota_raise --approve 3",
        "quota_raise --refuse 3 --json",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--tenant", help="the tenant's name")
        what.add_argument("--approve", type=int, metavar="ID")
        what.add_argument("--refuse", type=int, metavar="ID")
        parser.add_argument("--monthly-tokens", type=limit_value, metavar="N", help=f"a number or `{UNLIMITED}`")
        parser.add_argument("--until", type=moment, help="a limit for a time; for good, unless it says")
        parser.add_argument("--reason", default="")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        try:
            rows = self._rows(options)
        except QuotaRaise.DoesNotExist:
            self.fail("raise_not_found", f"There is no raise {options['approve'] or options['refuse']}.")
        except ValidationError as error:
            self.fail(getattr(error, "code", None) or "raise_invalid", sentence(error))
        return {"raises": [as_json(row) for row in rows]}

    def _rows(self, options: dict[str, Any]) -> list[QuotaRaise]:
        if options["approve"] is not None or options["refuse"] is not None:
            is_approved = options["approve"] is not None
            return [raises.decide(options["approve"] if is_approved else options["refuse"], approve=is_approved)]
        if options["tenant"] is None:
            return list(QuotaRaise.objects.select_related("tenant")[:200])
        wanted = options["monthly_tokens"]
        if wanted is None or wanted == "inherit":
            self.fail("value_missing", f"Give --monthly-tokens, a whole number or `{UNLIMITED}`.")
        tenant = tenant_named(self, options["tenant"])
        return [raises.ask(tenant, None if wanted == UNLIMITED else wanted, options["reason"], options["until"])]

    def show(self, result: dict[str, Any]) -> None:
        for row in result["raises"]:
            tokens = "unlimited" if row["monthly_tokens"] is None else f"{row['monthly_tokens']:,}"
            by = f", {row['state']} by {row['decided_by']}" if row["decided_by"] else ""
            until = f" until {row['ends_at']:%Y-%m-%d %H:%M}" if row["ends_at"] else ""
            self.stdout.write(
                f"{row['id']}: {tokens} tokens a month for {row['tenant']}{until}, asked by {row['asked_by']}{by}"
            )


def as_json(row: QuotaRaise) -> dict[str, Any]:
    return {
        "id": row.pk,
        "tenant": row.tenant.name,
        "monthly_tokens": row.monthly_tokens,
        "ends_at": row.ends_at,
        "reason": row.reason,
        "state": row.state,
        "asked_by": row.asked_by,
        "asked_at": row.asked_at,
        "decided_by": row.decided_by,
        "decided_at": row.decided_at,
    }
