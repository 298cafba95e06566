"""Say what apply_config would change."""

from __future__ import annotations

from typing import Any

from accounts.management.help import DIFFERS
from inference.management.site_file import SiteFileCommand


class Command(SiteFileCommand):
    help = "Check a file of export_config's form and say what apply_config would change. Changes nothing."
    examples = (
        "diff_config site.yaml",
        "diff_config site.yaml --prune --json",
        "diff_config -",
    )
    statuses = {0: "nothing differs", 2: "the database differs from the file"}

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        plan = self.prepared(options, dry_run=True)
        self.exit_status = DIFFERS if plan.differs else 0
        return self.as_result(plan)

    def show(self, result: dict[str, Any]) -> None:
        super().show(result)
        if not result["differs"]:
            self.stdout.write("Nothing differs.")
