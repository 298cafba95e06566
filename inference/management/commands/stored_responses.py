"""Say how long a tenant's responses are stored, and remove those that are."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import CommandParser
from django.db.models import Count, Sum
from django.utils import timezone

from accounts.management.arguments import sentence, tenant_named
from accounts.management.base import HouseCommand
from accounts.models import Tenant
from inference import stored_responses


class Command(HouseCommand):
    help = (
        "Show what is stored of /v1/responses, prompts and answers included. With --days a tenant's are stored for so "
        "long, with --off none are and those that are go; --purge removes what is too old, --erase all of a tenant."
    )
    examples = (
        "stored_responses",
        'stored_responses --tenant "Alice\'s" --days 30',
        'stored_responses --tenant "Alice\'s" --off --json',
        "stored_responses --purge",
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", help="the tenant's name")
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--days", type=int, metavar="N", help="store its responses, each for N days")
        what.add_argument("--off", action="store_true", help="store none, and remove those that are")
        what.add_argument(
            "--erase", action="store_true", help="remove all of the tenant; new ones are stored as before"
        )
        what.add_argument("--purge", action="store_true", help="remove what is too old, as the sweep does")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        tenant = tenant_named(self, options["tenant"]) if options["tenant"] else None
        removed = 0
        if tenant is None:
            if options["days"] is not None or options["off"] or options["erase"]:
                self.fail("tenant_missing", "Say whose responses: give --tenant.")
        elif options["days"] is not None or options["off"]:
            self._set_days(tenant, options["days"])
        if options["erase"] and tenant is not None:
            removed = stored_responses.erase(tenant)
        elif options["purge"] or options["off"] or options["days"] is not None:
            removed = stored_responses.purge(timezone.now(), tenant=tenant)
        rows = Tenant.objects.filter(pk=tenant.pk) if tenant else Tenant.objects.all()
        found = rows.annotate(number=Count("stored_responses"), size=Sum("stored_responses__num_bytes"))
        stored = [
            {"tenant": row.name, "days": row.response_days, "responses": row.number, "bytes": row.size or 0}
            for row in found.order_by("name")
        ]
        return {"removed": removed, "stored": stored}

    def _set_days(self, tenant: Tenant, days: int | None) -> None:
        tenant.response_days = days
        try:
            tenant.full_clean()
        except ValidationError as error:
            self.fail("days_invalid", sentence(error))
        tenant.save(update_fields=["response_days"])

    def show(self, result: dict[str, Any]) -> None:
        if result["removed"]:
            self.stdout.write(f"Removed {result['removed']:,} responses.")
        for row in result["stored"]:
            time = "stores none" if row["days"] is None else f"stores them for {row['days']} days"
            self.stdout.write(f"{row['tenant']} {time}: {row['responses']:,} there, {row['bytes']:,} bytes")
