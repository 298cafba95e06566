"""Give a limit another value for a time."""

from __future__ import annotations

from argparse import ArgumentTypeError
from datetime import time
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.utils import timezone

from accounts.limits import limit_rules
from accounts.limits.precedence import LIMIT_NAMES
from accounts.limits.schedules import MAX_LAST_DAYS
from accounts.management.arguments import UNLIMITED, key_meant, limit_value, moment, plan_meant, sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import LimitRule


def hours(text: str) -> tuple[time, time]:
    """22:00-06:00."""
    try:
        start, end = (time.fromisoformat(part) for part in text.split("-"))
        if start.tzinfo or end.tzinfo:
            raise ValueError("a zone")
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a stretch of the day such as 22:00-06:00, in UTC") from None
    return start, end


class Command(HouseCommand):
    help = (
        "Give a limit of a tenant, a key or a plan another value for a time; of several at once the last made counts. "
        "Without --limit it lists the rules."
    )
    examples = (
        'limit_rule --tenant "Alice\'s" --limit tokens_per_minute --value 90000 --until 2026-12-01',
        "limit_rule --plan free --limit concurrent_requests --value 8 --daily 22:00-06:00",
        "limit_rule --key 4fT9q2LmX0aB --limit monthly_tokens --value 500000 --last-days 3 --reason 'month end'",
        "limit_rule --remove 7",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--tenant", help="the tenant's name")
        whose.add_argument("--key", help="public id of a key")
        whose.add_argument("--plan", help="the plan's name")
        whose.add_argument("--remove", type=int, metavar="ID", help="delete a rule")
        parser.add_argument("--limit", choices=LIMIT_NAMES)
        parser.add_argument("--value", type=limit_value, metavar="N", help=f"a number or `{UNLIMITED}`")
        parser.add_argument("--from", dest="starts_at", type=moment, help="now, unless it says")
        parser.add_argument("--until", dest="ends_at", type=moment, help="until it is removed, unless it says")
        when = parser.add_mutually_exclusive_group()
        when.add_argument("--daily", type=hours, metavar="22:00-06:00", help="UTC")
        when.add_argument("--last-days", type=int, metavar="N", help=f"of each month, 1 to {MAX_LAST_DAYS}")
        parser.add_argument("--reason", default="")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["remove"] is not None:
            return self._remove(options["remove"])
        if options["limit"] is None:
            rows = LimitRule.objects.select_related("plan", "tenant", "key").order_by("-id")[:200]
            return {"rules": [_as_json(row) for row in rows]}
        return {"rules": [_as_json(self._add(options))]}

    def _add(self, options: dict[str, Any]) -> LimitRule:
        if not any(options[name] for name in ("tenant", "key", "plan")):
            self.fail("owner_missing", "Say whose limit: --tenant, --key or --plan.")
        if options["value"] is None or options["value"] == "inherit":
            self.fail("value_missing", f"Give --value, a whole number or `{UNLIMITED}`.")
        daily = options["daily"]
        rule = LimitRule(
            tenant=tenant_named(self, options["tenant"]) if options["tenant"] else None,
            key=key_meant(self, options["key"]) if options["key"] else None,
            plan=plan_meant(self, options["plan"]) if options["plan"] else None,
            limit=options["limit"],
            value=None if options["value"] == UNLIMITED else options["value"],
            starts_at=options["starts_at"] or timezone.now(),
            ends_at=options["ends_at"],
            recurrence="daily" if daily else "month_end" if options["last_days"] else "always",
            daily_from=daily[0] if daily else None,
            daily_until=daily[1] if daily else None,
            last_days=options["last_days"],
            reason=options["reason"],
        )
        try:
            limit_rules.save(rule)
        except ValidationError as error:
            self.fail("limits_invalid", sentence(error))
        return rule

    def _remove(self, pk: int) -> dict[str, Any]:
        rule = LimitRule.objects.select_related("plan", "tenant", "key").filter(pk=pk).first()
        if rule is None:
            self.fail("rule_not_found", f"There is no rule {pk}.")
        shown = _as_json(rule)
        rule.delete()
        return {"removed": shown}

    def show(self, result: dict[str, Any]) -> None:
        if "removed" in result:
            self.stdout.write(f"Removed rule {result['removed']['id']}.")
        for rule in result.get("rules", []):
            value = "unlimited" if rule["value"] is None else f"{rule['value']:,}"
            until = f" until {rule['ends_at']:%Y-%m-%d %H:%M}" if rule["ends_at"] else ""
            self.stdout.write(
                f"{rule['id']}: {rule['limit']} of {rule['of']} is {value} from {rule['starts_at']:%Y-%m-%d %H:%M}"
                f"{until} ({rule['recurrence']}) {rule['reason']}".rstrip()
            )


def _as_json(rule: LimitRule) -> dict[str, Any]:
    owner = rule.plan or rule.tenant or (rule.key.display if rule.key else "")
    level = "plan" if rule.plan_id else "tenant" if rule.tenant_id else "key"
    return {
        "id": rule.pk,
        "level": level,
        "of": str(owner),
        "limit": rule.limit,
        "value": rule.value,
        "starts_at": rule.starts_at,
        "ends_at": rule.ends_at,
        "recurrence": rule.recurrence,
        "daily": [rule.daily_from, rule.daily_until] if rule.recurrence == "daily" else None,
        "last_days": rule.last_days,
        "reason": rule.reason,
    }
