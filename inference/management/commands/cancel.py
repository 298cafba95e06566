"""Requests that wait or run now; cancel one, or all of a tenant or a key."""

from __future__ import annotations

import time
from typing import Any

import redis
from django.core.management.base import CommandParser
from rich.table import Table

from accounts.management.arguments import key_meant, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import APIKey, Tenant
from inference.transport.queue import ticket_queue
from inference.upkeep import by_hand

MOST_SHOWN = 1000
MAX_ID_CHARACTERS = 64


class Command(HouseCommand):
    help = (
        "Cancel requests by their ids, or all that a tenant or a key has waiting and running; without any, list what "
        "waits and runs. A waiting one is free of charge, a running one pays for what was computed."
    )
    examples = (
        "cancel",
        "cancel 0b1f6a52-3f4e-4c55-9a0e-2f6a6c1c9d10",
        'cancel --tenant "Alice\'s" --json',
        "cancel --key 4fT9q2LmX0aB",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("request_ids", nargs="*", metavar="request_id", help="as in X-Request-ID")
        whose = parser.add_mutually_exclusive_group()
        whose.add_argument("--tenant", help="everything of this tenant")
        whose.add_argument("--key", help="everything of this key, by its public id")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"]) if options["tenant"] else None
        key = key_meant(self, options["key"]) if options["key"] else None
        meant = [each[:MAX_ID_CHARACTERS] for each in options["request_ids"]]
        if meant and (tenant or key):
            self.fail("bad_request", "Name requests, or a tenant or key: not both.")
        try:
            if tenant or key:
                meant = ticket_queue().live_requests(
                    key_id=key.pk if key else None, tenant_id=tenant.pk if tenant else None
                )
            elif not meant:
                return {"live": _live()}
            was = {request_id: by_hand.cancel(request_id) for request_id in meant}
        except redis.RedisError:
            self.fail("redis_unreachable", "Redis does not answer: what waits and runs is unknown.")
        if options["request_ids"] and all(each is None for each in was.values()):
            self.fail("request_not_found", "No such request waits or runs, or has lately.", requests=list(was))
        return {"requests": [{"request_id": each, "was": state} for each, state in was.items()]}

    def show(self, result: dict[str, Any]) -> None:
        if "live" in result:
            self._list(result["live"])
            return
        if not result["requests"]:
            self.stdout.write("Nothing of it waits or runs.")
        words = {None: "is not known", by_hand.DONE: "had ended already"}
        for row in result["requests"]:
            self.stdout.write(f"{row['request_id']} {words.get(row['was'], 'is cancelled')}.")

    def _list(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            self.stdout.write("Nothing waits and nothing runs.")
            return
        table = Table("request", "state", "for", "tenant", "key", "pool", "worker", box=None)
        for row in rows:
            table.add_row(
                row["request_id"],
                row["state"],
                f"{row['seconds']:.1f} s",
                row["tenant"] or "-",
                row["key"] or "-",
                row["pool"],
                row["worker"] or "-",
            )
        self.print_table(table)


def _live() -> list[dict[str, Any]]:
    """Running ones first. Raises redis.RedisError."""
    found = ticket_queue().every_live(MOST_SHOWN)
    tenants = dict(Tenant.objects.filter(pk__in={each.tenant_id for each in found}).values_list("pk", "name"))
    keys = {row.pk: row.display for row in APIKey.objects.filter(pk__in={each.key_id for each in found})}
    now = time.time()
    return [
        {
            "request_id": each.request_id,
            "state": "running" if each.worker else "waiting",
            "seconds": round(max(0.0, now - each.created_at), 3),
            "tenant": tenants.get(each.tenant_id),
            "key": keys.get(each.key_id),
            "pool": each.pool,
            "worker": each.worker or None,
        }
        for each in found
    ]
