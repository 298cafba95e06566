"""A worker process on the test's database with a fake engine of a set speed: `worker.py DATABASE SECONDS_PER_STEP`."""

from __future__ import annotations

import sys

import django
from django.conf import settings


def main() -> None:
    settings.DATABASES["default"]["NAME"] = sys.argv[1]
    settings.CONFIG.engine = "fake"
    settings.CONFIG.drain_seconds = 1.0
    django.setup()
    from django.core.management import call_command

    from inference.engine.fake_backend import FakeBackend

    FakeBackend.__init__.__defaults__ = (float(sys.argv[2]), 0.0)  # type: ignore[misc]
    call_command("worker", skip_checks=True)


if __name__ == "__main__":
    main()
