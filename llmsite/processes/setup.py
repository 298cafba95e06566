"""What has to be true before the site serves: a migrated database, the demo if asked for, the models of models.yaml.

One process instead of three commands, so that a start stays short. `python -m llmsite.processes.setup [--demo]`,
called by the supervisor.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import django
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection
from django.db.migrations.executor import MigrationExecutor


def main(arguments: list[str]) -> int:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmsite.settings")
    django.setup()
    from django.conf import settings

    from llmsite.config import get_config

    try:
        migrate()
        if "--demo" in arguments:
            call_command("demo", verbosity=0)
        if get_config().models_yaml:
            call_command("sync_models")
    except (CommandError, DatabaseError) as error:
        print(f"{error}  (database: {settings.DATABASES['default']['NAME']})", file=sys.stderr)
        return 1
    return 0


def _print(text: str) -> None:
    print(text, flush=True)


def migrate(say: Callable[[str], None] = _print) -> None:
    """Apply what is missing; quick when nothing is."""
    executor = MigrationExecutor(connection)
    missing = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if missing:
        say(f"Migrating the database ({len(missing)} steps).")
        call_command("migrate", interactive=False, verbosity=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
