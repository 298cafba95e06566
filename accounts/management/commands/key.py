"""Keys: which there are, and what one may do."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db.models import Q
from django.utils import timezone
from rich.table import Table

from accounts.management.arguments import (
    add_allowed,
    allowed,
    as_row,
    key_meant,
    moment,
    sentence,
    tenant_named,
)
from accounts.management.base import HouseCommand
from accounts.models import APIKey, Scope

ACTIONS = ("list", "change")
MOST = 1000


class Command(HouseCommand):
    help = (
        "List API keys, newest first, or change what one is called, may do, may use, and when it ends. "
        "Its limits are set_quota's; its text is shown by nothing."
    )
    examples = (
        "key",
        'key list --tenant "Alice\'s" --active --json',
        "key change 4fT9q2LmX0aB --name laptop --expires-at 2027-01-31",
        "key change 4fT9q2LmX0aB --allowed-models small --allowed-adapters all",
        "key change 4fT9q2LmX0aB --scope usage --never-expires",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("action", nargs="?", choices=ACTIONS, default="list")
        parser.add_argument("key", nargs="?", help="public id of the key, for change")
        parser.add_argument("--tenant", help="for list: of this tenant")
        parser.add_argument("--active", action="store_true", help="for list: neither revoked nor expired")
        parser.add_argument("--name")
        parser.add_argument("--scope", action="append", choices=Scope.values, help="all that it has then; repeatable")
        ends = parser.add_mutually_exclusive_group()
        ends.add_argument("--expires-at", type=moment)
        ends.add_argument("--never-expires", action="store_true")
        add_allowed(parser)

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        if options["action"] == "list":
            return self._list(options)
        if not options["key"]:
            self.fail("key_missing", "Say which: key change PUBLIC_ID.")
        key = key_meant(self, options["key"])
        wanted: dict[str, Any] = allowed(options)
        if options["name"] is not None:
            wanted["name"] = options["name"]
        if options["scope"] is not None:
            wanted["scopes"] = list(dict.fromkeys(options["scope"]))
        if options["expires_at"] is not None or options["never_expires"]:
            wanted["expires_at"] = options["expires_at"]
        if not wanted:
            self.fail("nothing_to_change", "Say what to change, such as --expires-at; --help lists it.")
        for name, value in wanted.items():
            setattr(key, name, value)
        try:
            key.full_clean()
        except ValidationError as error:
            self.fail("key_invalid", sentence(error))
        key.save(update_fields=list(wanted))
        return {"keys": [_row(key)]}

    def _list(self, options: dict[str, Any]) -> dict[str, Any]:
        rows = APIKey.objects.select_related("tenant").order_by("-pk")
        if options["tenant"]:
            rows = rows.filter(tenant=tenant_named(self, options["tenant"]))
        if options["active"]:
            rows = rows.filter(Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now()), revoked_at__isnull=True)
        return {"keys": [_row(each) for each in rows[:MOST]]}

    def show(self, result: dict[str, Any]) -> None:
        table = Table("key", "name", "tenant", "scopes", "last used", "ends", box=None)
        for row in result["keys"]:
            ended = "revoked" if row["revoked_at"] else (row["expires_at"] or "never")[:16]
            used = f"{row['last_used_at']:%Y-%m-%d %H:%M}" if row["last_used_at"] else "never"
            table.add_row(row["key"], row["name"], row["tenant"], ", ".join(row["scopes"]), used, ended)
        self.print_table(table)


def _row(key: APIKey) -> dict[str, Any]:
    more = ("allowed_models", "allowed_adapters", "last_used_at", "created_at")
    return {**as_row(key), **{name: getattr(key, name) for name in more}}
