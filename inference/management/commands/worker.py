"""`manage.py worker`: a Celery worker that holds the models of one pool."""

from __future__ import annotations

import os
from typing import Any

from django.conf import settings
from django.core.management.base import CommandParser
from prometheus_client import start_http_server

from accounts.management.base import HouseCommand
from inference.catalog import registry
from inference.transport.doorbell import HOUSEKEEPING

HOUSEKEEPING_QUEUE = "housekeeping"
"""Jobs of beat (llmsite/processes/beat.py); every worker takes them, whatever its pool."""
LEAST_THREADS = 64
"""Threads are made when they are needed; models that are registered later need some too."""


class Command(HouseCommand):
    help = (
        "Run a worker of one pool of models, in the foreground, until TERM or Ctrl-C. With --json it says in one "
        "object what it starts with; its log is as LOG_FORMAT says."
    )
    examples = ("worker", "worker --pool large --concurrency 128", "worker --json")
    statuses = {0: "told to stop, and stopped", 75: "it was stuck, or did not end in time, and ended itself"}

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--pool", default="default", help="the pool whose models it holds (default: default)")
        parser.add_argument(
            "--concurrency", type=int, help="task threads; by default twice the slots of the pool, at least 64"
        )

    def run(self, options: dict[str, Any]) -> dict[str, Any]:
        pool = options["pool"]
        threads = options["concurrency"] or max(LEAST_THREADS, 2 * _num_slots(pool))
        name = f"{pool}-{os.getpid()}"
        self._found = {"name": name, "pool": pool, "threads": threads, "queues": [pool, HOUSEKEEPING]}
        return self._found

    def show(self, result: dict[str, Any]) -> None:
        """Nothing: its log says what it does."""

    def handle(self, *args: Any, **options: Any) -> None:
        from celery.signals import setup_logging

        from llmsite.celery import app

        super().handle(*args, **options)
        found = self._found
        config = settings.CONFIG
        if config.worker_metrics_port:
            start_http_server(config.worker_metrics_port, addr=config.host)
        setup_logging.connect(_keep_logging, weak=False)
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING"]
        size = ["--pool", "threads", "--concurrency", str(found["threads"]), "--queues", ",".join(found["queues"])]
        app.worker_main(["--quiet", "worker", "--hostname", f"{found['name']}@%h", *size, *quiet])


def _keep_logging(**_: Any) -> None:
    """Settings have configured it; with a receiver here Celery leaves it alone."""


def _num_slots(pool: str) -> int:
    return sum(served.n_slots for served in registry.in_pool(pool))
