"""Make the configuration what a file says."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from accounts.management.help import DIFFERS
from inference.api import cancelling
from inference.management.site_file import SiteFileCommand
from inference.site_file import site_yaml
from inference.site_file.models_form import ModelsYamlError
from inference.site_file.plan import SitePlan


class Command(SiteFileCommand):
    help = (
        "Make plans, tenants, prices, limits, models, adapters and grants what a file says: all of it in one "
        "transaction, or nothing. Everything is checked before anything is written, and applying a file twice changes "
        "nothing."
    )
    examples = (
        "apply_config site.yaml --dry-run",
        "apply_config site.yaml",
        "apply_config site.yaml --prune --json",
        "apply_config -",
    )
    statuses = {0: "the database is as the file says", 2: "with --dry-run: it differs, and was left as it is"}

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("--dry-run", action="store_true", help="check, and say what would change")

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        dry_run = options["dry_run"]
        plan = self.prepared(options, dry_run=dry_run)
        if dry_run:
            self.exit_status = DIFFERS if plan.differs else 0
        elif plan.differs:
            self._apply(plan)
        return {**self.as_result(plan), "dry_run": dry_run, "applied": plan.differs and not dry_run}

    def _apply(self, plan: SitePlan) -> None:
        suspended = [tenant.pk for tenant in plan.suspended if tenant.pk is not None]
        try:
            site_yaml.apply(plan)
        except ModelsYamlError as error:
            self.refuse(error)
        for tenant_id in suspended:
            cancelling.cancel_all(tenant_id=tenant_id)

    def show(self, result: dict[str, Any]) -> None:
        super().show(result)
        if not result["differs"]:
            self.stdout.write("Nothing differs: nothing was changed.")
        elif result["dry_run"]:
            self.stdout.write("Nothing was changed: this was a dry run.")
        else:
            self.stdout.write(f"Applied: {len(result['changes'])} changes.")
